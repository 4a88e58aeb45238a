"""The closed form against the memory that a real training step really takes."""

from pathlib import Path

import pytest
import torch
from planning_tools import CPU, DENSE, EVERYTHING, HYBRID, like, make_spec
from torch.profiler import ProfilerActivity, profile

from tryplicity import load_plugins
from tryplicity.data.packing import Batch
from tryplicity.model import assemble
from tryplicity.planner import plan
from tryplicity.training.step import decay_groups, training_step
from tryplicity.world import World


def real_peak(registry, spec, hardware):
    """Bytes of weights, state and buffers, and the highest sum of the allocator's events in the third step."""
    strategy = registry.part("parallelism", "single").build()
    model = strategy.place(assemble(spec), World(), 0).train()
    model.activation_checkpointing = hardware.activation_checkpointing
    optimizer = spec.training.optimizer.build().build(*decay_groups(model))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]

    def step():
        rows = hardware.batch * hardware.accumulation
        ids = torch.randint(0, spec.vocab_size, (rows, spec.context_length))
        batch = Batch(ids, ids.roll(-1, 1), torch.zeros_like(ids), 0)
        training_step(model, optimizer, strategy, batch, step=1, micro_batch=hardware.batch, precision="fp32",
                      max_norm=1.0, learning_rate_factor=1.0)

    step()
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    held = [*model.parameters(), *model.buffers()]
    held += [v for state in optimizer.state.values() for v in state.values()]
    return peak + sum(t.numel() * t.element_size() for t in held)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(("text", "settings"), [
    (DENSE, ()), (HYBRID, ()), (HYBRID, EVERYTHING),
    (HYBRID, (*EVERYTHING, "blocks.memory.shared=m", "layers=[memory, attention, memory, memory]"))],
                         ids=["dense", "hybrid", "everything", "shared"])
def test_planned_peak_is_within_five_percent_of_the_real_one(registry, text, settings, checkpointing, accumulation):
    hardware = like(CPU, activation_checkpointing=checkpointing, accumulation=accumulation)
    spec = make_spec(registry, text, *settings)
    memory = plan(assemble(spec), hardware, registry).nearest.memory
    planned = memory.total - memory.parts["overhead"]
    assert planned == pytest.approx(real_peak(registry, spec, hardware), rel=0.05)


@pytest.fixture(scope="module")
def strange():
    """What is installed, and a stranger's plugin."""
    return load_plugins([str(Path(__file__).parent / "strange_layers.py")]).registry


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("mixer", [
    "long_convolution", "lru", "convolutions", "written_out", "{type: recurrent, kind: GRU}",
    "{type: recurrent, kind: RNN}", "{type: recurrent, kind: GRU, batch_first: false}",
    "{type: recurrent, kind: LSTM}", "{type: recurrent, kind: LSTM, batch_first: false}"])
def test_operations_of_other_layers_are_planned_as_well(strange, mixer, checkpointing):
    """Wide enough that what the layer does is most of what there is."""
    hardware = like(CPU, activation_checkpointing=checkpointing, batch=8)
    spec = make_spec(strange, DENSE, "hidden_size=96", "layers=[{repeat: 3, of: strange}]",
                     f"blocks={{strange: {{mixer: {mixer}}}}}")
    memory = plan(assemble(spec), hardware, strange).nearest.memory
    planned = memory.total - memory.parts["overhead"]
    assert planned == pytest.approx(real_peak(strange, spec, hardware), rel=0.05)
