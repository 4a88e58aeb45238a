"""The spike against its formula, its thresholds' gradient, and the rate of zeros it is steered to."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tryplicity import Mean, Report, output_and_report
from tryplicity_plugins.brain.spike import Spike


def make(features=6, groups=None, **options):
    spike = Spike(Spike.Config(**options), features, groups=groups)
    spike.reset_parameters()
    torch.manual_seed(0)
    with torch.no_grad():
        spike.threshold.add_(torch.randn_like(spike.threshold) * 0.3)
        spike.offset.add_(torch.randn_like(spike.offset) * 0.3)
    return spike


def test_forward_and_gradients_by_hand():
    spike = make(bandwidth=0.5)
    x = torch.randn(3, 10, 6, requires_grad=True)
    weigh = torch.randn(3, 10, 6)
    y, _ = spike(x)
    grad_x, grad_threshold = torch.autograd.grad((y * weigh).sum(), (x, spike.threshold))
    limit = (spike.threshold + spike.offset).tolist()
    wanted_threshold = [0.0] * 6
    for b in range(3):
        for t in range(10):
            for f in range(6):
                value, g = x[b, t, f].item(), weigh[b, t, f].item()
                assert y[b, t, f].item() == (value if value > limit[f] else 0)
                assert grad_x[b, t, f].item() == (pytest.approx(g) if value > limit[f] else 0)
                if abs(value - limit[f]) < 0.25:
                    wanted_threshold[f] += -value * g / 0.5
    torch.testing.assert_close(grad_threshold, torch.tensor(wanted_threshold), rtol=1e-4, atol=1e-5)
    assert grad_threshold.isfinite().all() and (grad_threshold != 0).all()


def test_the_surrogate_is_the_slope_of_the_smoothed_loss():
    """Over many inputs the loss is smooth in the threshold; its slope is what the rectangle estimates."""
    torch.manual_seed(0)
    x = torch.randn(400_000, 1)
    spike = Spike(Spike.Config(threshold=0.5, bandwidth=0.1), 1)
    spike.reset_parameters()
    y, _ = spike(x)
    gradient, = torch.autograd.grad(y.mean(), spike.threshold)
    with torch.no_grad():
        losses = []
        for shift in (0.05, -0.05):
            spike.threshold.fill_(0.5 + shift)
            losses.append(output_and_report(spike(x))[0].mean())
    torch.testing.assert_close(gradient[0], (losses[0] - losses[1]) / 0.1, rtol=1e-2, atol=1e-4)


def test_groups_equal_one_spike_each():
    spike = make(groups=3)
    x = torch.randn(20, 6)
    group = torch.tensor([0] * 5 + [2] * 9 + [3] * 6)  # group 1 is empty, 3 means unused
    x[14:17], x[17:] = torch.nan, 9.0
    x.requires_grad_()
    weigh = torch.randn(20, 6)
    y, report = spike(x, group)
    grad_x, grad_threshold = torch.autograd.grad((y * weigh).sum(), (x, spike.threshold))
    for value in (y, grad_x):
        assert torch.equal(value[group == 3], torch.zeros(6, 6))
    assert torch.equal(grad_threshold[1], torch.zeros(6))
    assert report.stats["zero_rate"].count[:, 0].tolist() == [5, 0, 9]
    for g in (0, 2):
        alone = make()
        with torch.no_grad():
            alone.threshold.copy_(spike.threshold[g])
            alone.offset.copy_(spike.offset[g])
        rows = group == g
        z, said = alone(x[rows])
        grad, = torch.autograd.grad((z * weigh[rows]).sum(), alone.threshold)
        assert torch.equal(y[rows], z)
        torch.testing.assert_close(grad_threshold[g], grad)
        for name in ("zero_rate", "square"):
            total = report.stats[name].total[g].squeeze()
            torch.testing.assert_close(total, said.stats[name].total.squeeze())
    before = spike.offset.clone()
    spike.after_step(1, report.stats)
    assert torch.equal(spike.offset[1], before[1]) and not torch.equal(spike.offset[0], before[0])


@pytest.mark.parametrize("scale, shift", [(0.02, 0.0), (1.0, 0.0), (30.0, 0.0), (1.0, -1.5)])
@pytest.mark.parametrize("target", [0.6, 0.7, 0.8])
@pytest.mark.parametrize("groups", [None, 2])
def test_zeros_reach_their_target_on_a_stationary_input(scale, shift, target, groups):
    spike = Spike(Spike.Config(zero_rate=target), 32, groups=groups)
    spike.reset_parameters()
    torch.manual_seed(1)
    strength = torch.rand(32) + 0.5  # neurons differ
    group = None if groups is None else torch.arange(1024) % 2

    def batch():
        return (torch.randn(1024, 32) * strength + shift) * scale

    for number in range(150):
        spike.after_step(number, spike(batch(), group)[1].stats)
    y, report = spike(batch(), group)
    metrics = spike.metrics(report.stats)
    assert abs((y == 0).float().mean().item() - target) < 0.02
    assert metrics["zero_rate"] == pytest.approx((y == 0).float().mean().item(), abs=1e-5)
    per_neuron = (y == 0).float().mean(0)
    assert (per_neuron - target).abs().max() < 0.15  # each back within its band, to sampling error
    if groups is None:
        assert metrics["zero_rate_spread"] == pytest.approx(per_neuron.std(correction=0).item(), abs=1e-5)


def test_inside_the_band_neurons_keep_the_rate_they_learn():
    spike = Spike(Spike.Config(zero_rate=0.7, band=0.1), 2)
    spike.reset_parameters()
    rate = torch.tensor([0.65, 0.75])
    one = torch.tensor(1000.0)
    spike.after_step(1, {"zero_rate": Mean(rate * 1000, one), "square": Mean(one, one)})
    torch.testing.assert_close(spike.offset, torch.zeros(2), rtol=0, atol=1e-6)


def test_statistics_of_parts_add_up():
    spike = make(groups=2)
    x, group = torch.randn(40, 6), torch.arange(40) % 3  # 2 means unused
    whole = spike(x, group)[1].stats
    parts = [spike(a, b)[1].stats for a, b in zip(x.chunk(4), group.chunk(4), strict=True)]
    for name, stat in whole.items():
        summed = parts[0][name]
        for part in parts[1:]:
            summed = summed + part[name]
        torch.testing.assert_close(summed.total, stat.total)
        torch.testing.assert_close(summed.count, stat.count)


@pytest.mark.parametrize("groups", [None, 2])
def test_autocast_fake_tensors_and_decoding(groups):
    spike = make(features=8, groups=groups)
    group = None if groups is None else torch.arange(16) % 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, report = spike(torch.randn(16, 8, dtype=torch.bfloat16, requires_grad=True), group)
    assert y.dtype == torch.bfloat16 and report.stats["zero_rate"].total.dtype == torch.float32
    y.float().sum().backward()
    assert spike.threshold.grad.dtype == torch.float32 and spike.threshold.grad.isfinite().all()
    with torch.no_grad():
        spike.eval()
        assert isinstance(spike(torch.randn(16, 8), group), torch.Tensor)
    with FakeTensorMode():
        fake = Spike(Spike.Config(), 8, groups=groups)
        fake_group = None if groups is None else torch.arange(16) % 2
        y, report = fake(torch.randn(16, 8, requires_grad=True), fake_group)
        y.sum().backward()
        assert isinstance(report, Report) and fake.threshold.grad.shape == fake.threshold.shape


def live(spike, draw, steps, group=None):
    for number in range(steps):
        spike.after_step(number, spike(draw(), group)[1].stats)


@pytest.mark.parametrize("groups", [None, 2])
def test_a_sleep_brings_thresholds_back_after_a_shift(groups):
    """Steering is slow here, so that the sleep has something to do."""
    spike = Spike(Spike.Config(zero_rate=0.7, rate=0.002), 32, groups=groups)
    spike.reset_parameters()
    torch.manual_seed(1)
    group = None if groups is None else torch.arange(4096) % 2
    centre = torch.zeros(32)

    def draw():
        return torch.randn(4096, 32) + centre

    def rates():
        return (output_and_report(spike(draw(), group))[0] == 0).float().mean(0)

    generator = torch.Generator()
    live(spike, draw, 40, group)
    assert abs(rates().mean() - 0.7) > 0.1  # 0.54 with a threshold of 0.1
    repair = spike.consolidate(0.1, generator)
    assert abs(rates().mean() - 0.7) < 0.02
    assert repair.stats["zero_rate_before"] < 0.6 and not repair.reset
    assert repair.stats["zero_rate_expected"] == pytest.approx(0.7, abs=0.02)

    centre = torch.linspace(-0.8, 0.8, 32)
    live(spike, draw, 40, group)
    before = (rates() - 0.7).abs()
    assert before.max() > 0.15
    assert spike.consolidate(0.1, generator).stats["neurons_astray"] > 0.2
    assert abs(rates().mean() - 0.7) < 0.02 and (rates() - 0.7).abs().max() < before.max()
    live(spike, draw, 40, group)
    spike.consolidate(0.1, generator)
    assert abs(rates().mean() - 0.7) < 0.02 and (rates() - 0.7).abs().max() < 0.12


def test_a_sleep_leaves_alone_what_is_well():
    spike = Spike(Spike.Config(zero_rate=0.7, band=0.1), 2)
    spike.reset_parameters()
    rate, one = torch.tensor([0.65, 0.75]), torch.tensor(1000.0)
    for number in range(100):
        spike.after_step(number, {"zero_rate": Mean(rate * 1000, one), "square": Mean(one, one)})
    offset = spike.offset.clone()
    assert spike.consolidate(0.1, torch.Generator()).stats["neurons_astray"] == 0
    torch.testing.assert_close(spike.offset, offset, rtol=0, atol=1e-5)


def test_a_sleep_moves_a_silent_neuron_by_a_root_mean_square_at_most_and_what_was_never_seen_not_at_all():
    spike = Spike(Spike.Config(), 4, groups=2)
    spike.reset_parameters()
    zeros, rows = torch.tensor([[1000.0, 700, 700, 700], [0, 0, 0, 0]]), torch.tensor([[1000.0], [0.0]])
    square = torch.tensor([[9000.0], [0.0]])  # a root mean square of 3
    for number in range(100):
        spike.after_step(number, {"zero_rate": Mean(zeros, rows), "square": Mean(square, rows)})
    offset = spike.offset.clone()
    spike.consolidate(0.1, torch.Generator())
    move = spike.offset - offset
    torch.testing.assert_close(move[0], torch.tensor([-3.0, 0, 0, 0]), rtol=0.01, atol=0.01)
    assert torch.equal(move[1], torch.zeros(4))
