"""Weights of tokens by surprise: their mean and bounds whatever is padded, and the gradient they give."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tryplicity import IGNORE, Mean, Site
from tryplicity.training.step import forward_backward
from tryplicity_plugins.brain.predictive_coding import PredictiveCoding

SITE = Site(hidden_size=32, vocab_size=64, context_length=64, layers=4)


def make(**options):
    return PredictiveCoding(PredictiveCoding.Config(**options), SITE)


def nats(*probabilities):
    return -torch.tensor([probabilities]).log()


def test_by_hand():
    nll, valid = nats(1.0, 0.5, 0.3, 0.9), torch.tensor([[True, True, True, False]])
    weights, report = make(range=0.5).token_weights(nll, valid)
    # surprise 0, 0.5, 0.7: mean 0.4
    torch.testing.assert_close(weights, torch.tensor([[0.8, 1.05, 1.15, 0.0]]))
    assert make().metrics(report.stats) == pytest.approx(
        {"surprise": 0.4, "weight_spread": math.sqrt((0.04 + 0.0025 + 0.0225) / 3), "propagated": 1.0})

    squares, _ = make(range=1.0, focus=2.0).token_weights(nll, valid)  # 0, 0.25, 0.49
    torch.testing.assert_close(squares, 1 + torch.tensor([[0, 0.25, 0.49, 1]]) - (0.74 / 3) - torch.tensor(
        [[0, 0, 0, 2 - 0.74 / 3]]))


def test_skipping_by_hand():
    nll, valid = nats(1.0, 0.5, 0.3, 0.9), torch.tensor([[True, True, True, False]])
    weights, report = make(range=0.5, keep=0.5).token_weights(nll, valid)  # two of four positions
    torch.testing.assert_close(weights, torch.tensor([[0, 1.05, 1.15, 0]]) * 3 / 2.2)
    assert make().metrics(report.stats)["propagated"] == pytest.approx(2 / 3)

    even, _ = make(range=0.0, keep=0.5).token_weights(nats(0.5, 0.5, 0.5, 0.5), torch.ones(1, 4, dtype=torch.bool))
    assert even.tolist() == [[2, 2, 0, 0]]  # equal ones by position


@st.composite
def rows(draw):
    """Losses of every size, padding of every kind: none, all, left, right, holes."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    cells = shape[0] * shape[1]
    nll = draw(st.lists(st.sampled_from([0.0, 1e-7, 1e-3, 0.1, 0.7, 2.0, 11.0, 90.0, 1e4]), min_size=cells,
                        max_size=cells))
    valid = draw(st.lists(st.booleans(), min_size=cells, max_size=cells))
    valid = torch.tensor(valid).view(shape)
    return torch.tensor(nll).view(shape) * valid, valid


SHARES = st.sampled_from([0.0, 0.3, 0.5, 1.0])


@settings(max_examples=200, deadline=None)
@given(rows(), SHARES, st.sampled_from([0.5, 1.0, 3.0]))
def test_the_mean_over_valid_tokens_is_one_and_no_weight_strays(case, reach, focus):
    nll, valid = case
    weights, _ = make(range=reach, focus=focus).token_weights(nll, valid)
    assert (weights[~valid] == 0).all()
    for row, real in zip(weights, valid, strict=True):
        if real.any():
            assert row[real].mean().item() == pytest.approx(1, abs=1e-6)
            assert 1 - reach - 1e-6 <= row[real].min() and row[real].max() <= 1 + reach + 1e-6
    for row, losses, real in zip(weights, nll, valid, strict=True):
        order = losses[real].argsort()
        assert (row[real][order].diff() >= -1e-6).all()  # more surprise, more weight


@settings(max_examples=200, deadline=None)
@given(rows(), SHARES, st.sampled_from([0.1, 0.25, 0.5, 0.99]))
def test_skipping_keeps_the_hardest_tokens_and_the_mean(case, reach, keep):
    nll, valid = case
    weights, report = make(range=reach, keep=keep).token_weights(nll, valid)
    places = math.ceil(keep * nll.shape[1])
    for row, losses, real in zip(weights, nll, valid, strict=True):
        kept = row > 0
        assert kept.sum() == min(places, real.sum()) and not kept[~real].any()
        if real.any():
            assert (row.sum() / real.sum()).item() == pytest.approx(1, abs=1e-5)
            skipped = losses[real & ~kept]
            assert not len(skipped) or skipped.max() <= losses[kept].min()
    assert report.stats["propagated"].total == (weights > 0).sum()


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_cut_into_parts_it_gives_the_same_weights_and_statistics(keep):
    torch.manual_seed(0)
    nll, valid = torch.rand(4, 30) * 5, torch.rand(4, 30) < 0.8
    objective = make(keep=keep)
    weights, report = objective.token_weights(nll * valid, valid)
    for parts in (2, 4):
        pairs = zip((nll * valid).chunk(parts), valid.chunk(parts), strict=True)
        cut = [objective.token_weights(part, real) for part, real in pairs]
        assert torch.equal(torch.cat([part for part, _ in cut]), weights)
        for name, stat in report.stats.items():
            total = sum((said.stats[name] for _, said in cut[1:]), cut[0][1].stats[name])
            torch.testing.assert_close(Mean(*total).value, stat.value)


def test_a_stage_scales_the_range_up_to_one():
    nll, valid = nats(1.0, 0.5, 0.3), torch.ones(1, 3, dtype=torch.bool)
    for factor, reach in ((0.5, 0.4), (0.0, 0.0), (3.0, 1.0)):
        objective = make(range=0.8)
        objective.factor = factor
        assert torch.equal(objective.token_weights(nll, valid)[0], make(range=reach).token_weights(nll, valid)[0])


@pytest.mark.parametrize("options", [{}, {"keep": 0.3}])
def test_runs_without_data(options):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for context in (torch.device("meta"), FakeTensorMode()):
        with context:
            weights, _ = make(**options).token_weights(torch.rand(3, 7), torch.ones(3, 7, dtype=torch.bool))
        assert weights.shape == (3, 7) and weights.dtype == torch.float32


# --- in a whole model ---

CASES = {"weigh": "brain=[{type: predictive_coding, range: 0.8}]",
         "skip": "brain=[{type: predictive_coding, range: 0.8, keep: 0.3}]",
         "skip alone": "brain=[{type: predictive_coding, range: 0.0, keep: 0.3}]",
         "with hebbian": "brain=[{type: predictive_coding, keep: 0.5}, {type: hebbian_loss, weight: 1.0}]"}


@pytest.fixture
def batch(prepared):
    batch = prepared.stream(seed=0).batch(0, 8, 48)
    targets = batch.targets_BT.clone()  # rows with very different numbers of targets, one with none
    targets[0, :-5], targets[1] = IGNORE, IGNORE
    return batch._replace(targets_BT=targets)


@pytest.fixture
def make_sure(make_model):
    """A model that is sure of some tokens (often of wrong ones), so that surprise is of all sizes."""

    def make(*settings, **options):
        model = make_model(*settings, **options)
        with torch.no_grad():
            model.norm.weight *= 10
        return model

    return make


def run(model, batch, micro_batch=8, checkpointing=False):
    model.activation_checkpointing = checkpointing
    model.zero_grad()
    result = forward_backward(model, batch, micro_batch, "fp32")
    return result, {name: p.grad.clone() for name, p in model.named_parameters()}


def by_hand(model, batch, keep, reach):
    """The loss with all logits at once: F.cross_entropy of each token, weighed in plain Python."""
    logits = model(batch.ids_BT, doc_ids_BT=batch.doc_ids_BT)
    nll = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="none", ignore_index=IGNORE)
    nll, total = nll.view_as(batch.targets_BT), 0.0
    for row, targets in zip(nll, batch.targets_BT, strict=True):
        valid = (targets != IGNORE).nonzero()[:, 0].tolist()
        if not valid:
            continue
        surprise = {t: 1 - math.exp(-row[t].item()) for t in valid}
        mean = sum(surprise.values()) / len(valid)
        kept = sorted(valid, key=lambda t: -row[t].item())[:math.ceil(keep * len(targets))]
        weight = {t: 1 + reach * (surprise[t] - mean) for t in kept}
        total = total + sum(weight[t] * row[t] for t in kept) * len(valid) / sum(weight.values())
    return nll, total / (batch.targets_BT != IGNORE).sum()


@pytest.mark.parametrize(("reach", "keep"), [(0.8, 1.0), (0.8, 0.3), (0.0, 0.3), (1.0, 0.02)])
def test_loss_and_gradient_of_a_model_are_those_of_plain_cross_entropy_weighed_by_hand(make_sure, batch, reach, keep):
    model = make_sure("heads=[]", "blocks.memory.feed_forward=gated_mlp", "blocks.attention.feed_forward=gated_mlp",
                      f"brain=[{{type: predictive_coding, range: {reach}, keep: {keep}}}]", dtype=torch.float64)
    foreseen = model(batch.ids_BT, doc_ids_BT=batch.doc_ids_BT).argmax(-1)
    easy = (torch.arange(48) % 2 == 0) & (batch.targets_BT != IGNORE)
    batch = batch._replace(targets_BT=foreseen.where(easy, batch.targets_BT))
    result, gradients = run(model, batch)
    model.zero_grad()
    nll, loss = by_hand(model, batch, keep, reach)
    loss.backward()
    torch.testing.assert_close(result.objectives["next_token"].value, loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.loss.value, nll[batch.targets_BT != IGNORE].mean().detach(), rtol=1e-6, atol=0)
    assert abs(result.loss.value - loss) > 0.05  # the unweighted loss is another number
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batch", [2, 4])
def test_a_batch_cut_into_parts_gives_the_same(make_sure, batch, case, micro_batch):
    model = make_sure(CASES[case], "layers=[memory, attention]", dtype=torch.float64)
    whole, gradients = run(model, batch)
    parts, cut = run(model, batch, micro_batch)
    torch.testing.assert_close(parts.loss.value, whole.loss.value)
    for name, mean in whole.objectives.items():
        torch.testing.assert_close(parts.objectives[name].value, mean.value, rtol=1e-6, atol=0)
    for name in ("surprise", "spread", "propagated"):
        path = f"objectives.predictive_coding.{name}"
        torch.testing.assert_close(Mean(*parts.stats[path]).value, whole.stats[path].value)
    for name, gradient in gradients.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_activation_checkpointing_changes_no_bit(make_sure, batch, case):
    model = make_sure(CASES[case], "layers=[memory, attention]")
    plain, gradients = run(model, batch, 4)
    again, recomputed = run(model, batch, 4, checkpointing=True)
    assert torch.equal(plain.objectives["next_token"].total, again.objectives["next_token"].total)
    for name, gradient in gradients.items():
        assert torch.equal(recomputed[name], gradient), name


def test_the_weights_do_not_reach_validation(make_sure, batch):
    model = make_sure(CASES["skip"]).eval()
    losses = model(batch.ids_BT, targets={"next_token": batch.targets_BT})
    plain = F.cross_entropy(model(batch.ids_BT).flatten(0, 1), batch.targets_BT.flatten(), reduction="sum")
    torch.testing.assert_close(losses.objectives["next_token"].total, plain)


def test_a_run_trains_resumes_and_logs_both_losses(make_build, prepared, tmp_path):
    from tryplicity import load_plugins
    from tryplicity.run import Run
    from tryplicity.training.loop import Budget, train
    from tryplicity.training.metrics import read_lines

    build = make_build(CASES["with hebbian"], "layers=[memory]", "heads=[]")
    lines = {}
    for name in ("whole", "resumed"):
        folder = Run(tmp_path / name)
        folder.create(spec=build.spec.as_yaml(), hardware="", build={}, data={},
                      tokenizer=prepared.tokenizer_path.read_text())
        if name == "resumed":
            train(build, prepared, folder, Budget(steps=4), load_plugins())
        train(build, prepared, folder, Budget(steps=12), load_plugins(), resume=name == "resumed")
        lines[name] = {line["step"]: line for line in read_lines(folder.metrics) if "loss" in line}
    whole, resumed = lines.values()
    assert whole[12]["loss"] < whole[1]["loss"]
    for step in range(1, 13):
        for key in ("loss", "weighted_loss", "decorrelation_loss", "objectives.predictive_coding.surprise",
                    "objectives.predictive_coding.propagated", "layers.0.objectives.hebbian_loss.correlation"):
            assert whole[step][key] == resumed[step][key], (step, key)
    assert whole[1]["loss"] != whole[1]["weighted_loss"]
    assert whole[1]["objectives.predictive_coding.propagated"] == pytest.approx(0.5, abs=0.02)
