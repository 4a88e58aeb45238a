"""Winners suppress what resembles them: similarity measured from weights, and what it does to the choice."""

import pytest
import torch

from tryplicity import Activation, Linear, Part, Site
from tryplicity_plugins.brain.lateral_inhibition import LateralInhibitionRouter, similarity_of
from tryplicity_plugins.layers.moe import MixtureOfExperts
from tryplicity_plugins.layers.router import TopKRouter

SITE = Site(hidden_size=32, vocab_size=64, context_length=64, layers=4, linear_part=Part(Linear, None))


class Identity(Activation):
    name = "test_identity"

    def __init__(self, config, features, groups=None):
        super().__init__()

    def forward(self, x, group=None):
        return x


def make_moe(experts=8, top_k=3, **options):
    torch.manual_seed(0)
    router = Part(LateralInhibitionRouter, LateralInhibitionRouter.Config(**options))
    moe = MixtureOfExperts(MixtureOfExperts.Config(experts=experts, top_k=top_k, inner_size=16, router=router,
                                                   activation=Part(Identity, None)), SITE)
    for module in moe.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    with torch.no_grad():
        moe.router.weight.copy_(torch.randn_like(moe.router.weight))
    return moe


def cosines(moe):
    weights = torch.cat([moe.gate_up.weight.flatten(1), moe.down.weight.flatten(1)], 1)
    unit = torch.nn.functional.normalize(weights, dim=-1)
    return unit @ unit.T


def pair_up(moe, like=0.1):
    """Experts 2i and 2i + 1 nearly the same."""
    with torch.no_grad():
        for linear in (moe.gate_up, moe.down):
            twin = linear.weight[0::2]
            linear.weight[1::2] = twin + like * twin.std() * torch.randn_like(twin)


def step(moe, number, x):
    """A training step: what the inhibition said in it."""
    for module in (moe.router, moe.router.inhibition):
        module.before_step(number)
    stats = moe(x)[1].stats
    routers = own(stats, "router.")
    moe.router.after_step(number, {name: stat for name, stat in routers.items() if "." not in name})
    moe.router.inhibition.after_step(number, own(routers, "inhibition."))
    return own(routers, "inhibition.")


def own(stats, prefix):
    return {name.removeprefix(prefix): stat for name, stat in stats.items() if name.startswith(prefix)}


def test_the_sketch_estimates_the_similarity_of_the_weights():
    moe = make_moe()
    pair_up(moe, like=0.5)
    estimate = similarity_of(moe._sketch())
    truth = cosines(moe).detach().clamp(0, 1).fill_diagonal_(0)
    assert (estimate - truth).abs().max() < 0.35  # random signs: the deviation is about 0.1
    assert (estimate - truth).abs().mean() < 0.08
    assert torch.equal(estimate.diagonal(), torch.zeros(8))


def test_similarity_is_measured_in_some_steps_only_and_applied_after_them():
    moe = make_moe(refresh_steps=3)
    pair_up(moe)
    x = torch.randn(2, 8, 32)
    measured = ["similarity" in step(moe, number, x) for number in range(5)]
    assert measured == [True, False, False, True, False]
    assert moe.router.inhibition.similarity_EE[0, 1] > 0.9 and moe.router.inhibition.similarity_EE[0, 2] < 0.4
    moe.router.inhibition.before_step(6)
    before = moe.router.inhibition.similarity_EE.clone()
    moe(x)
    assert torch.equal(moe.router.inhibition.similarity_EE, before)  # a forward pass changes nothing
    moe.eval()
    assert "router.inhibition.similarity" not in moe(x)[1].stats


def test_measured_in_parts_as_in_one():
    moe = make_moe()
    pair_up(moe)
    moe.router.inhibition.before_step(0)
    x = torch.randn(4, 8, 32)
    whole = moe(x)[1].stats["router.inhibition.similarity"]
    first, second = (moe(part)[1].stats["router.inhibition.similarity"] for part in x.chunk(2))
    torch.testing.assert_close((first + second).value, whole.value)


@pytest.mark.parametrize("strength", [0.0, 0.3, 2.0])
def test_the_choice_by_hand(strength):
    router = make_moe(strength=strength).router
    torch.manual_seed(1)
    similarity = torch.rand(8, 8)
    with torch.no_grad():
        router.inhibition.similarity_EE.copy_(similarity)
        router.bias.copy_(torch.randn(8) * 0.1)
    x = torch.randn(1, 40, 32)
    routing = router(x)
    for n, x_D in enumerate(x[0]):
        scores = (router.weight @ x_D).sigmoid().tolist()
        standing, chosen = [s + b for s, b in zip(scores, router.bias.tolist(), strict=True)], []
        for _ in range(3):
            winner = max((e for e in range(8) if e not in chosen), key=lambda e: standing[e])
            chosen.append(winner)
            standing = [s - strength * scores[winner] * similarity[winner, e].item()
                        for e, s in enumerate(standing)]
        assert routing.experts_NK[n].tolist() == chosen
        weights = torch.tensor([scores[e] for e in chosen])
        torch.testing.assert_close(routing.weights_NK[n], weights / weights.sum())


def test_no_strength_is_plain_top_k():
    router = make_moe(strength=0.0).router
    plain = TopKRouter(TopKRouter.Config(), SITE, 8, 3)
    plain.reset_parameters()
    with torch.no_grad():
        plain.weight.copy_(router.weight)
        router.inhibition.similarity_EE.fill_(1)
    x = torch.randn(2, 50, 32)
    assert torch.equal(router(x).experts_NK, plain(x).experts_NK)
    assert torch.equal(router(x).weights_NK, plain(x).weights_NK)


def test_of_two_alike_the_choice_of_one_lowers_the_chance_of_the_other():
    torch.manual_seed(5)
    x = torch.randn(8, 64, 32)
    together, distance, reported = {}, {}, {}
    for strength in (0.0, 0.5):
        moe = make_moe(top_k=2, strength=strength)
        pair_up(moe)
        with torch.no_grad():  # twins are asked for alike
            moe.router.weight[1::2] = moe.router.weight[0::2] + 0.1 * torch.randn(4, 32)
            moe.router.weight.mul_(0.2)
        step(moe, 0, x)
        experts = moe.router(x).experts_NK
        has = torch.zeros(len(experts), 8).scatter_(1, experts, 1.0)
        together[strength] = (has[:, 0] * has[:, 1]).sum() / has[:, 0].sum()
        distance[strength] = (1 - cosines(moe).detach())[experts[:, 0], experts[:, 1]].mean()
        reported[strength] = moe.router.inhibition.metrics(step(moe, 1, x))["chosen_similarity"]
    assert together[0.0] > 0.7 and together[0.5] < 0.5 * together[0.0]
    assert distance[0.5] > distance[0.0] + 0.3
    assert 0 <= reported[0.5] < reported[0.0] - 0.3 <= 1
