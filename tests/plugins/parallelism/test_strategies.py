"""Each strategy against one process with all rows: gradients and norms to rounding, and what it promises of weights."""

import functools
from pathlib import Path

import pytest
import torch

from tests.ranks import together

PLUGIN = str(Path(__file__).parent / "all_reduce_plugin.py")
ROWS, LENGTH = 3, 32
SETTINGS = ["layers=[memory, attention]", "linear=bitlinear", "brain=[{type: hebbian_loss}, {type: predictive_coding}]"]


def rows():
    """Rows of documents of all lengths; the first has few targets, the last all."""
    from tryplicity.data.packing import Batch

    chance = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(0, 300, (ROWS, LENGTH), generator=chance)
    docs_BT = (torch.arange(LENGTH) >= torch.tensor([30, 3, LENGTH])[:, None]).int()
    targets_BT = ids_BT.roll(-1, 1)
    targets_BT[:, -1] = -100
    targets_BT[:, :-1][docs_BT[:, 1:] != docs_BT[:, :-1]] = -100
    targets_BT[0, :-3] = -100
    return Batch(ids_BT, targets_BT, docs_BT, 0)


def placed(world, strategy, precision="fp32", settings=SETTINGS):
    from tryplicity import load_plugins
    from tryplicity.model import assemble
    from tryplicity.spec import load_spec
    from tryplicity.training.step import decay_groups

    registry = load_plugins((PLUGIN,)).registry
    spec = load_spec("tests/small.yaml", registry, settings)
    strategy = registry.part("parallelism", strategy).build()
    model = strategy.place(assemble(spec), world, 0, precision).train()
    optimizer = spec.training.optimizer.build().build(*decay_groups(model))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return strategy, model, optimizer


def own_rows(world):
    from tryplicity.data.packing import rows_of

    return rows_of(rows(), world.part(ROWS))


def stepped(world, strategy, micro_batch=1, precision="fp32"):
    """Two steps: the losses and norms, the gradients that the first would have used, the weights after both."""
    from tryplicity.training.step import forward_backward, training_step

    strategy, model, optimizer = placed(world, strategy, precision)
    result = forward_backward(model, own_rows(world), micro_batch, precision, strategy, world)
    gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
    said = {"auxiliary": {n: float(v) for n, v in result.auxiliary.items()},
            "objectives": {n: float(m.value) for n, m in result.objectives.items()},
            "stats": {n: m.value.clone() for n, m in result.stats.items()}, "nats": float(result.nats)}
    optimizer.zero_grad()
    steps = [training_step(model, optimizer, strategy, own_rows(world), step=step, micro_batch=micro_batch,
                           precision=precision, max_norm=0.5, learning_rate_factor=1.0, world=world)
             for step in range(2)]
    said["steps"] = [(float(step.loss.value), float(step.gradient_norm)) for step in steps]
    tied = model.unembedding_VD is model.embedding.weight
    return said, gradients, strategy.weights(model), tied, sorted(dict(model.named_parameters()))


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.fixture(scope="module")
def alone():
    return together(1, stepped, "single")[0]


WAYS = {2: ["ddp", "fsdp", {"type": "fsdp", "reshard_after_forward": False},
            {"type": "fsdp", "accumulate_locally": True}, "all_reduce"],
        4: ["ddp", {"type": "fsdp", "shards": 2}]}


def stepped_each(world, strategies):
    return [stepped(world, strategy) for strategy in strategies]


@pytest.fixture(scope="module")
def found_by():
    """By the number of ranks and the strategy: what each rank has after two steps."""
    return functools.cache(lambda size: together(size, stepped_each, WAYS[size]))


@pytest.mark.parametrize(("size", "number"), [(size, i) for size in WAYS for i in range(len(WAYS[size]))],
                         ids=lambda x: str(x))
def test_gradients_losses_and_statistics_are_those_of_all_rows(alone, found_by, size, number):
    """Three rows: on two ranks one and two, of four one has none."""
    said, gradients, weights, tied, names = alone
    for rank, found in enumerate(each[number] for each in found_by(size)):
        theirs, their_gradients, their_weights, their_tied, their_names = found
        assert their_tied and tied and their_names == names
        for kind in ("auxiliary", "objectives"):
            assert theirs[kind] == pytest.approx(said[kind], rel=1e-5)
        assert theirs["nats"] == pytest.approx(said["nats"], rel=1e-6)
        assert theirs["stats"].keys() == said["stats"].keys()
        for name, value in said["stats"].items():
            torch.testing.assert_close(theirs["stats"][name], value, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            error, size_of = (their_gradients[name] - gradient).norm(), gradient.norm()
            assert error <= 1e-5 * size_of + 1e-9, (name, float(error), float(size_of))
        assert theirs["steps"] == [pytest.approx(step, rel=1e-3) for step in said["steps"]]
        assert theirs["steps"][0] == pytest.approx(said["steps"][0], rel=1e-5)
        assert rank > 0 or their_weights.keys() == weights.keys()
        assert all(not hasattr(tensor, "full_tensor") for tensor in their_weights.values())


def looked_at(world, strategy):
    """What `whole`, `forget`, `weights`, `state` and `load` do, after two steps."""
    from tryplicity.training.step import training_step

    strategy, model, optimizer = placed(world, strategy)
    for step in range(2):
        training_step(model, optimizer, strategy, own_rows(world), step=step, micro_batch=1, precision="fp32",
                      max_norm=0.5, learning_rate_factor=1.0, world=world)
    before = kept(strategy.weights(model))
    with strategy.whole(model, write=True), torch.no_grad():
        for name, parameter in model.named_parameters():
            if world.first_rank:
                assert torch.equal(parameter, before[name]), name
            parameter.mul_(2)
    after = kept(strategy.weights(model))
    with strategy.whole(model.layers[1].feed_forward, write=True), torch.no_grad():
        model.layers[1].feed_forward.layer.down.weight.zero_()
    last = strategy.weights(model)
    if world.first_rank:
        parameters = dict(model.named_parameters())
        assert all(torch.equal(tensor, before[name] * (2 if name in parameters else 1))
                   for name, tensor in after.items())
        changed = [name for name in last if not torch.equal(last[name], after[name])]
        assert changed == ["layers.1.feed_forward.layer.down.weight"] and not last[changed[0]].any()

    # each rank alone: what would hang if it needed another
    with strategy.whole(model), torch.no_grad():
        model.eval()
        logits = [model(rows().ids_BT[:world.rank + 1]) for _ in range(1 + world.rank)][-1][0]
        model.train()
    ids = torch.ones(2, 8, dtype=torch.int64)
    with torch.no_grad():
        together_logits = model(ids)

    name, mask = "layers.1.feed_forward.layer.gate_up.weight", torch.tensor([False, True, True, False])
    strategy.forget(optimizer, model.get_parameter(name), mask)
    held = optimizer.state[model.get_parameter(name)]
    rest = {key: whole(value) for key, value in held.items() if isinstance(value, torch.Tensor) and value.ndim}
    assert len(rest) == 2 and all(not value[1:3].any() and value[0].any() and value[3].any() for value in rest.values())

    state = strategy.state(model, optimizer)
    saved = {"model": kept(state["model"]), "optimizer": {
        "state": {name: kept(held) for name, held in state["optimizer"]["state"].items()},
        "groups": state["optimizer"]["groups"]}}
    assert set(state["model"]) == set(before) or not world.first_rank
    again, fresh, new_optimizer = placed(world, strategy_of(strategy))
    again.load(fresh, new_optimizer, saved)
    found = [[step_of(s, m, o, world) for _ in range(2)] for s, m, o in
             ((strategy, model, optimizer), (again, fresh, new_optimizer))]
    assert found[0] == found[1]
    return logits, together_logits


def kept(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def strategy_of(strategy):
    from dataclasses import asdict

    options = asdict(strategy.config) if hasattr(strategy, "config") else {}
    return {"type": strategy.name, **options}


def step_of(strategy, model, optimizer, world):
    from tryplicity.training.step import training_step

    result = training_step(model, optimizer, strategy, own_rows(world), step=2, micro_batch=1, precision="fp32",
                           max_norm=0.5, learning_rate_factor=1.0, world=world)
    return float(result.loss.value), float(result.gradient_norm)


@pytest.mark.parametrize(("size", "strategy"), [
    (2, "ddp"), (2, "fsdp"), (4, {"type": "fsdp", "shards": 2}), (2, "all_reduce")], ids=str)
def test_weights_are_whole_where_they_must_be_and_come_back(size, strategy):
    """A model that is looked at, changed, sampled by each rank alone, saved and loaded goes on as if nothing was."""
    found = together(size, looked_at, strategy)
    for logits, together_logits in found[1:]:
        torch.testing.assert_close(logits, found[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together_logits, found[0][1])


def in_bf16(world):
    from tryplicity.training.step import training_step

    strategy, model, optimizer = placed(world, "fsdp", "bf16")
    seen = []
    model.layers[0].feed_forward.layer.down.register_forward_pre_hook(lambda m, _: seen.append(m.weight.dtype))
    losses = [float(training_step(model, optimizer, strategy, own_rows(world), step=step, micro_batch=2,
                                  precision="bf16", max_norm=0.5, learning_rate_factor=1.0, world=world).loss.value)
              for step in range(3)]
    with strategy.whole(model, write=True), torch.no_grad():
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        model.norm.weight.add_(1e-6)  # bf16 has no such number near one
    assert {p.dtype for p in model.parameters()} == {torch.float32} and set(seen) == {torch.bfloat16}
    return losses


def test_shards_are_kept_in_fp32_and_gathered_in_bf16():
    one, other = together(2, in_bf16)
    alone, = together(1, in_fp32)
    assert one == other and one == pytest.approx(alone, rel=2e-2)


def in_fp32(world):
    return [loss for loss, _ in stepped(world, "single")[0]["steps"]] + [
        step_of(*placed_and_stepped(world), world)[0]]


def placed_and_stepped(world):
    held = placed(world, "single")
    for _ in range(2):
        step_of(*held, world)
    return held


def refused(world, strategy):
    from tryplicity import UserError

    try:
        placed(world, strategy)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(("size", "strategy", "why"), [
    (2, "single", "single: uses one device, and there are 2 ranks"), (1, "ddp", "ddp: this process is alone"),
    (1, "fsdp", "fsdp: this process is alone"),
    (3, {"type": "fsdp", "shards": 2}, "shards 2 does not divide the 3 ranks")])
def test_a_world_that_a_strategy_cannot_use_is_refused(size, strategy, why):
    assert all(why in said for said in together(size, refused, strategy))


def sampled(world, strategy, folder):
    """Tokens that every rank chooses alone from the model as it lies, and that rank 0 chooses from its file."""
    from safetensors.torch import load_file, save_file

    from tryplicity.inference.engine import decode
    from tryplicity.inference.sampler import Sampler, Sampling
    from tryplicity.model import assemble, initialise

    strategy, model, optimizer = placed(world, strategy)
    for _ in range(2):
        step_of(strategy, model, optimizer, world)

    def text(model, number):
        tokens = decode(model, [1, 5, 9 + number], Sampler(Sampling(temperature=0.8, seed=number), []))
        return [next(tokens) for _ in range(12)]

    model.eval()
    with strategy.whole(model):
        own = [text(model, number) for number in range(world.rank + 1)]
    model.train()
    weights, path = strategy.weights(model), f"{folder}/model.safetensors"
    if world.first_rank:
        save_file(weights, path)
    world.first(None)
    plain = initialise(assemble(model.spec), "cpu", 1).eval()
    plain.load_state_dict(load_file(path))
    exported = [text(plain, number) for number in range(world.rank + 1)]
    step_of(strategy, model, optimizer, world)  # training goes on
    return own, exported


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_text_sampled_while_sharded_is_that_of_the_exported_weights(strategy, tmp_path):
    for own, exported in together(2, sampled, strategy, str(tmp_path)):
        assert own == exported and len(set(map(tuple, own))) == len(own)
