"""The forms that layers have for a compiler beside the hand-written ones: the same values and gradients, in fp64."""

import pytest
import torch

from tests.plugins.layers.layer_tools import as_a_compiler_sees_them, assemble, gradients, part, site
from tryplicity import output_and_report
from tryplicity_plugins.brain.dynamic_sparsity import DynamicSparsityRouter
from tryplicity_plugins.brain.lateral_inhibition import LateralInhibition
from tryplicity_plugins.brain.spike import Spike
from tryplicity_plugins.layers.activations import SiLU
from tryplicity_plugins.layers.attention import GroupedQueryAttention
from tryplicity_plugins.layers.bitlinear import BitLinear
from tryplicity_plugins.layers.hyper_connections import HyperConnections
from tryplicity_plugins.layers.linear import PlainLinear
from tryplicity_plugins.layers.mamba2 import Mamba2
from tryplicity_plugins.layers.masked_attention import Scores, masked_attention
from tryplicity_plugins.layers.moe import MixtureOfExperts
from tryplicity_plugins.layers.norms import RMSNorm
from tryplicity_plugins.layers.router import TopKRouter
from tryplicity_plugins.layers.ssd import scan


def both(run, inputs, parameters=()):
    """[output, ...] and the gradients of `run(*inputs)`, as it is and as a compiler sees it."""
    found = []
    for seen in (False, True):
        given = [i.clone().requires_grad_() if i.is_floating_point() else i for i in inputs]
        if seen:
            with as_a_compiler_sees_them():
                out = run(*given)
                grads = gradients(out.contiguous(), [*(g for g in given if g.requires_grad), *parameters])
        else:
            out = run(*given)
            grads = gradients(out.contiguous(), [*(g for g in given if g.requires_grad), *parameters])
        found.append([out.detach(), *grads])
    return zip(*found, strict=True)


def assert_alike(pairs, tolerance=1e-9):
    for own, seen in pairs:
        torch.testing.assert_close(seen, own, rtol=tolerance, atol=tolerance * own.abs().max().item())


def tokens(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def documents(rows, time):
    return (torch.rand(rows, time, generator=torch.Generator().manual_seed(1)) < 0.15).cumsum(1)


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("with_start", [False, True])
@pytest.mark.parametrize(("time", "chunk"), [(37, 8), (16, 16), (64, 16), (5, 64)])
def test_the_scan(time, chunk, with_start, with_documents):
    B, H, P, G, N = 2, 4, 4, 2, 8
    runs = documents(B, time) if with_documents else None

    def run(x, dt, A, Bs, Cs, *start):
        y, last = scan(x, dt.exp() / 8, -A.exp(), Bs, Cs, chunk=chunk, start_BHPN=start[0] if start else None,
                       runs_BT=runs)
        return torch.cat([y.flatten(), last.flatten()])

    start = [tokens(B, H, P, N)] if with_start else []
    assert_alike(both(run, [tokens(B, time, H, P), tokens(B, time, H), tokens(H), tokens(B, time, G, N),
                            tokens(B, time, G, N).flip(1), *start]))


LAYERS = {
    "mamba2": lambda: Mamba2(Mamba2.Config(state_size=8, head_dim=8, groups=2, chunk=8), site()),
    "mamba2 as published": lambda: Mamba2(Mamba2.Config(
        state_size=8, head_dim=8, heads=6, norm_groups=3, conv_bias=False, bias=True, dt_limit_min=0.02,
        multipliers=[0.5, 1.5, 0.7, 1.2, 0.9], chunk=8), site()),
    "mamba2 without norm": lambda: Mamba2(Mamba2.Config(state_size=8, head_dim=8, norm=False, chunk=8), site()),
    "gqa": lambda: GroupedQueryAttention(GroupedQueryAttention.Config(heads=4, kv_heads=2, qk_norm=True), site()),
    "mixture": lambda: MixtureOfExperts(MixtureOfExperts.Config(
        experts=6, inner_size=16, activation=part(Spike), router=part(
            DynamicSparsityRouter, min_experts=1, max_experts=4, mean_experts=2,
            inhibition=part(LateralInhibition))), site()),
    "ternary mixture": lambda: MixtureOfExperts(MixtureOfExperts.Config(
        experts=6, inner_size=16, activation=part(SiLU), router=part(TopKRouter)), site(linear=BitLinear)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_documents(name):
    layer = assemble(LAYERS[name], dtype=torch.float64, spread=0.1)
    docs = documents(2, 40)

    def run(x):
        out, report = output_and_report(layer(x, doc_ids=docs))
        return out + sum(report.losses.values())

    # a router, and what is gathered and combined, are in fp32
    tolerance = 1e-5 if "mixture" in name else 1e-6 if name == "gqa" else 1e-9
    assert_alike(both(run, [tokens(2, 40, 32)], list(layer.parameters())), tolerance)


@pytest.mark.parametrize("dynamic", [False, True])
def test_hyper_connections(dynamic):
    layer = assemble(lambda: HyperConnections(HyperConnections.Config(4, dynamic), site()), dtype=torch.float64,
                     spread=0.3)
    inner = torch.nn.Linear(32, 32).double()

    def run(streams):
        return layer(streams, lambda x: (inner(x), None))[0]

    assert_alike(both(run, [tokens(2, 9, 4, 32)], [*layer.parameters(), *inner.parameters()]))


def test_rms_norm():
    norm = assemble(lambda: RMSNorm(RMSNorm.Config(), 32), dtype=torch.float64, spread=0.3)
    assert_alike(both(norm, [tokens(3, 7, 32)], list(norm.parameters())))


def test_bitlinear_multiplies_integers_and_scales_afterwards():
    linear = assemble(lambda: BitLinear(None, 32, 24, bias=True), dtype=torch.float64, spread=0.1)
    assert_alike(both(linear, [tokens(3, 7, 32)], list(linear.parameters())))
    with as_a_compiler_sees_them():
        rows = linear.to(torch.float32)(tokens(1, 32).float()) - linear.bias
    step = (rows / linear.pack()["weight_scale"].flatten())[0].detach()
    x = tokens(1, 32)
    unit = x.abs().max() / (x.square().mean() + 1e-6).sqrt() / 127
    torch.testing.assert_close((step / unit).round().float(), (step / unit).float(), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"window": 150}, {"scores": Scores(0.3, 1.2)},
                                     {"window": 70, "scores": Scores(None, 0.8)}], ids=str)
@pytest.mark.parametrize("seen", [0, 5])
def test_attention_block_by_block(seen, options):
    time = 400  # more than one mask is made for
    docs = documents(2, time + seen)

    def run(q, k, v):
        return masked_attention(q, k, v, docs, **options)

    assert_alike(both(run, [tokens(2, 4, time, 8), tokens(2, 2, time + seen, 8), tokens(2, 2, time + seen, 8).flip(2)]))


def test_plain_linears_need_no_form_of_their_own():
    linear = assemble(lambda: PlainLinear(None, 32, 24), dtype=torch.float64)
    assert_alike(both(linear, [tokens(3, 7, 32)], list(linear.parameters())), 0.0)
