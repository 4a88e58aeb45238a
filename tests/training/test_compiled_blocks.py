"""Compiled blocks: the same training as eager PyTorch's, without compiling anything twice; and where they cannot be,
eager PyTorch and a line.

Most of it goes through the compiler's tracing and differentiating alone (`aot_eager`), which takes seconds; the code it
then writes is tested in `test_compiled_code.py`.
"""

import pytest
import torch

from tests.training.test_compiled_code import SPECS
from tryplicity.components import Parallelism
from tryplicity.data.packing import Batch
from tryplicity.model import assemble, initialise
from tryplicity.spec import load_spec
from tryplicity.training.compiling import Compiled, compile_blocks, compiled, differs, wanted
from tryplicity.training.step import decay_groups, training_step

BRAIN = "brain=[{type: hebbian_loss, tokens: 8}, predictive_coding]"
CPU = torch.device("cpu")


@pytest.fixture
def batches(prepared):
    """Of two lengths, several documents in a row."""
    return {context: prepared.stream(seed=0).batch(0, 4, context) for context in (24, 48)}


@pytest.fixture
def no_second_time():
    """Compiling again what is compiled is an error."""
    import torch._dynamo

    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def train(models, batch_of_step, checkpointing=False):
    """The losses and gradient norms of steps, of each model; all from the weights of the first, step by step, since a
    choice of an expert that once falls otherwise is not made up for."""
    strategy, said = Parallelism(), [[] for _ in models]
    optimizers = [torch.optim.SGD([{"params": p, "initial_lr": 0.1} for p in decay_groups(model)]) for model in models]
    for step, (batch, factor) in enumerate(batch_of_step):
        start = {name: tensor.clone() for name, tensor in models[0].state_dict().items()}
        for model, optimizer, own in zip(models, optimizers, said, strict=True):
            model.load_state_dict(start)
            model.activation_checkpointing = checkpointing
            model.set_factors({"hebbian_loss": factor})
            result = training_step(model, optimizer, strategy, batch, step=step, micro_batch=2, precision="fp32",
                                   max_norm=1.0, learning_rate_factor=1.0)
            own.append([float(result.loss.value), float(result.gradient_norm),
                        *(float(value) for value in result.auxiliary.values())])
    return [torch.tensor(own, dtype=torch.float64) for own in said]


@pytest.mark.parametrize(("layers", "lengths", "checkpointing"), [
    ("[memory, memory]", [24, 24], False),
    pytest.param("[attention]", [24, 48], True, marks=pytest.mark.slow),
    pytest.param("[memory, attention, memory]", [24, 48], True, marks=pytest.mark.slow)])
def test_ten_steps_and_a_change_of_stage_as_in_eager_pytorch(make_model, batches, no_second_time, layers,
                                                             lengths, checkpointing):
    """In fp64, where rounding hardly ever flips a digit or a choice: every loss and the gradient's norm of every step,
    and each parameter at the end."""
    stages = [(batches[lengths[0]], 1.0)] * 5 + [(batches[lengths[1]], 0.5)] * 5
    settings = ("linear=bitlinear", BRAIN, "blocks.memory.feed_forward.router.refresh_steps=3", f"layers={layers}")
    eager, model, said = make_model(*settings, dtype=torch.float64), make_model(*settings, dtype=torch.float64), []
    assert "will be compiled" in compile_blocks(model, "on", CPU, said.append, backend="aot_eager")
    plain, fast = train([eager, model], stages, checkpointing)
    assert not said
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-6)  # one digit that falls otherwise is 1e-4
    for (name, own), wanted_own in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(own, wanted_own, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    kinds = {id(block.forward.kind): block.forward.kind for block in model.layers}
    # one for each length, for all blocks that are alike
    assert all(len(kind.code) == len(set(lengths)) for kind in kinds.values())


@pytest.mark.parametrize("name", ["tiny", pytest.param("5090", marks=pytest.mark.slow),
                                  pytest.param("full", marks=pytest.mark.slow)])
def test_no_shipped_spec_compiles_anything_twice(registry, no_second_time, name):
    """Ten steps, five each of two stages: the length, objectives' factors, routers that look at their experts anew.
    What counts as new is the tracer's business alone: what it gives the compiler is run as it is (`eager`)."""
    settings = [value for value in SPECS[name] if value != "heads=[]"]
    model = initialise(assemble(load_spec(name, registry, [*settings, "vocab_size=300"])), "cpu", 0)
    said, generator = [], torch.Generator().manual_seed(0)
    compile_blocks(model, "on", CPU, said.append, backend="eager")
    model.activation_checkpointing = name != "tiny"

    def drawn(context):
        ids_BT = torch.randint(300, (2, context), generator=generator)
        return Batch(ids_BT, ids_BT, (torch.rand(2, context, generator=generator) < 0.1).cumsum(1).to(torch.int32), 0)

    (losses,) = train([model], [(drawn(48), 1.0) for _ in range(5)] + [(drawn(96), 0.5) for _ in range(5)])
    assert not said and losses.isfinite().all()
    (head,) = model.heads.values()
    places = [*(block.forward for block in model.layers), head.draft]
    assert len({id(place.kind) for place in places}) == 3
    assert all(len(place.kind.code) == 2 for place in places)  # one for each length


def test_what_auto_means():
    assert not wanted("auto", CPU) and wanted("on", CPU)
    assert wanted("auto", torch.device("cuda")) and not wanted("off", torch.device("cuda"))


def test_a_block_that_cannot_be_compiled_goes_on_as_it_is_and_says_so(make_model, batches):
    def break_in(model):
        layer = model.layers[1].mixer.layer
        layer.q_norm = lambda q: q * 1 if q.detach().max() < 1e6 else q * 2  # the host looks
        layer.k_norm = lambda k: k
        return model

    stages = [(batches[24], 1.0)] * 2
    eager, model, said = break_in(make_model()), break_in(make_model()), []
    compile_blocks(model, "on", CPU, said.append, backend="eager")
    plain, got = train([eager, model], stages)
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-6)
    assert len(said) == 1 and said[0].startswith("warning: layers 1: goes on uncompiled: ") and "\n" not in said[0]
    assert model.layers[1].forward.kind.refused and not model.layers[0].forward.kind.refused


def test_without_gradients_and_with_a_state_nothing_is_compiled_on_a_cpu(make_model, batches):
    model = make_model()
    ids = batches[24].ids_BT
    before = model.eval()(ids)
    compile_blocks(model, "on", CPU, backend="eager")
    with torch.no_grad():
        assert torch.equal(model(ids), make_model().eval()(ids)) and before.shape == (*ids.shape, 300)
    state = model.new_state(4)
    model(ids, state=state)
    assert all(isinstance(block.forward, Compiled) and not block.forward.kind.code for block in model.layers)


def test_a_lost_gradient_is_noticed_whatever_its_size(make_model, batches):
    """One parameter at a time gets none, and the check names it."""
    model = make_model(BRAIN)
    block, docs = model.layers[0].train(), batches[24].doc_ids_BT
    for module in block.modules():
        if hasattr(module, "before_step"):
            module.before_step(0)
    streams = model.layers[0].mixer.residual.expand(torch.randn(4, 24, 32))
    eager = type(block).forward
    assert differs(block, eager, eager, streams, None, docs) is None

    def losing(name):
        def run(block, *given):
            owner, _, own = name.rpartition(".")
            held = block.get_submodule(owner)._parameters
            kept = held[own]
            held[own] = kept.detach()
            try:
                return eager(block, *given)
            finally:
                held[own] = kept
        return run

    names = [name for name, _ in block.named_parameters()]
    noticed = [name for name in names if differs(block, eager, losing(name), streams, None, docs) is not None]
    assert noticed == names


    def larger(*given):
        out, report = eager(*given)
        return out * 1.1, report

    assert differs(block, eager, larger, streams, None, docs) == "its output"


@pytest.mark.parametrize("layer", [0, 1])
def test_in_bf16_it_passes_the_same_check(make_model, batches, layer):
    """Under autocast, as on a card: the products of integers, the rotation, the scan."""
    model = make_model("linear=bitlinear", BRAIN).train()
    block, docs = model.layers[layer], batches[48].doc_ids_BT
    for module in block.modules():
        if hasattr(module, "before_step"):
            module.before_step(0)
    streams = model.layers[0].mixer.residual.expand(torch.randn(4, 48, 32)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert differs(block, type(block).forward, compiled(type(block).forward, "eager"), streams, None, docs) is None
