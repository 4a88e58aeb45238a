"""Experts, routers and gated products as they decode: against the PyTorch paths, and the same bits for each token."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tryplicity import Activation, Linear, Part, Report, Routing, Site, kernels
from tryplicity_plugins.brain.dynamic_sparsity import DynamicSparsityRouter
from tryplicity_plugins.brain.lateral_inhibition import LateralInhibition, LateralInhibitionRouter
from tryplicity_plugins.brain.spike import Spike
from tryplicity_plugins.layers import native
from tryplicity_plugins.layers.activations import GELU, ReLU2, SiLU, decoded
from tryplicity_plugins.layers.bitlinear import BitLinear
from tryplicity_plugins.layers.gated_mlp import GatedMLP
from tryplicity_plugins.layers.moe import MixtureOfExperts
from tryplicity_plugins.layers.moe_decoding import decode_packed, pairs
from tryplicity_plugins.layers.multi_token import MultiTokenPrediction
from tryplicity_plugins.layers.norms import RMSNorm
from tryplicity_plugins.layers.router import BalancedRouter, TopKRouter

D, E, INNER = 96, 6, 40
SITE = Site(hidden_size=D, vocab_size=64, context_length=64, layers=4, linear_part=Part(BitLinear, None))


class Halves(Activation):
    """One that C does not know; twice as strong for odd groups."""

    name = "test_halves"

    def __init__(self, config, features, groups=None):
        super().__init__()

    def forward(self, x, group=None):
        y = x.tanh()
        return y if group is None else y * (1 + group % 2)[:, None]


class Sometimes(BalancedRouter):
    """A stranger's: by the sign of the first number no expert, or experts 4 and 1."""

    name = "test_sometimes"

    def forward(self, x_BTD):
        none_N1 = x_BTD.reshape(-1, x_BTD.shape[-1])[:, :1] < 0
        experts_NK = torch.tensor([[4, 1]]).expand(len(none_N1), -1).masked_fill(none_N1, self.experts)
        return Routing(experts_NK, torch.tensor([[0.3, 0.7]]).masked_fill(none_N1, 0.0), Report())


ROUTERS = {
    "top_k": Part(TopKRouter, TopKRouter.Config()),
    "softmax": Part(TopKRouter, TopKRouter.Config(score="softmax")),
    "raw": Part(TopKRouter, TopKRouter.Config(normalize=False)),
    "groups": Part(TopKRouter, TopKRouter.Config(groups=3, groups_kept=2, scale=2.5)),
    "dynamic_sparsity": Part(DynamicSparsityRouter, DynamicSparsityRouter.Config(min_experts=1, max_experts=5,
                                                                                 mean_experts=3)),
    "lateral_inhibition": Part(LateralInhibitionRouter, LateralInhibitionRouter.Config(strength=0.5)),
    "both": Part(DynamicSparsityRouter, DynamicSparsityRouter.Config(
        min_experts=1, max_experts=5, mean_experts=3,
        inhibition=Part(LateralInhibition, LateralInhibition.Config(strength=0.5)))),
}
ACTIVATIONS = {"silu": Part(SiLU, None), "gelu": Part(GELU, None), "relu2": Part(ReLU2, None),
               "spike": Part(Spike, Spike.Config()), "halves": Part(Halves, None)}
every_router = pytest.mark.parametrize("router", ROUTERS)


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def made(build, seed=0):
    with torch.device("meta"):
        module = build()
    module.to_empty(device="cpu")
    torch.manual_seed(seed)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if "similarity" in name:
            value.uniform_()
        elif value.ndim:
            value.normal_(std=0.1)
    return module.eval()


def moe(router="top_k", activation="silu", shared=1, seed=0):
    return made(lambda: MixtureOfExperts(MixtureOfExperts.Config(
        experts=E, top_k=2, inner_size=INNER, shared_experts=shared, shared_inner_size=24,
        activation=ACTIVATIONS[activation], router=ROUTERS[router]), SITE), seed)


def packed(module):
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, Linear):
            part.adopt(part.pack())
    return module


def tokens(count, seed=3):
    torch.manual_seed(seed)
    return torch.randn(count, D)


def assert_near(actual, expected):
    """Equal but for a few numbers that were rounded to the next of the 127 steps on the way."""
    error = (actual - expected).abs() / expected.abs().max()
    assert error.max() < 2e-2 and (error > 1e-5).float().mean() < 0.2, error


# --- the router ---


@every_router
def test_the_choice_is_that_of_forward(router):
    layer = moe(router)
    x = tokens(200)
    found = layer.router.pairs(x)
    assert found is not None
    routing = layer.router(x[None])
    used = routing.experts_NK < E
    assert torch.equal(found[0], used.nonzero()[:, 0]) and torch.equal(found[1], routing.experts_NK[used])
    torch.testing.assert_close(found[2], routing.weights_NK[used], rtol=1e-5, atol=1e-6)
    if router == "dynamic_sparsity":  # some tokens leave slots unused
        assert len(set(used.sum(-1).tolist())) > 1


@every_router
def test_a_choice_has_the_same_bits_whatever_other_tokens_there_are(router):
    layer, x = moe(router).router, tokens(40)
    whole = layer.pairs(x)
    parts = [layer.pairs(part) for part in x.split([1, 1, 30, 8])]
    assert torch.equal(whole[1], torch.cat([part[1] for part in parts]))
    assert torch.equal(whole[2], torch.cat([part[2] for part in parts]))


def test_equal_scores_go_to_the_first():
    layer = moe("top_k").router
    layer.weight.zero_()
    layer.bias.zero_()
    assert layer.pairs(tokens(1))[1].tolist() == [0, 1]
    layer.bias[4] = 1
    assert layer.pairs(tokens(1))[1].tolist() == [4, 0]
    torch.testing.assert_close(layer.pairs(tokens(1))[2], torch.tensor([0.5, 0.5]))


# --- the gated product ---


@pytest.mark.parametrize("kind", ["silu", "gelu", "relu2", "spike"])
@pytest.mark.parametrize("rows, features", [(1, 8), (3, 37), (200, 130)])
def test_the_gated_product_is_that_of_pytorch(kind, rows, features):
    activation = made(lambda: ACTIVATIONS[kind].build(features))
    gate_up = torch.randn(rows, 2 * features) * 3
    gate_up[0, :4] = torch.tensor([0.0, -30.0, 90.0, -1e-30])
    expected = activation(gate_up[:, :features]) * gate_up[:, features:]
    actual = decoded(activation, gate_up, gate=True)
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=5e-6)  # of gelu torch's is the less exact
    assert torch.equal(torch.cat([decoded(activation, row, gate=True) for row in gate_up.split(1)]), actual)
    alone = decoded(activation, gate_up[:, :features].contiguous(), gate=False)
    assert torch.equal(alone, decoded(activation, torch.cat((gate_up[:, :features], torch.ones(rows, features)), -1),
                                      gate=True))
    if kind == "spike":
        assert torch.equal(actual, expected) and 0.1 < (actual == 0).float().mean() < 0.9


def test_gelu_keeps_its_relative_precision():
    x = -torch.linspace(0.01, 5, 400)
    got = decoded(GELU(None, 400), torch.cat((x, torch.ones(400)))[None], gate=True)[0]
    exact = (0.5 * x.double() * torch.special.erfc(-x.double() / 2**0.5)).float()
    torch.testing.assert_close(got, exact, rtol=3e-6, atol=0)


def test_thresholds_are_those_of_the_rows_expert():
    spike = made(lambda: ACTIVATIONS["spike"].build(37, groups=4))
    gate_up, group = torch.randn(50, 74), torch.randint(4, (50,))
    expected = spike(gate_up[:, :37], group) * gate_up[:, 37:]
    assert torch.equal(decoded(spike, gate_up, group, gate=True), expected)
    alone = made(lambda: ACTIVATIONS["spike"].build(37))  # one for all: groups do not matter to it
    assert torch.equal(decoded(alone, gate_up, group, gate=True), alone(gate_up[:, :37]) * gate_up[:, 37:])


def test_pytorch_does_what_c_does_not():
    gate_up, group = torch.randn(5, 12), torch.tensor([0, 1, 2, 3, 3])
    assert torch.equal(decoded(Halves(None, 6, 4), gate_up, group, gate=True),
                       gate_up[:, :6].tanh() * (1 + group % 2)[:, None] * gate_up[:, 6:])
    assert decoded(SiLU(None, 6), gate_up.double(), gate=True).dtype == torch.float64
    with torch.enable_grad():
        leaf = gate_up.clone().requires_grad_()
        decoded(SiLU(None, 6), leaf, gate=True).sum().backward()
        assert leaf.grad is not None


# --- experts ---


def one_by_one(layer, x_ND):
    """Each token alone through each of its experts as a plain gated MLP of unpacked weights."""
    rows, experts, weights = pairs(layer.router, E, x_ND)
    out_ND = torch.zeros_like(x_ND)
    for row, expert, weight in zip(rows.tolist(), experts.tolist(), weights.tolist(), strict=True):
        prepared = layer.gate_up.effective_input(x_ND[row])
        gate, up = (layer.gate_up.expert_weight(expert) @ prepared).chunk(2)
        gate = layer.activation(gate[None], torch.tensor([expert]))[0]
        out_ND[row] += weight * (layer.down.expert_weight(expert) @ layer.down.effective_input(gate * up))
    if layer.config.shared_experts:
        gate, up = layer.shared_gate_up(x_ND).chunk(2, -1)
        out_ND += layer.shared_down(layer.shared_activation(gate) * up)
    return out_ND


@pytest.mark.parametrize("router, activation, shared", [
    ("top_k", "silu", 1), ("softmax", "gelu", 0), ("raw", "relu2", 2), ("dynamic_sparsity", "spike", 1),
    ("lateral_inhibition", "spike", 0), ("lateral_inhibition", "halves", 1), ("both", "spike", 1)])
@pytest.mark.parametrize("count", [1, 2, 33])
def test_packed_experts_are_the_unpacked_ones(router, activation, shared, count):
    layer, x = moe(router, activation, shared), tokens(count)
    ours = packed(layer)
    assert ours.down.weight is None
    actual = ours(x[None])
    assert actual.shape == (1, count, D)
    assert_near(actual[0], one_by_one(layer, x))
    generic = layer(x[None])  # what the unpacked layer itself gives
    assert_near(actual, generic[0] if isinstance(generic, tuple) else generic)


@every_router
@pytest.mark.parametrize("activation", ["silu", "spike"])
def test_a_token_has_the_same_bits_alone_in_a_chunk_or_beside_others(router, activation):
    layer, x = packed(moe(router, activation)), tokens(50)
    before, whole = torch.get_num_threads(), layer(x[None])[0]
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for sizes in ([1] * 50, [49, 1], [7, 43]):
                assert torch.equal(torch.cat([layer(part[None])[0] for part in x.split(sizes)]), whole)
            assert torch.equal(layer(x.view(25, 2, D)).view(50, D), whole)
            assert torch.equal(decode_packed(layer, x), whole)  # part by part, as where C does not know them all
    finally:
        torch.set_num_threads(before)


def test_where_a_token_has_no_expert_only_the_shared_one_speaks():
    for shared in (0, 1):
        layer = moe(shared=shared)
        layer.router = Sometimes(BalancedRouter.Config(), SITE, E, 2)
        ours, x = packed(layer), tokens(20)
        assert_near(ours(x[None])[0], one_by_one(layer, x))
        without = x[x[:, 0] < 0]
        assert 0 < len(without) < 20
        alone = ours(without[None])[0]  # no pair at all
        if shared:
            gate, up = ours.shared_gate_up(without).chunk(2, -1)
            assert_near(alone, ours.shared_down(F.silu(gate) * up))
        else:
            assert torch.equal(alone, torch.zeros_like(without))


@pytest.mark.parametrize("router, activation", [("dynamic_sparsity", "silu"), ("lateral_inhibition", "spike")])
def test_without_a_compiler(router, activation, monkeypatch):
    layer, x = moe(router, activation), tokens(9)
    expected = packed(layer)(x[None])
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "_functions", {})
    monkeypatch.setattr(kernels.library, "library", lambda: None)
    plain = packed(layer)
    assert plain.router.pairs(x) is None and plain.down.matrix._library is None
    assert_near(plain(x[None]), expected)


def test_a_copy_and_a_moved_weight():
    layer, x = packed(moe()), tokens(3)[None]
    expected = layer(x)
    twin = copy.deepcopy(layer)
    twin.router.weight.data = twin.router.weight.data.flip(0).contiguous()
    assert not torch.equal(twin(x), expected)
    twin.router.weight.data = layer.router.weight.data.clone()
    assert torch.equal(twin(x), expected) and torch.equal(layer(x), expected)
    linear = copy.deepcopy(layer.down)
    twin.down.matrix = kernels.TernaryMatrix.from_digits(-linear.matrix.digits(), linear.matrix.scale_E)
    twin.shared_down.matrix = kernels.TernaryMatrix.from_digits(-layer.shared_down.matrix.digits(),
                                                                layer.shared_down.matrix.scale_E)
    assert torch.equal(twin(x), -expected)


def test_other_dtypes_come_back_as_they_went():
    layer, x = moe(), tokens(4)
    half = packed(layer)(x[None].bfloat16())
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(half.float().flatten(), packed(layer)(x[None]).flatten(), dim=0) > 0.99


# --- the dense feed-forward and the further tokens ---


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_packed_gated_mlp(activation):
    layer = made(lambda: GatedMLP(GatedMLP.Config(inner_size=130, activation=ACTIVATIONS[activation]), SITE))
    ours, x = packed(layer), tokens(12)
    gate, up = layer.gate_up(x).chunk(2, -1)
    whole = ours(x[None])
    assert_near(whole[0], layer.down(layer.activation(gate) * up))
    if activation != "halves":
        assert torch.equal(whole, torch.cat([ours(row[None, None]) for row in x], 1))


def test_packed_draft_of_further_tokens():
    site = replace(SITE, norm_part=Part(RMSNorm, RMSNorm.Config()))
    head = made(lambda: MultiTokenPrediction(MultiTokenPrediction.Config(tokens=3, inner_size=64), site))
    x = tokens(5)[None]
    expected = []
    for depth in head.depths:
        gate, up = depth.gate_up(depth.norm(x)).chunk(2, -1)
        expected.append(x + depth.down(F.silu(gate) * up))
    assert_near(packed(head).draft(x), torch.stack(expected, -2))


@pytest.mark.parametrize("replace_in", ["router.weight", "router.bias", "activation.offset", "activation", "router"])
def test_what_was_replaced_is_noticed(replace_in):
    """C keeps addresses: a parameter, a buffer or a whole part in the place of another is another."""
    layer, x = packed(moe("top_k", "spike")), tokens(1)[None]
    before = layer(x)
    path, _, name = replace_in.rpartition(".")
    owner = layer.get_submodule(path)
    other = copy.deepcopy(getattr(owner, name))
    with torch.no_grad():
        for tensor in [other] if isinstance(other, torch.Tensor) else [*other.parameters(), *other.buffers()]:
            tensor.normal_(std=0.5)
    setattr(owner, name, other)
    after = layer(x)
    assert torch.equal(after, copy.deepcopy(layer)(x)) and not torch.equal(after, before)


def test_a_subclass_that_does_otherwise_is_not_done_in_c():
    """It inherits what C is told of its parent, and C would do what the parent does."""
    from tryplicity_plugins.layers.activations import ReLU2, SiLU, gate_in_c
    from tryplicity_plugins.layers.router import TopKRouter, router_in_c

    class Other(TopKRouter):
        def weigh(self, scores_NK):
            return torch.ones_like(scores_NK)

    class Twice(SiLU):
        def forward(self, x, group=None):
            return 2 * super().forward(x)

    class Renamed(ReLU2):
        name = "renamed"

    class Site:
        hidden_size = 8

    assert router_in_c(Other(TopKRouter.Config(), Site, 4, 2)) is None
    assert router_in_c(TopKRouter(TopKRouter.Config(), Site, 4, 2)) is not None
    assert gate_in_c(Twice(None, 8)) is None
    assert gate_in_c(Renamed(None, 8)) is not None
