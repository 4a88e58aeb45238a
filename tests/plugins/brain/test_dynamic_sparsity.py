"""Between 4 and 12 experts by difficulty, 8 on average, and the difficulty learned from the loss itself."""

import pytest
import torch

from tryplicity import Linear, Part, Site
from tryplicity_plugins.brain.dynamic_sparsity import DynamicSparsityRouter, _Level
from tryplicity_plugins.layers.activations import SiLU
from tryplicity_plugins.layers.moe import MixtureOfExperts

SITE = Site(hidden_size=16, vocab_size=64, context_length=64, layers=4)


def make(experts=16, spread=1.0, **options):
    torch.manual_seed(0)
    router = DynamicSparsityRouter(DynamicSparsityRouter.Config(**options), SITE, experts, 8)
    router.reset_parameters()
    with torch.no_grad():
        router.weight.copy_(torch.randn_like(router.weight))
        router.difficulty_D.copy_(torch.randn(16) * spread)
    return router


def count(router, experts_NK):
    return (experts_NK < router.experts).sum(-1)


def test_what_a_budget_is_planned_with():
    router = make()
    assert (router.config.min_experts, router.max_k, router.mean_k) == (4, 12, 8.0)


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_the_range_is_respected(spread):
    router = make(spread=spread)
    routing = router(torch.randn(4, 64, 16))
    k = count(router, routing.experts_NK)
    assert routing.experts_NK.shape == (256, 12) and k.min() >= 4 and k.max() <= 12
    if spread == 30:
        assert k.min() == 4 and k.max() == 12
    used = routing.experts_NK < router.experts
    assert (used.int().diff(dim=-1) <= 0).all()  # unused slots come last
    assert (routing.weights_NK[~used] == 0).all() and (routing.weights_NK[used] > 0).all()
    torch.testing.assert_close(routing.weights_NK.sum(-1), torch.ones(256))


def test_the_choice_by_hand():
    router = make()
    x = torch.randn(1, 20, 16)
    routing = router(x)
    for n, x_D in enumerate(x[0]):
        kappa = 4 + 8 * (0.5 + (router.difficulty_D.detach() @ x_D + router.offset) / 4).clamp(0, 1)
        scores = (router.weight @ x_D).sigmoid()
        order = scores.argsort(descending=True)[: int(kappa.ceil())]
        gates = torch.tensor([min(1.0, float(kappa) - j) for j in range(len(order))])
        weights = scores[order] * gates
        assert routing.experts_NK[n, : len(order)].tolist() == order.tolist()
        assert (routing.experts_NK[n, len(order):] == 16).all()
        got = routing.weights_NK[n, : len(order)]
        torch.testing.assert_close(got, weights / weights.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spread, mean", [(1.0, 8.0), (4.0, 8.0), (1.0, 6.5), (0.2, 8.0)])
def test_the_mean_is_held_from_a_bad_start(spread, mean):
    router = make(spread=spread, mean_experts=mean)
    with torch.no_grad():
        router.offset.fill_(3.0)
    for step in range(60):
        stats = router(torch.randn(4, 128, 16) + 0.5).report.stats
        router.after_step(step, stats)
    fresh = router(torch.randn(16, 128, 16) + 0.5)
    k = count(router, fresh.experts_NK).float()
    assert abs(k.mean() - mean) < 0.3
    metrics = router.metrics(fresh.report.stats)
    assert metrics["experts_per_token"] == pytest.approx(k.mean().item(), abs=1e-4)
    assert metrics["experts_per_token_spread"] == pytest.approx(k.std(correction=0).item(), abs=1e-3)


def test_the_mean_starts_near_its_target():
    router = make(spread=0.02 * 16 ** 0.5)
    assert abs(count(router, router(torch.randn(8, 128, 16)).experts_NK).float().mean() - 8) < 0.5


def test_difficulty_gets_the_true_gradient_of_the_loss():
    """Not a penalty's: the output is continuous in the difficulty, so finite differences must agree."""
    router = make(spread=0.15).double()  # no token at the end of the range
    router.score = lambda x_BTD: ((x_BTD[0] @ router.weight.T), (x_BTD[0] @ router.weight.T).sigmoid())
    x, taste = torch.randn(1, 30, 16).double(), torch.randn(17).double()

    def loss():
        routing = router(x)
        return (routing.weights_NK.double() * taste[routing.experts_NK]).sum()

    gradient, = torch.autograd.grad(loss(), router.difficulty_D)
    assert (gradient != 0).all()
    direction, step = torch.randn(16).double(), 1e-3  # kappa itself is computed in fp32
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            router.difficulty_D.add_(sign * step * direction)
            values.append(loss())
            router.difficulty_D.add_(-sign * step * direction)
    slope = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(slope, gradient @ direction, rtol=5e-2, atol=1e-3)


def test_hard_tokens_come_to_have_more_experts():
    """Hard tokens want the outputs of their 12 best experts, easy ones of 4."""
    router = make(spread=0.1)
    value = torch.eye(17)[:, :16]  # expert e says unit vector e; the unused say nothing
    hard_token = torch.randn(16)
    optimizer = torch.optim.Adam([router.difficulty_D], lr=0.05)
    generator = torch.Generator().manual_seed(1)

    def run(tokens):
        hard = torch.rand(tokens, generator=generator) < 0.5
        sign = torch.where(hard, 1.0, -1.0)[:, None]
        x = torch.randn(tokens, 16, generator=generator) * 0.3 + sign * hard_token
        routing = router(x[None])
        said = (routing.weights_NK[..., None] * value[routing.experts_NK]).sum(1)
        scores = (x @ router.weight.T).sigmoid().detach()
        width = torch.where(hard, 12, 4)[:, None]
        favourites = scores.where(scores.argsort(-1, descending=True).argsort(-1) < width, 0)
        wanted = favourites / favourites.sum(-1, keepdim=True)
        return hard, routing, (said - wanted).square().sum(-1).mean()

    for step in range(60):
        _, routing, loss = run(256)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        router.after_step(step, routing.report.stats)
    hard, routing, _ = run(512)
    k = count(router, routing.experts_NK).float()
    assert k[hard].mean() > k[~hard].mean() + 3
    assert abs(k.mean() - 8) < 0.5


def make_moe(seed):
    """Eight experts whose weights are given and stay; the router is new."""
    site = Site(hidden_size=16, vocab_size=64, context_length=64, layers=4, linear_part=Part(Linear, None))
    options = DynamicSparsityRouter.Config(min_experts=1, max_experts=4, mean_experts=2)
    moe = MixtureOfExperts(MixtureOfExperts.Config(experts=8, inner_size=8, shared_experts=0,
                                                   activation=Part(SiLU, None),
                                                   router=Part(DynamicSparsityRouter, options)), site)
    torch.manual_seed(seed)
    moe.router.reset_parameters()
    for linear in (moe.gate_up, moe.down):
        linear.weight.requires_grad_(False).normal_(std=1.5 * linear.in_features ** -0.5)
    return moe


def hand_over(moe, step, report):
    moe.router.after_step(step, {name.removeprefix("router."): stat for name, stat in report.stats.items()
                                 if name.startswith("router.")})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_token_whose_target_takes_several_experts_comes_to_have_them(seed):
    """Kinds 0 to 3 want the output of one expert, kinds 4 to 7 the mean of three experts' outputs. Nothing tells
    which are hard: choice and difficulty learn from the squared error alone."""
    moe = make_moe(seed)
    wanted_KE = torch.zeros(8, 8)
    for kind, experts in enumerate([[0], [1], [2], [3], [0, 4, 5], [1, 5, 6], [2, 6, 7], [3, 7, 4]]):
        wanted_KE[kind, experts] = 1 / len(experts)
    prototype_KD = torch.randn(8, 16)
    optimizer = torch.optim.AdamW(moe.router.parameters(), lr=0.01, betas=(0.9, 0.95))

    def batch(tokens):
        kind_N = torch.randint(0, 8, (tokens,))
        x_ND = prototype_KD[kind_N] + 0.5 * torch.randn(tokens, 16)
        gate, up = torch.einsum("nd,efd->nef", x_ND, moe.gate_up.weight).chunk(2, -1)
        y_NED = torch.einsum("nef,edf->ned", torch.nn.functional.silu(gate) * up, moe.down.weight)
        return kind_N, x_ND[None], torch.einsum("ne,ned->nd", wanted_KE[kind_N], y_NED)[None]

    def experts_of_easy_and_hard():
        kind_N, x, _ = batch(2048)
        with torch.no_grad():
            k_N = count(moe.router, moe.router(x).experts_NK).float()
        assert abs(k_N.mean() - 2) < 0.25  # the mean is held
        return k_N[kind_N < 4].mean(), k_N[kind_N >= 4].mean()

    for number in range(150):
        _, x, y = batch(128)
        out, report = moe(x)
        loss = (out - y).square().mean() + sum(report.losses.values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        hand_over(moe, number, report)
    easy, hard = experts_of_easy_and_hard()
    assert hard > easy + 0.6


def test_a_new_router_has_a_gradient_of_difficulty_and_reports_its_spread():
    moe = make_moe(0)
    out, report = moe(torch.randn(2, 64, 16))
    (out - 1).square().mean().backward()
    gradient = moe.router.difficulty_D.grad
    assert gradient.isfinite().all() and (gradient != 0).all()
    own = {name.removeprefix("router."): stat for name, stat in report.stats.items()}
    metrics = moe.router.metrics(own)
    assert 0 < metrics["difficulty"] < 1 and 0 < metrics["difficulty_spread"] < 0.5


def test_difficulty_and_its_spread_are_those_of_the_tokens():
    router = make()
    x = torch.randn(2, 50, 16)
    metrics = router.metrics(router(x).report.stats)
    level = (0.5 + (x @ router.difficulty_D.detach() + router.offset) / 4).clamp(0, 1)
    assert metrics["difficulty"] == pytest.approx(level.mean().item(), abs=1e-5)
    assert metrics["difficulty_spread"] == pytest.approx(level.std(correction=0).item(), abs=1e-4)


def test_a_token_at_the_end_of_the_range_can_come_back():
    """The gradient of a level that lies outside is the one at the edge, if it leads back in, else none."""
    z = torch.tensor([-9.0, -1.0, 1.0, 9.0], requires_grad=True)
    for sign, wanted in ((1.0, [0, 0.25, 0.25, 0.25]), (-1.0, [-0.25, -0.25, -0.25, 0])):
        gradient, = torch.autograd.grad((sign * _Level.apply(z)).sum(), z)
        assert gradient.tolist() == wanted  # descent lowers z where the gradient is positive
    assert _Level.apply(z).tolist() == [0, 0.25, 0.75, 1]


def test_impossible_ranges_are_told():
    def said(**options):
        return dict(DynamicSparsityRouter.check(DynamicSparsityRouter.Config(**options), SITE))

    assert not said()
    assert "use 12 or less" in said(min_experts=13)["min_experts"]
    assert "the nearest is 12" in said(mean_experts=20)["mean_experts"]


def test_one_width_only():
    router = make(min_experts=3, max_experts=3, mean_experts=3)
    routing = router(torch.randn(1, 8, 16))
    assert (count(router, routing.experts_NK) == 3).all()
    router.after_step(1, routing.report.stats)
    assert router.offset.isfinite()
