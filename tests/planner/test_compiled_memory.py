"""What the planner says of a compiled block's memory, beside what the compiled block itself keeps for its backward
pass, tensor by tensor."""

import pytest
import torch
from planning_tools import DENSE, make_model
from torch.autograd.graph import saved_tensors_hooks

from tryplicity.hardware import load_hardware
from tryplicity.model import assemble, initialise
from tryplicity.planner import plan
from tryplicity.planner.compiled import passes_of
from tryplicity.planner.stages import measure_stages
from tryplicity.spec import load_spec
from tryplicity.training.compiling import compiled, kinds_of

SMALL = ["hidden_size=64", "vocab_size=300", "expect=null", "context_length=128", "heads=[]",
         "blocks.memory.mixer.state_size=16", "blocks.memory.mixer.head_dim=16", "blocks.attention.mixer.heads=4",
         "blocks.attention.mixer.kv_heads=2", "blocks.attention.mixer.head_dim=16",
         *(f"blocks.{block}.feed_forward.{value}" for block in ("memory", "attention")
           for value in ("experts=16", "inner_size=32", "shared_inner_size=32"))]


def held(block, backend, x_BTD, docs_BT):
    """Bytes of what one forward pass leaves for the backward pass, its output included, beside weights and input."""
    saved, streams = {}, block.residual.expand(x_BTD).detach().requires_grad_()
    given = {t.untyped_storage()._cdata for t in (streams, docs_BT, *block.parameters(), *block.buffers())}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    run = compiled(type(block).forward, backend)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out, _ = run(block, streams, None, docs_BT)
    saved[out.untyped_storage()._cdata] = out.untyped_storage().nbytes()
    return sum(size for storage, size in saved.items() if storage not in given), streams, out


@pytest.mark.parametrize(("name", "settings", "layer", "backend"), [
    ("tiny", ["context_length=128"], 3, "aot_eager_decomp_partition"),
    *(pytest.param(name, settings, layer, "inductor", marks=pytest.mark.slow)
      for name, settings, attention in (("tiny", [], 3), ("5090", SMALL, 7)) for layer in (0, attention))])
def test_what_is_kept_is_what_the_compiled_block_keeps(registry, name, settings, layer, backend):
    spec = load_spec(name, registry, settings)
    planned, model = assemble(spec), initialise(assemble(spec), "cpu", 0).train()
    assert len(kinds_of(model)) == 2
    block = model.layers[layer]
    for module in block.modules():
        if hasattr(module, "before_step"):
            module.before_step(0)
    x_BTD = torch.randn(2, spec.context_length, spec.hidden_size, generator=torch.Generator().manual_seed(0))
    docs_BT = torch.zeros(2, spec.context_length, dtype=torch.int64)
    real, streams, out = held(block, backend, x_BTD, docs_BT)
    passes = passes_of(planned.layers[layer], None, streams.shape, streams.dtype, docs_BT.shape, None)
    assert real <= passes.kept <= 1.1 * real
    assert passes.output == out.nbytes <= passes.kept <= passes.forward and passes.kept <= passes.backward


ATTENTION = ["layers=[attention]", "context_length=64", "heads=[]", "brain=[]", "phases=[]"]


@pytest.mark.parametrize(("name", "settings"), [
    ("tiny", ATTENTION), pytest.param("tiny", ["context_length=512"], marks=pytest.mark.slow),
    *(pytest.param(name, [], marks=pytest.mark.slow) for name in ("5090", "full"))])
def test_blocks_take_at_most_what_is_said_without_asking_the_compiler(registry, name, settings):
    """In bf16 and at full widths, with checkpointing and without."""
    model = assemble(load_spec(name, registry, settings))
    for checkpointing in ("true", "false"):
        profile = load_hardware("5090", registry, [f"activation_checkpointing={checkpointing}"])
        most, compiled, eager = (measure_stages(model, profile, "fp32", False, blocks)[1:-1]
                                 for blocks in ("at most", "larger", "eager"))
        for bound, larger, plain in zip(most, compiled, eager, strict=True):
            assert plain.kept <= larger.kept <= bound.kept and plain.forward <= larger.forward <= bound.forward
            ends = [cost.backward + cost.made_at_peak for cost in (plain, larger, bound)]
            assert ends == sorted(ends)
            assert (plain.flops_backward, plain.made) == (larger.flops_backward, larger.made)


def one_block(registry, *settings):
    return make_model(registry, DENSE, "layers=[attention]", *settings)


def planned(model, registry, *settings):
    """On one card without overhead to speak of beside what is at stake."""
    profile = load_hardware("5090", registry, ["batch=256", "accumulation=1", "activation_checkpointing=false",
                                               *settings])
    return plan(model, profile, registry)


def test_the_compiler_is_asked_where_the_verdict_hangs_on_it(registry, capfd):
    model = one_block(registry)
    roomy = planned(model, registry)
    assert roomy.fits and roomy.blocks == "eager" and not capfd.readouterr().err
    least, most = roomy.chosen.memory.total, roomy.compiled.total
    assert least < most and roomy.as_dict()["memory"]["compiled_at_most_gb"] == most / 1e9

    asked = planned(model, registry, f"memory_gb={(most - 1e6) / 1e9}")  # a megabyte less than would do in any case
    assert asked.fits and asked.blocks == "larger" and asked.compiled is None
    assert least <= asked.chosen.memory.total < most
    assert "torch's compiler is asked" in (said := capfd.readouterr().err) and "the compiler took" in said
    assert asked.as_dict()["memory"]["compiled_at_most_gb"] is None

    size = asked.chosen.memory.total
    assert size > least + 1e6 and not planned(model, registry, f"memory_gb={(size - 1e6) / 1e9}").fits
    small = planned(model, registry, f"memory_gb={(least - 1e6) / 1e9}")  # eager blocks do not fit
    assert not small.fits and small.blocks == "eager"


def test_where_nothing_is_compiled_only_eager_blocks_are_planned(registry):
    off = planned(one_block(registry, "training.compile=off"), registry)
    cpu = plan(one_block(registry), load_hardware("cpu", registry, []), registry)
    assert (off.blocks, off.compiled) == (cpu.blocks, cpu.compiled) == ("eager", None)


def test_any_number_of_shapes_is_traced_and_what_cannot_be_stays_eager(registry):
    model = one_block(registry)
    block = model.layers[0]
    with torch._dynamo.config.patch(recompile_limit=1):
        one, two = (passes_of(block, None, torch.Size((1, 128, 64)), torch.float32, torch.Size((1, 128)), autocast)
                    for autocast in (None, torch.bfloat16))
    assert two.kept < one.kept
    norm = block.mixer.norm.forward
    block.mixer.norm.forward = lambda x: (torch._dynamo.graph_break(), norm(x))[1]
    eager, compiled = (measure_stages(model, load_hardware("5090", registry, []), "fp32", True, blocks)
                       for blocks in ("eager", "compiled"))
    assert compiled == eager
