"""The code that torch's compiler writes for the blocks of each shipped spec, at small widths: the output and the
gradient of each parameter, one by one, as eager PyTorch's. A minute or more for each kind of block."""

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


@pytest.fixture(params=SPECS)
def model(request, registry):
    """In fp64, where rounding hardly ever flips a digit or a choice, every value away from the initial one."""
    spec = load_spec(request.param, registry, SPECS[request.param])
    model = initialise(assemble(spec), "cpu", 0).to(torch.float64).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    for module in model.modules():
        if hasattr(module, "before_step"):
            module.before_step(7)
    return model


def gradients(run, block, streams, docs_BT):
    x = streams.clone().requires_grad_()
    out, report = run(block, x, None, docs_BT)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    loss = (out * weights).sum() + 1e3 * sum(report.losses.values())
    return [out.detach(), *torch.autograd.grad(loss, [x, *block.parameters()])], report


@pytest.mark.slow
def test_each_kind_of_block_has_the_gradients_of_eager_pytorch(model):
    generator = torch.Generator().manual_seed(2)
    x_BTD = torch.randn(2, model.spec.context_length, model.spec.hidden_size, generator=generator)
    streams = model.layers[0].mixer.residual.expand(x_BTD.double())
    docs_BT = (torch.rand(x_BTD.shape[:2], generator=generator) < 0.02).cumsum(1).to(torch.int32)
    assert len(kinds_of(model)) == 2 and docs_BT.max() > 2
    for first, *alike in kinds_of(model):
        fast = compiled(type(model.layers[first]).forward)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for block in [model.layers[i] for i in (first, *alike[:1])]:
                wanted, report = gradients(type(block).forward, block, streams, docs_BT)
                got, said = gradients(fast, block, streams, docs_BT)
                names = ["output", "input", *(name for name, _ in block.named_parameters())]
                for name, own, right in zip(names, got, wanted, strict=True):
                    assert right.norm() > 0, name
                    assert own.norm().item() == pytest.approx(right.norm().item(), rel=1e-4), name
                    assert (own - right).norm() <= 2e-3 * right.norm(), name
                assert said.stats.keys() == report.stats.keys()
                for name, stat in report.stats.items():
                    torch.testing.assert_close(said.stats[name].value, stat.value, rtol=1e-3, atol=1e-4)
        assert differs(block, type(block).forward, fast, streams, None, docs_BT) is None
