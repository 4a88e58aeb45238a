"""What training does in C against the PyTorch beside it in fp64: values, gradients, documents, threads."""

from __future__ import annotations

import pytest
import torch

from tryplicity_plugins.layers import fused, norms, ssd
from tryplicity_plugins.layers.activations import SiLU, activated
from tryplicity_plugins.layers.recurrent import conv_masks


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def both(run, *inputs):
    """Outputs and gradients in fp32, which C computes, and in fp64, which PyTorch does; and what C did."""
    found, asked = [], []
    for dtype in (torch.float32, torch.float64):
        own = [x.detach().clone().to(dtype).requires_grad_() for x in inputs]
        outputs = run(*own)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [rand(*out.shape, seed=7 + i).to(dtype) for i, out in enumerate(outputs)]
        found.append([*outputs, *torch.autograd.grad(outputs, own, grads)])
        asked.append(fused.readable(*own))
    assert asked == [True, False]
    return found


def agree(fp32, fp64):
    for i, (ours, truth) in enumerate(zip(fp32, fp64, strict=True)):
        atol = 2e-5 * float(truth.abs().max() + 1)
        torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=atol, msg=str(i))


@pytest.fixture
def counted(monkeypatch):
    """How often C was called."""
    calls, real = [], fused.native.function

    def counting(name, signature):
        in_c = real(name, signature)
        return in_c and (lambda *arguments: calls.append(name) or in_c(*arguments))

    monkeypatch.setattr(fused.native, "function", counting)
    return calls


@pytest.mark.parametrize("shape", [(1, 8), (3, 130), (2, 70, 33)])
def test_rms_norm(shape, counted):
    agree(*both(lambda x, w: norms._RMSNorm.apply(x, w, 1e-6), rand(*shape), rand(shape[-1]) + 1))
    assert counted == ["rms_norm_forward", "rms_norm_backward"]


@pytest.mark.parametrize("shape", [(1, 2), (5, 26), (2, 9, 64)])
def test_gated_silu(shape, counted):
    silu = SiLU(SiLU.Config(), shape[-1] // 2)
    agree(*both(lambda x: activated(silu, x, gate=True)[0], 3 * rand(*shape)))
    assert counted == ["gated_silu_forward", "gated_silu_backward"]


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("time, lead", [(1, 0), (2, 0), (9, 0), (9, 1), (9, 3), (70, 8)])
@pytest.mark.parametrize("documents", [False, True])
def test_conv_silu(width, time, lead, documents, counted):
    sizes, batch = [11, 8, 5], 2
    runs_BT = torch.randint(0, 2, (batch, time), generator=torch.Generator().manual_seed(time)).cumsum(1)
    same = conv_masks(runs_BT, width) if documents else None
    x = rand(batch, time, sum(sizes) + 7)  # a part of a wider projection, as the layer gives it

    def run(x, w, b):
        return ssd.conv_silu(x[..., 3:-4], w, b, sizes=sizes, lead=lead, same_BWT=same)

    agree(*both(run, x, rand(width, sum(sizes)), rand(sum(sizes))))
    assert counted == ["conv_silu_forward", "conv_silu_backward"]


def test_a_wide_convolution_is_pytorchs(counted):
    agree(*both(lambda x, w, b: ssd.conv_silu(x, w, b, sizes=[9]), rand(1, 12, 9), rand(6, 9), rand(9)))
    assert counted == []


@pytest.mark.parametrize("groups", [1, 3])
def test_gated_norm(groups, counted):
    batch, time, heads, dim = 2, 37, 6, 5

    def run(y, x, D, z, w):
        return ssd.gated_norm(y[:, :time], x, D, z[..., 2:-1], w, groups=groups)

    agree(*both(run, rand(batch, time + 3, heads, dim), rand(batch, time, heads, dim), rand(heads),
                rand(batch, time, heads * dim + 3), rand(heads * dim)))
    assert counted == ["gated_norm_forward", "gated_norm_backward"]


@pytest.mark.parametrize("time, chunk, groups", [(1, 64, 1), (64, 16, 2), (45, 16, 1), (33, 64, 4)])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("start", [False, True])
def test_scan(time, chunk, groups, documents, start, counted):
    batch, heads, dim, state = 2, 4, 5, 6
    runs = (torch.randint(0, 2, (batch, time), generator=torch.Generator().manual_seed(time)).cumsum(1)
            if documents else None)

    def run(x, dt, A, B, C, S):
        return ssd.scan(x, dt.exp() / 9, -A.exp(), B, C, chunk=chunk, start_BHPN=S if start else 0 * S, runs_BT=runs)

    agree(*both(run, rand(batch, time, heads, dim), rand(batch, time, heads), rand(heads),
                rand(batch, time, groups, state), rand(batch, time, groups, state, seed=1),
                rand(batch, heads, dim, state)))
    assert counted and set(counted) == {"scan_mixing", "scan_mixing_backward", "scan_rows_backward"}


def test_threads_change_no_bit():
    """Work large enough to be shared."""
    x, w = rand(700, 257), rand(257)
    conv, taps, z = rand(3, 400, 96), rand(4, 96), rand(3, 400, 96)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            own = [t.clone().requires_grad_() for t in (x, w, conv, taps, z)]
            outputs = [norms._RMSNorm.apply(own[0], own[1], 1e-6), *ssd.conv_silu(own[2], own[3], torch.zeros(96),
                                                                                 sizes=[64, 32]),
                       ssd.gated_norm(own[4].unflatten(-1, (4, 24)), own[2].unflatten(-1, (4, 24)), torch.ones(4),
                                      own[4], torch.ones(96))]
            found.append([*outputs, *torch.autograd.grad([o.square().sum() for o in outputs], own)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
