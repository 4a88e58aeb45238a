"""The code that torch's compiler writes for the blocks of each shipped spec, at small widths: the output, and the
gradient of each parameter one by one, are eager PyTorch's to 1e-4. With that code a minute or more a kind of block.

Numbers that are rounded to digits cannot be compared in fp32: a rounding error flips a digit of some token. So the
blocks are compared in fp32 with plain linears, and in fp64 with ternary ones. There, too, a value is now and then
exactly between two digits (over the largest of its token it is a ratio of small integers: of spikes, of the values of
a text's first token), and which it becomes is chance. Eager PyTorch alone says which tokens these are, and they are
drawn again: less than one in a hundred.
"""

import pytest
import torch

from tryplicity.model import assemble, initialise
from tryplicity.spec import load_spec
from tryplicity.training.compiling import compiled, differs, kinds_of

MIXTURE = ["experts=16", "inner_size=32", "shared_inner_size=32"]
SMALL = ["hidden_size=64", "vocab_size=300", "expect=null", "blocks.memory.mixer.state_size=16",
         "blocks.memory.mixer.head_dim=16", "blocks.attention.mixer.heads=4", "blocks.attention.mixer.kv_heads=2",
         "blocks.attention.mixer.head_dim=16", "heads=[]",
         *(f"blocks.{block}.feed_forward.{value}" for block in ("memory", "attention") for value in MIXTURE)]
SPECS = {"tiny": [], "5090": [*SMALL, "context_length=512"], "full": [*SMALL, "context_length=512"]}
#: what is added to inputs and digits of a block, and an output that moves by more is at a jump
JUMPS = {torch.float32: (2e-6, 2e-4), torch.float64: (1e-9, 1e-6)}
SPIKING = {"tiny": ["memory"], "5090": ["memory", "attention"], "full": ["memory", "attention"]}


def settings(name, dtype):
    """In fp32 also a rectangle for the derivative of a spike whose edges are far away, since the gradient jumps there.
    In fp64 enough tokens for attention by blocks: torch 2.11 compiles none under one mask, and says so when it runs."""
    if dtype == torch.float64:
        return [*SPECS[name], "context_length=512"]
    return [*SPECS[name], "linear=linear", *(f"blocks.{block}.feed_forward.activation.bandwidth=100"
                                             for block in SPIKING[name])]


def gradients(run, block, streams, docs_BT):
    x = streams.clone().requires_grad_()
    out, report = run(block, x, None, docs_BT)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    loss = (out * weights).sum() + 1e3 * sum(report.losses.values())
    return [out.detach(), *torch.autograd.grad(loss, [x, *block.parameters()])], report


def away_from_jumps(block, expand, x_BTD, docs_BT, generator, monkeypatch):
    """x, expanded, and how many tokens had to be drawn again for it, since their digits or choices hang by a hair."""
    small, large = JUMPS[x_BTD.dtype]
    noise, round_ = torch.randn(x_BTD.shape, generator=generator, dtype=x_BTD.dtype), torch.Tensor.round_

    def moved(by):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(torch.Tensor, "round_", lambda x: round_(x.add_(by)))
            return block.train()(expand(x_BTD + by * noise), None, docs_BT)[0]

    x_BTD, drawn = x_BTD.clone(), 0
    for _ in range(20):
        jumps_BT = (moved(small) - moved(-small)).abs().flatten(2).amax(-1) > large
        if not jumps_BT.any():
            return expand(x_BTD), drawn
        drawn += int(jumps_BT.sum())
        x_BTD[jumps_BT] = torch.randn(int(jumps_BT.sum()), x_BTD.shape[-1], generator=generator, dtype=x_BTD.dtype)
    raise AssertionError(f"{drawn} tokens drawn, and {int(jumps_BT.sum())} are at a jump")


@pytest.mark.parametrize(("name", "dtype", "backend"), [
    ("tiny", torch.float32, "eager"),  # the tracing alone, which loses gradients first, and of fp32 where of no fp64
    *(pytest.param(name, dtype, "inductor", marks=pytest.mark.slow) for name in SPECS for dtype in JUMPS)], ids=str)
def test_each_kind_of_block_has_the_gradients_of_eager_pytorch(name, dtype, backend, registry, monkeypatch):
    model = initialise(assemble(load_spec(name, registry, settings(name, dtype))), "cpu", 0).to(dtype).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # every value away from the initial one
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    for module in model.modules():
        if hasattr(module, "before_step"):
            module.before_step(7)
    x_BTD = torch.randn(2, model.spec.context_length, model.spec.hidden_size, generator=generator, dtype=dtype)
    docs_BT = (torch.rand(x_BTD.shape[:2], generator=generator) < 0.02).cumsum(1).to(torch.int32)
    assert len(kinds_of(model)) == 2 and docs_BT.max() > 2
    for first, *alike in kinds_of(model):
        fast = compiled(type(model.layers[first]).forward, backend)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for block in [model.layers[i] for i in (first, *alike[:1])]:
                streams, drawn = away_from_jumps(block, block.residual.expand, x_BTD, docs_BT, generator, monkeypatch)
                assert drawn < docs_BT.numel() / 100
                wanted, report = gradients(type(block).forward, block, streams, docs_BT)
                got, said = gradients(fast, block, streams, docs_BT)
                names = ["output", "input", *(name for name, _ in block.named_parameters())]
                for tensor, own, right in zip(names, got, wanted, strict=True):
                    assert right.norm() > 0, tensor
                    assert own.norm().item() == pytest.approx(right.norm().item(), rel=1e-4), tensor
                    assert (own - right).norm() <= 1e-4 * right.norm(), tensor
                    assert (own - right).abs().max() <= 1e-4 * right.abs().max(), tensor
                assert said.stats.keys() == report.stats.keys()
                for key, stat in report.stats.items():
                    torch.testing.assert_close(said.stats[key].value, stat.value, rtol=1e-4, atol=1e-5)
                assert differs(block, type(block).forward, fast, streams, None, docs_BT) is None
