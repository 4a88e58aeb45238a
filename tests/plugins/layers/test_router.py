"""The plain router against a choice made token by token; balance by bias, by sequence, over many steps."""

import pytest
import torch

from tryplicity import Mean, Site
from tryplicity_plugins.layers.router import TopKRouter

SITE = Site(hidden_size=16, vocab_size=64, context_length=64, layers=4)


def make(experts=6, top_k=2, **options):
    torch.manual_seed(0)
    router = TopKRouter(TopKRouter.Config(**options), SITE, experts, top_k)
    router.reset_parameters()
    with torch.no_grad():
        router.weight.copy_(torch.randn_like(router.weight))
    return router


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_a_choice_made_by_hand(score, normalize):
    router = make(score=score, normalize=normalize)
    with torch.no_grad():
        router.bias.copy_(torch.tensor([0.5, 0, 0, 0, 0, -0.5]))
    x = torch.randn(2, 5, 16)
    routing = router(x)
    for n, x_D in enumerate(x.flatten(0, 1)):
        logits = [float(w @ x_D) for w in router.weight.detach()]
        scores = torch.tensor(logits).sigmoid() if score == "sigmoid" else torch.tensor(logits).softmax(0)
        best = sorted(range(6), key=lambda e: -(scores[e] + router.bias[e]))[:2]
        assert routing.experts_NK[n].tolist() == best
        weights = scores[best]  # the bias chooses and does not weigh
        weights = weights / weights.sum() if normalize else weights
        torch.testing.assert_close(routing.weights_NK[n], weights)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_choice_on_the_host_is_that_of_forward(score, normalize):
    router = make(score=score, normalize=normalize)
    with torch.no_grad():
        router.bias.copy_(torch.tensor([0.5, 0, 0, 0, 0, -0.5]))
        for x_D in torch.randn(20, 16):
            experts_1K, weights_1K, _ = router(x_D[None, None])
            chosen = router.choose(x_D)
            assert [expert for expert, _ in chosen] == experts_1K[0].tolist()
            torch.testing.assert_close(torch.tensor([weight for _, weight in chosen]), weights_1K[0])


def test_the_balance_loss_by_hand():
    router = make(balance_loss=0.5)
    x = torch.randn(3, 4, 16)
    routing = router(x)
    rows = []
    for row, experts in zip(x, routing.experts_NK.view(3, -1), strict=True):
        scores = (row @ router.weight.T).sigmoid()
        mean_share = (scores / scores.sum(-1, keepdim=True)).mean(0)
        load = torch.bincount(experts, minlength=6) / len(experts)
        rows.append(6 * (load * mean_share).sum())
    torch.testing.assert_close(routing.report.losses["balance"], 0.5 * torch.stack(rows).mean())


def test_the_z_loss_by_hand():
    router = make(z_loss=0.25, balance_loss=0)
    x = torch.randn(3, 4, 16)
    losses = router(x).report.losses
    assert list(losses) == ["z"]
    wanted = 0.25 * (x @ router.weight.T).exp().sum(-1).log().square().mean()
    torch.testing.assert_close(losses["z"], wanted)


def test_the_balance_loss_pulls_towards_even_load():
    router = make(balance_loss=1.0)
    x = torch.randn(1, 64, 16) + 1  # a common direction that some experts like
    before = router.metrics(router(x).report.stats)
    optimizer = torch.optim.SGD(router.parameters(), lr=1)
    for _ in range(50):
        optimizer.zero_grad()
        router(x).report.losses["balance"].backward()
        optimizer.step()
    assert router.metrics(router(x).report.stats)["load_max_over_mean"] < before["load_max_over_mean"]


def test_the_bias_moves_once_by_its_rate_against_the_load():
    router = make(experts=4, bias_rate=0.01)
    router.after_step(1, {"load": Mean(torch.tensor([9.0, 5.0, 1.0, 5.0]), 10.0)})
    torch.testing.assert_close(router.bias, torch.tensor([-0.01, 0.0, 0.01, 0.0]))


def test_the_bias_brings_a_lopsided_router_to_balance():
    router = make(experts=8, bias_rate=0.005)
    with torch.no_grad():
        router.weight.mul_(0.25)
    offset, metrics = torch.randn(16), []
    for step in range(200):
        stats = router(torch.randn(8, 64, 16) + offset).report.stats
        metrics.append(router.metrics(stats))
        router.after_step(step, stats)
    first, last = metrics[0], metrics[-1]
    assert first["load_max_over_mean"] > 1.8 and last["load_max_over_mean"] < 1.3
    assert last["load_entropy"] > 0.98 > first["load_entropy"] and last["dead_experts"] == 0


def test_logits_stay_in_fp32_under_autocast_and_in_bf16():
    router = make()
    x = torch.randn(2, 8, 16)
    wanted = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = router(x)
    assert torch.equal(got.experts_NK, wanted.experts_NK)
    assert torch.equal(got.weights_NK, wanted.weights_NK)
    logits, scores = router.to(torch.bfloat16).score(x.to(torch.bfloat16))
    assert logits.dtype == scores.dtype == torch.float32
    assert router(x.to(torch.bfloat16)).weights_NK.dtype == torch.bfloat16


def test_scores_that_all_vanish_give_finite_weights():
    router = make()
    with torch.no_grad():
        router.weight.fill_(-100)
    weights = router(torch.ones(1, 2, 16)).weights_NK
    assert weights.isfinite().all()


def test_statistics_are_detached_and_there_without_gradients_too():
    router = make()
    assert not router(torch.randn(1, 4, 16)).report.stats["load"].total.requires_grad
    with torch.no_grad():
        report = router(torch.randn(1, 4, 16)).report
        assert report.stats["load"].total.sum() == 8 and not report.losses
        assert not router(torch.randn(4, 1, 16)).report.stats  # decoding


def test_use_is_the_recent_load_in_units_of_the_even_share():
    router = make(experts=4)
    assert router.use_E.tolist() == [1, 1, 1, 1]
    for step in range(500):
        router.after_step(step, {"load": Mean(torch.tensor([60.0, 20.0, 0.0, 0.0]), 40.0)})
    torch.testing.assert_close(router.use_E, torch.tensor([3.0, 1.0, 0.0, 0.0]), rtol=0.01, atol=0.01)
    for step in range(70):  # half of what it knows is of the last 70 steps
        router.after_step(step, {"load": Mean(torch.full((4,), 20.0), 40.0)})
    torch.testing.assert_close(router.use_E, torch.tensor([2.0, 1.0, 0.5, 0.5]), rtol=0.02, atol=0.02)
    router.to(torch.bfloat16).after_step(1, {"load": Mean(torch.full((4,), 20.0), 40.0)})
    assert router.use_E.dtype == torch.bfloat16


def test_every_token_has_as_many_experts():
    router = make(experts=6, top_k=2)
    metrics = router.metrics(router(torch.randn(2, 8, 16)).report.stats)
    assert metrics["experts_per_token"] == 2 and metrics["experts_per_token_spread"] == 0
    assert 0 < metrics["load_entropy"] <= 1 and metrics["dead_experts"] >= 0


def test_a_revived_expert_is_a_candidate_where_its_model_is():
    router = make(experts=8, top_k=2)
    with torch.no_grad():
        router.bias.copy_(torch.randn(8) * 0.1)
        router.use_E.copy_(torch.tensor([2.0, 0, 1, 1, 1, 1, 0.1, 1]))
    others = router.weight[[0, 2, 3, 4, 5, 7]].clone()
    router.revive([1, 6], [0, 2], torch.Generator().manual_seed(0))
    assert torch.equal(router.weight[[0, 2, 3, 4, 5, 7]], others)
    assert torch.equal(router.bias[[1, 6]], router.bias[[0, 2]]) and (router.use_E[[1, 6]] == 1).all()
    x = torch.randn(1, 500, 16)
    chosen = torch.zeros(500, 8).scatter_(1, router(x).experts_NK, 1.0)
    assert chosen[:, 1].mean() > 0.5 * chosen[:, 0].mean() > 0
    assert not torch.equal(router.weight[1], router.weight[0])
