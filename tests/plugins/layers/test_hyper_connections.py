"""Hyper-connections against the paper's formulas, token by token, and against the plain residual."""

import pytest
import torch
from layer_tools import assemble, assert_same, gradients, part, runs_everywhere, site, threads, without_native
from torch import nn

from tryplicity import Report
from tryplicity_plugins.layers.hyper_connections import HyperConnections
from tryplicity_plugins.layers.residual import Add

B, T, D = 2, 3, 8


def build(streams=4, dynamic=True, **options):
    return part(HyperConnections, streams=streams, dynamic=dynamic).build(site(hidden=D, **options))


def by_formula(hyper, streams, sublayer):
    """The dynamic hyper-connection of arXiv:2409.19606, one token and one stream after the other."""
    S = hyper.streams
    rows = []
    for token in streams.flatten(0, 1):
        read, keep, depth = [], [[None] * S for _ in range(S)], []
        for i in range(S):
            coefficients = hyper.static[i]
            if hyper.dynamic is not None:
                normal = token[i] / (token[i].square().mean() + 1e-6).sqrt()
                scales = torch.stack([hyper.scale[0]] * (S + 1) + [hyper.scale[1]])
                coefficients = coefficients + scales * torch.tanh(hyper.dynamic @ normal)
            read.append(coefficients[0])
            keep[i] = [coefficients[1 + j] for j in range(S)]
            depth.append(coefficients[S + 1])
        y = sublayer(sum(read[i] * token[i] for i in range(S)))
        passed = [sum(keep[i][j] * token[i] for i in range(S)) for j in range(S)]
        rows.append(torch.stack([depth[j] * y + passed[j] for j in range(S)]))
    return torch.stack(rows).view(streams.shape)


@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("dynamic", [True, False])
def test_values_and_gradients(streams, dynamic):
    hyper = assemble(lambda: build(streams, dynamic), spread=0.5, dtype=torch.float64)
    layer = nn.Linear(D, D, dtype=torch.float64)
    h = torch.randn(B, T, streams, D, dtype=torch.float64, requires_grad=True)
    wanted = [h, *hyper.parameters(), *layer.parameters()]
    actual, _ = hyper(h, lambda x: (layer(x).tanh(), Report()))
    expected = by_formula(hyper, h, lambda x: layer(x).tanh())
    assert_same([actual], [expected], 1e-12)
    assert_same(gradients(actual, wanted), gradients(expected, wanted), 1e-10)
    with torch.no_grad():
        assert_same([hyper(h, lambda x: (layer(x).tanh(), Report()))[0]], [expected], 1e-12)


def stack(residual, layers):
    """A little model of ten sub-layers with `residual` around each."""
    steps = [assemble(lambda i=i: residual(layer=i // 2, sublayer=i % 2, layers=5)) for i in range(10)]

    def run(x):
        streams = steps[0].expand(x)
        for step, layer in zip(steps, layers, strict=True):
            streams, _ = step(streams, lambda x, layer=layer: (layer(x).tanh(), Report()))
        return steps[0].reduce(streams)

    return run, steps


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("streams", [1, 2, 3, 4])
def test_a_new_one_is_the_plain_residual(streams, dynamic):
    layers = [nn.Linear(D, D) for _ in range(10)]
    x = torch.randn(B, T, D, requires_grad=True)
    hyper, _ = stack(lambda **at: build(streams, dynamic, **at), layers)
    plain, _ = stack(lambda **at: part(Add).build(site(hidden=D, **at)), layers)
    if streams == 3:  # the average of three equal numbers may be a rounding off
        torch.testing.assert_close(hyper(x), plain(x))
    else:
        assert torch.equal(hyper(x), plain(x))
    parameters = [p for layer in layers for p in layer.parameters()]
    assert_same(gradients(hyper(x), [x, *parameters]), gradients(plain(x), [x, *parameters]), 1e-5)


def test_each_sublayer_first_reads_its_own_stream():
    h = torch.arange(4.0)[:, None].expand(1, 1, 4, D)
    seen = []
    for i in range(6):
        hyper = assemble(lambda i=i: build(layer=i // 2, sublayer=i % 2, layers=3))
        hyper(h, lambda x: (seen.append(x[0, 0, 0].item()) or x, Report()))
    assert seen == [0, 1, 2, 3, 0, 1]


def test_the_report_is_passed_on():
    for residual in (assemble(build), assemble(lambda: part(Add).build(site(hidden=D)))):
        said = Report({"loss": torch.ones(())})
        streams = residual.expand(torch.randn(B, T, D))
        assert residual(streams, lambda x: (x, said))[1] is said  # noqa: B023


def test_training_moves_every_parameter():
    layers = [nn.Linear(D, D) for _ in range(10)]
    run, steps = stack(build, layers)
    modules = nn.ModuleList(steps)
    optimizer = torch.optim.SGD(modules.parameters(), lr=0.1)
    before = [p.detach().clone() for p in modules.parameters()]
    for _ in range(2):  # at first the projection is zero, and with it the gradient of its scale
        optimizer.zero_grad()
        run(torch.randn(B, T, D)).square().sum().backward()
        optimizer.step()
    for old, (name, new) in zip(before, modules.named_parameters(), strict=True):
        assert not torch.equal(old, new), name


def test_what_decay_leaves_alone():
    names = dict(assemble(build).named_parameters())
    assert set(HyperConnections.undecayed) == {"static", "scale"} <= set(names)


def test_coefficients_are_not_rounded_to_bf16():
    """A stream kept with 1 + 2^-10 must not come back with 1, as it would from a bf16 product."""
    hyper = assemble(lambda: build(dynamic=False))
    with torch.no_grad():
        hyper.static[:, 1:-1] *= 1 + 2**-10
    h = torch.ones(1, 1, 4, D)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = hyper(h, lambda x: (torch.zeros_like(x), Report()))
    assert torch.equal(out, h * (1 + 2**-10))


def test_a_static_one_runs_everywhere():
    runs_everywhere(lambda: build(dynamic=False), lambda m, h, w: m(h, lambda x: (x @ w, Report()))[0],
                    torch.randn(B, T, 4, D), torch.randn(D, D))


def test_the_streams_keep_their_dtype():
    hyper = assemble(build)
    for dtype in (torch.bfloat16, torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            h = hyper.expand(torch.randn(B, T, D, dtype=dtype))
            assert hyper(h, lambda x: (x, Report()))[0].dtype == dtype


@pytest.mark.parametrize("hidden", [1, 8, 37, 160])
@pytest.mark.parametrize("streams", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dynamic", [True, False])
def test_native_equals_the_formula(streams, dynamic, hidden):
    """The C++ of decoding, in fp32, beside the formula in fp64."""
    hyper = assemble(lambda: part(HyperConnections, streams=streams, dynamic=dynamic).build(site(hidden=hidden)),
                     spread=0.5)
    h = torch.randn(B, T, streams, hidden)
    with torch.no_grad():
        y, report = hyper(h, lambda x: (x.tanh(), Report(losses={"given": torch.ones(())})))
        with without_native():
            plain = hyper(h, lambda x: (x.tanh(), Report()))[0]
        expected = by_formula(hyper.double(), h.double(), torch.tanh)
    assert list(report.losses) == ["given"]
    assert_same([y.double()], [expected], 2e-6)
    assert_same([y], [plain], 4e-6)
    assert hidden < 37 or streams == 1 or not torch.equal(y, plain), "C++ did not run"


def test_native_gives_a_token_the_same_bits_among_others_and_on_any_threads():
    hyper = assemble(lambda: part(HyperConnections).build(site(hidden=72)), spread=0.5)
    h = torch.randn(1, 300, 4, 72)
    with torch.no_grad():
        whole = hyper(h, lambda x: (3 * x, Report()))[0]
        for sizes in ([1] * 300, [100, 7, 193]):
            pieces = [hyper(piece, lambda x: (3 * x, Report()))[0] for piece in h.split(sizes, 1)]
            assert torch.equal(torch.cat(pieces, 1), whole)
        assert torch.equal(hyper(h.view(3, 100, 4, 72), lambda x: (3 * x, Report()))[0].view(h.shape), whole)
        for count in (1, 3):
            with threads(count):
                assert torch.equal(hyper(h, lambda x: (3 * x, Report()))[0], whole)
        empty = hyper(h[:, :0], lambda x: (3 * x, Report()))[0]
    assert empty.shape == (1, 0, 4, 72)


def test_native_leaves_the_streams_it_was_given():
    hyper = assemble(build, spread=0.5)
    h = torch.randn(B, T, 4, D)
    before = h.clone()
    with torch.no_grad():
        hyper(h, lambda x: (x, Report()))
    assert torch.equal(h, before)
