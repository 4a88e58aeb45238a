"""Winners suppress what resembles them: similarity measured from weights, and what it does to the choice."""

import math
from dataclasses import dataclass

import pytest
import torch

from tryplicity import Activation, Linear, Part, Report, Router, Routing, Site, UserError, uses
from tryplicity.spec import load_spec, parse_yaml
from tryplicity_plugins.brain.dynamic_sparsity import DynamicSparsityRouter
from tryplicity_plugins.brain.lateral_inhibition import LateralInhibition, LateralInhibitionRouter, similarity_of
from tryplicity_plugins.layers.moe import MixtureOfExperts
from tryplicity_plugins.layers.moe_repair import sketch
from tryplicity_plugins.layers.router import TopKRouter

SITE = Site(hidden_size=32, vocab_size=64, context_length=64, layers=4, linear_part=Part(Linear, None))


class Identity(Activation):
    name = "test_identity"

    def __init__(self, config, features, groups=None):
        super().__init__()

    def forward(self, x, group=None):
        return x


def make_moe(experts=8, top_k=3, router=None, **options):
    torch.manual_seed(0)
    router = router or Part(LateralInhibitionRouter, LateralInhibitionRouter.Config(**options))
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
    for module in moe.modules():
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
    estimate = similarity_of(sketch([moe.gate_up, moe.down]))
    truth = cosines(moe).detach().clamp(0, 1).fill_diagonal_(0)
    assert (estimate - truth).abs().max() < 0.35  # random signs: the deviation is about 0.1
    assert (estimate - truth).abs().mean() < 0.08
    assert torch.equal(estimate.diagonal(), torch.zeros(8))


def test_similarity_is_measured_before_some_steps_only():
    moe = make_moe(refresh_steps=3)
    inhibition, x = moe.router.inhibition, torch.randn(2, 8, 32)
    measured = ["similarity" in inhibition.metrics(step(moe, number, x)) for number in range(5)]
    assert measured == [True, False, False, True, False]
    pair_up(moe)
    before = inhibition.similarity_EE.clone()
    step(moe, 5, x)
    assert torch.equal(inhibition.similarity_EE, before)
    logged = inhibition.metrics(step(moe, 6, x))["similarity"]
    assert inhibition.similarity_EE[0, 1] > 0.9 and inhibition.similarity_EE[0, 2] < 0.4
    assert logged == pytest.approx(inhibition.similarity_EE.sum().item() / (8 * 7))


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


def inhibiting(**options):
    return Part(LateralInhibition, LateralInhibition.Config(**options))


def test_with_as_many_experts_as_a_token_needs_by_hand():
    """Each winner inhibits the next; how many there are, and how much of the last, is the difficulty's."""
    strength = 0.8
    router = make_moe(router=Part(DynamicSparsityRouter, DynamicSparsityRouter.Config(
        min_experts=1, max_experts=5, mean_experts=3, inhibition=inhibiting(strength=strength)))).router
    torch.manual_seed(1)
    similarity = torch.rand(8, 8)
    with torch.no_grad():
        router.inhibition.similarity_EE.copy_(similarity)
        router.difficulty_D.normal_(std=0.3)
        router.bias.copy_(torch.randn(8) * 0.1)
    x, resemblance, pairs = torch.randn(1, 40, 32), 0.0, 0
    routing = router(x)
    for n, x_D in enumerate(x[0]):
        kappa = float(1 + 4 * (0.5 + (router.difficulty_D.detach() @ x_D + router.offset) / 4).clamp(0, 1))
        scores = (router.weight @ x_D).sigmoid().tolist()
        standing, chosen = [s + b for s, b in zip(scores, router.bias.tolist(), strict=True)], []
        for _ in range(math.ceil(kappa)):
            winner = max((e for e in range(8) if e not in chosen), key=lambda e: standing[e])
            resemblance += sum(similarity[before, winner].item() for before in chosen)
            pairs += len(chosen)
            chosen.append(winner)
            standing = [s - strength * scores[winner] * similarity[winner, e].item() for e, s in enumerate(standing)]
        k = len(chosen)
        assert routing.experts_NK[n].tolist() == chosen + [8] * (5 - k)
        weights = torch.tensor([scores[e] * min(1.0, kappa - j) for j, e in enumerate(chosen)])
        torch.testing.assert_close(routing.weights_NK[n, :k], weights / weights.sum(), rtol=1e-4, atol=1e-5)
    assert len(set((routing.experts_NK < 8).sum(-1).tolist())) > 2
    said = own(routing.report.stats, "inhibition.")
    assert router.inhibition.metrics(said)["chosen_similarity"] == pytest.approx(resemblance / pairs, rel=1e-4)


def test_the_router_of_that_name_is_top_k_with_the_option():
    own_name = make_moe(strength=0.7).router
    option = make_moe(router=Part(TopKRouter, TopKRouter.Config(inhibition=inhibiting(strength=0.7)))).router
    option.load_state_dict(own_name.state_dict())
    for router in (own_name, option):
        router.inhibition.similarity_EE.copy_(torch.rand(8, 8, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 50, 32)
    plain = TopKRouter(TopKRouter.Config(), SITE, 8, 3)
    plain.load_state_dict(own_name.state_dict(), strict=False)
    assert torch.equal(own_name(x).experts_NK, option(x).experts_NK)
    assert torch.equal(own_name(x).weights_NK, option(x).weights_NK)
    assert not torch.equal(own_name(x).experts_NK, plain(x).experts_NK)


class Strangers(Router):
    """A router of someone else's: softmax, the best few, with the option that all of the project's have."""

    name = "test_strangers"

    @dataclass(frozen=True)
    class Config:
        inhibition: Part | None = uses("inhibition", optional=True)

    def __init__(self, config, site, experts, top_k):
        super().__init__()
        self.max_k = self.mean_k = top_k
        self.weight = torch.nn.Parameter(torch.empty(experts, site.hidden_size))
        self.inhibition = config.inhibition.build(experts)

    def reset_parameters(self):
        torch.nn.init.normal_(self.weight)

    def forward(self, x_BTD):
        scores_NE = (x_BTD.flatten(0, 1) @ self.weight.T).softmax(-1)
        chosen = scores_NE.detach()
        experts_NK, said = self.inhibition.choose(chosen, chosen, self.max_k)
        report = Report()
        report.include("inhibition", said)
        return Routing(experts_NK, scores_NE.gather(1, experts_NK), report)


def test_a_stranger_s_router_is_inhibited_with_the_same_option():
    moe = make_moe(top_k=2, router=Part(Strangers, Strangers.Config(inhibition=inhibiting(strength=3.0))))
    pair_up(moe)
    with torch.no_grad():  # twins are asked for alike
        moe.router.weight[1::2] = moe.router.weight[0::2]
    x = torch.randn(4, 32, 32)
    before = moe.router(x).experts_NK
    assert (before[:, 0] // 2 == before[:, 1] // 2).float().mean() > 0.9
    assert "similarity" in moe.router.inhibition.metrics(step(moe, 0, x)), "the layer gives it its weights' sketch"
    assert moe.router.inhibition.similarity_EE[0, 1] > 0.9
    after = moe.router(x).experts_NK
    assert (after[:, 0] // 2 == after[:, 1] // 2).float().mean() < 0.1


def test_two_inhibitions_are_refused_where_they_stand(registry):
    text = """
name: two
vocab_size: 300
hidden_size: 32
context_length: 16
blocks:
  a:
    mixer: {type: gqa, heads: 2, kv_heads: 1, head_dim: 16}
    feed_forward: {type: moe, experts: 4, router: {type: lateral_inhibition, inhibition: lateral_inhibition}}
layers: [a]
"""
    with pytest.raises(UserError, match=r"two.yaml:9:90: .*router.inhibition: this router has its own, by strength"):
        load_spec(parse_yaml(text, "two.yaml"), registry)
    load_spec(parse_yaml(text.replace("type: lateral_inhibition,", "type: top_k,"), "two.yaml"), registry)
