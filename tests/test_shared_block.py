"""A shared block is what a model with that block's weights copied to each of its layers computes, and is held once."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.ranks import together
from tryplicity import UserError
from tryplicity.model import assemble
from tryplicity.planner.count import count
from tryplicity.training.step import decay_groups

LAYERS = "layers=[memory, attention, memory, attention, attention]"
SHARED = [LAYERS, "blocks.memory.shared=m", "blocks.attention.shared=a"]
CONNECTED = "residual={type: hyper_connections, streams: 2}"
FIRST = {2: 0, 3: 1, 4: 1}


def of_first(name):
    """layers.3.mixer... -> layers.1.mixer..."""
    root, layer, *rest = name.split(".")
    return ".".join((root, str(FIRST.get(int(layer), layer)), *rest)) if root == "layers" else name


@pytest.fixture(params=["add", "hyper_connections"])
def both(request, make_model):
    """(the model that shares, one with a copy of the weights at each layer)"""
    more = [CONNECTED] if request.param == "hyper_connections" else []
    shared, apart = make_model(*SHARED, *more), make_model(LAYERS, *more)
    own = shared.state_dict()
    apart.load_state_dict({name: own[of_first(name)] for name in apart.state_dict()})
    return shared, apart


def batch():
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(6, 300, (2, 20), generator=generator)
    return ids_BT, ids_BT.roll(-1, 1), (torch.arange(20) >= torch.tensor([7, 20])[:, None]).int()


def loss_of(model, seed=0):
    ids_BT, next_BT, docs_BT = batch()
    losses = model.train()(ids_BT, targets=model.targets(ids_BT, next_BT, docs_BT), doc_ids_BT=docs_BT)
    return sum(mean.value for mean in losses.objectives.values()) + sum(losses.report.losses.values()), losses.report


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_copies_added_up(both, checkpointing):
    shared, apart = both
    shared.activation_checkpointing = checkpointing
    (loss, report), (due, due_report) = loss_of(shared), loss_of(apart)
    torch.testing.assert_close(loss, due)
    loss.backward(), due.backward()
    added = {}
    for name, parameter in apart.named_parameters():
        added[of_first(name)] = added.get(of_first(name), 0) + parameter.grad
    assert added.keys() == dict(shared.named_parameters()).keys()
    for name, parameter in shared.named_parameters():
        torch.testing.assert_close(parameter.grad, added[name], msg=lambda m, n=name: f"{n}: {m}")
    counted = {}
    for name, stat in due_report.stats.items():
        counted[of_first(name)] = counted[of_first(name)] + stat if of_first(name) in counted else stat
    assert counted and report.stats.keys() == counted.keys()
    for name, stat in report.stats.items():
        torch.testing.assert_close(stat.total, counted[name].total)
        torch.testing.assert_close(torch.as_tensor(stat.count), torch.as_tensor(counted[name].count))


def test_whole_is_stepwise_with_a_state_for_each_layer(both):
    shared, apart = both
    ids_BT = batch()[0]
    with torch.no_grad():
        whole_BTV = shared.eval()(ids_BT)
        torch.testing.assert_close(whole_BTV, apart.eval()(ids_BT))
        state = shared.new_state(2)
        assert len(state) == 5
        pieces = [shared(ids_BT[:, :9], state=state), *(shared(ids_BT[:, t:t + 1], state=state) for t in range(9, 20))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole_BTV, rtol=1e-4, atol=1e-4)


def test_it_is_counted_saved_and_grouped_once(make_spec, make_model):
    shared, apart = (assemble(make_spec(*settings)) for settings in (SHARED, [LAYERS]))
    once, each = count(shared), count(apart)
    per_layer = [layer.parameters for layer in each.layers]
    assert [layer.parameters for layer in once.layers] == [*per_layer[:2], 0, 0, 0]
    assert once.total == each.total - sum(per_layer[2:])
    assert once.packed_bytes_per_token == each.packed_bytes_per_token  # read at every layer
    assert once.buffer_bytes < each.buffer_bytes
    names = list(shared.state_dict())
    assert len(names) == len(set(names))
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0", "1"}
    grouped = [id(p) for group in decay_groups(shared) for p in (group["params"] if isinstance(group, dict) else group)]
    assert sorted(grouped) == sorted(id(p) for p in shared.parameters())
    model = make_model(*SHARED)
    twin = copy.deepcopy(model)
    assert twin.layers[3] is twin.layers[1] is not model.layers[1] and len(twin.layers) == 5


def test_work_is_counted_at_each_layer(make_model, make_build):
    flops = []
    for settings in (SHARED, [LAYERS]):
        with FlopCounterMode(display=False) as counter:
            make_model(*settings).eval()(batch()[0])
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
    shared, apart = (make_build(*settings).plan for settings in (SHARED, [LAYERS]))
    assert shared.speed.flops_per_token == apart.speed.flops_per_token
    assert [layer.get("shared_with") for layer in shared.as_dict()["layers"]] == [None, None, 0, 1, 1]


def test_one_block_said_in_two_ways_is_refused(make_spec):
    with pytest.raises(UserError, match=r"layers: layers 0 and 2 are one block \(shared: m\) and differ; say both "
                                        "alike, or give one another name"):
        make_spec(*SHARED, "overrides={2: {norms: after}}")
    spec = make_spec(*SHARED, "overrides={2: {norms: after, shared: null}}")
    assert spec.first_uses == [0, 1, 2, 1, 1]
    with pytest.raises(UserError, match=r"blocks.memory.shared: expected text of at least 1"):
        make_spec(LAYERS, "blocks.memory.shared=true")


def stepped(world, strategy, checkpointing):
    """The weights after two steps on the rank's share of the rows, and their norms."""
    from tryplicity import load_plugins
    from tryplicity.data.packing import Batch, rows_of
    from tryplicity.spec import load_spec
    from tryplicity.training.step import training_step

    registry = load_plugins().registry
    spec = load_spec("tests/small.yaml", registry, [*SHARED, CONNECTED])
    strategy = registry.part("parallelism", strategy).build()
    model = strategy.place(assemble(spec), world, 0).train()
    model.activation_checkpointing = checkpointing
    optimizer = spec.training.optimizer.build().build(*decay_groups(model))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    ids_BT, next_BT, docs_BT = batch()
    rows = rows_of(Batch(ids_BT, next_BT, docs_BT, 0), world.part(2))
    steps = [training_step(model, optimizer, strategy, rows, step=step, micro_batch=1, precision="fp32", max_norm=0.5,
                           learning_rate_factor=1.0, world=world) for step in range(2)]
    return [(float(step.loss.value), float(step.gradient_norm)) for step in steps], strategy.weights(model)


@pytest.fixture(scope="module")
def alone():
    return together(1, stepped, "single", False)[0]


def each_way(world):
    return [stepped(world, strategy, checkpointing) for strategy, checkpointing in WAYS]


WAYS = [("ddp", False), ("ddp", True), ("fsdp", False), ("fsdp", True),
        ({"type": "fsdp", "reshard_after_forward": False}, False)]


def test_strategies_train_it_as_one_process_does(alone):
    steps, weights = alone
    for found, theirs in together(2, each_way)[0]:
        assert found == [pytest.approx(step, rel=1e-5) for step in steps]
        assert theirs.keys() == weights.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
