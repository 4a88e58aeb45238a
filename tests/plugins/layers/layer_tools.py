"""Sites and modules for the tests of single layers: assembled as a model is, on meta, then filled."""

from collections import defaultdict
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch

from tryplicity import Part, Site


def site(hidden=32, layers=4, layer=0, sublayer=0, context=64, vocab=50, linear=None, norm=None):
    from tryplicity_plugins.layers.linear import PlainLinear
    from tryplicity_plugins.layers.norms import RMSNorm

    linear, norm = linear or PlainLinear, norm or RMSNorm
    return Site(hidden_size=hidden, vocab_size=vocab, context_length=context, layers=layers, layer=layer,
                sublayer=sublayer, linear_part=part(linear), norm_part=part(norm))


def part(cls, **options):
    return Part(cls, cls.Config(**options))


def assemble(build, seed=0, dtype=torch.float32, spread=None):
    """build() on the meta device, memory, NaN everywhere, reset_parameters; nothing may be left NaN.

    spread: then draw all parameters anew with this standard deviation around where they were, so that no term
    is hidden by a zero or a one.
    """
    with torch.device("meta"):
        module = build()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        torch.manual_seed(seed)
        for child in module.modules():
            if hasattr(child, "reset_parameters"):
                child.reset_parameters()
        for tensor in (*module.parameters(), *module.buffers()):
            assert not (tensor.is_floating_point() and tensor.isnan().any())
        if spread:
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=spread)
    return module.to(dtype)


def gradients(output, wanted):
    """Gradients of a fixed random projection of `output` with respect to `wanted`."""
    torch.manual_seed(99)
    return torch.autograd.grad((output * torch.randn_like(output)).sum(), wanted)


def assert_same(actual, expected, tolerance):
    """Both sequences of tensors agree to `tolerance`, relative to the largest expected entry."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * e.abs().max().item())


def surroundings():
    """Every context a layer must run in, by name: (context, the dtype of the parameters)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return {"plain": (nullcontext(), torch.float32), "bf16": (nullcontext(), torch.bfloat16),
            "autocast": (torch.autocast("cpu", torch.bfloat16), torch.float32),
            "fake": (FakeTensorMode(), torch.float32), "meta": (torch.device("meta"), torch.float32)}


def runs_everywhere(build, call, *inputs):
    """Forward, checkpointed forward and backward in every surrounding; every parameter gets a gradient of its
    own dtype, finite where it is real. call(module, *inputs) -> a tensor."""
    from torch.utils.checkpoint import checkpoint

    for name, (context, dtype) in surroundings().items():
        with context:
            if name in ("fake", "meta"):
                module = build()
            else:
                module = assemble(build, dtype=dtype)
            given = [torch.randn(i.shape, dtype=dtype, requires_grad=True) if i.is_floating_point()
                     else i if name in ("plain", "bf16", "autocast") else torch.zeros(i.shape, dtype=i.dtype)
                     for i in inputs]
            for run in (call, lambda *a: checkpoint(call, *a, use_reentrant=False)):
                module.zero_grad()
                output = run(module, *given)
                output.float().square().sum().backward()
                for key, parameter in module.named_parameters():
                    assert parameter.grad is not None, (name, key)
                    assert parameter.grad.dtype == parameter.dtype, (name, key)
                    if name not in ("fake", "meta"):
                        assert parameter.grad.isfinite().all(), (name, key)
                assert output.dtype in (dtype, torch.bfloat16, torch.float32), name


@contextmanager
def without_native():
    """The layers without their C++, as on a machine that has no compiler."""
    from tryplicity_plugins.layers import native

    with mock.patch.object(native, "_functions", defaultdict(lambda: None)):
        yield


@contextmanager
def threads(count):
    """With so many threads for torch and the layers' C++."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def as_a_compiler_sees_them():
    """The layers take the forms that they have for torch's compiler, here in eager PyTorch: exact and quick to test."""
    with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
        yield
