"""What the planner says of a compiled block's memory, beside what the compiled block itself keeps for its backward
pass, tensor by tensor."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tryplicity.model import assemble, initialise
from tryplicity.planner.compiled import passes_of
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
