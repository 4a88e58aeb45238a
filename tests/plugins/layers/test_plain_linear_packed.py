"""Layers of plain linears kept in int8 or bf16: what they give with the weights rounded by hand, in one call of C."""

import copy

import pytest
import torch

from tests.plugins.layers.test_moe_packed import ROUTERS, made, tokens
from tryplicity import Linear, Part, Rows, Site
from tryplicity_plugins.layers.activations import SiLU
from tryplicity_plugins.layers.attention import GroupedQueryAttention
from tryplicity_plugins.layers.gated_mlp import GatedMLP
from tryplicity_plugins.layers.linear import PlainLinear
from tryplicity_plugins.layers.mamba2 import Mamba2
from tryplicity_plugins.layers.moe import MixtureOfExperts
from tryplicity_plugins.layers.norms import RMSNorm

D, LENGTH = 96, 100
SITE = Site(hidden_size=D, vocab_size=64, context_length=256, layers=4, linear_part=Part(PlainLinear, None),
            norm_part=Part(RMSNorm, RMSNorm.Config()))
LAYERS = {
    "gqa": lambda: GroupedQueryAttention(GroupedQueryAttention.Config(heads=4, kv_heads=2), SITE),
    "qk_norm": lambda: GroupedQueryAttention(GroupedQueryAttention.Config(heads=4, kv_heads=2, qk_norm=True), SITE),
    "mamba2": lambda: Mamba2(Mamba2.Config(state_size=16, head_dim=32), SITE),
    "gated_mlp": lambda: GatedMLP(GatedMLP.Config(inner_size=56, activation=Part(SiLU, None)), SITE),
    "moe": lambda: MixtureOfExperts(MixtureOfExperts.Config(
        experts=6, top_k=2, inner_size=40, shared_inner_size=24, activation=Part(SiLU, None),
        router=ROUTERS["top_k"]), SITE),
}
WHOLE = {"gqa": "qkv", "mamba2": "matrices", "gated_mlp": "gate_up", "moe": "gate_up"}  # where C is told of a matrix


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def linears(module):
    return [part for part in module.modules() if isinstance(part, Linear)]


def pair(name, form):
    """(the layer with its weights rounded by hand, the layer that keeps them so)."""
    rounded = made(LAYERS[name])
    kept = copy.deepcopy(rounded)
    for linear in linears(rounded):
        if form == "bf16":
            linear.weight.copy_(linear.weight.bfloat16())
        else:
            step = linear.weight.abs().amax(-1, keepdim=True) / 127
            linear.weight.copy_((linear.weight / step).round() * step)
    for linear in linears(kept):
        linear.form = form
        linear.adopt(linear.pack())
        assert linear.weight is None
    return rounded, kept


def run(layer, x_BTD, sizes):
    state = layer.new_state(len(x_BTD)) if hasattr(layer, "new_state") else None
    found = []
    for x in x_BTD.split(sizes, dim=1):
        y = layer(x.contiguous(), state=state)
        found.append(y if torch.is_tensor(y) else y[0])
    return torch.cat(found, 1)


@pytest.mark.parametrize("form", ["int8", "bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_layer_of_the_rounded_weights_in_any_pieces(name, form):
    rounded, kept = pair(name, form)
    x_BTD = tokens(2 * LENGTH).view(2, LENGTH, D)
    whole = run(kept, x_BTD, [LENGTH])
    expected = run(rounded, x_BTD, [LENGTH])
    assert (whole - expected).abs().max() < 1e-5 * expected.abs().max() + 1e-6
    assert torch.equal(run(kept, x_BTD, [37, LENGTH - 37]), whole)
    assert torch.equal(run(kept, x_BTD, [1] * 20 + [LENGTH - 20]), whole)
    if name in WHOLE:
        told = getattr(kept.__dict__["_c_struct"].struct, WHOLE[name])
        assert all(told) if name == "mamba2" else told


@pytest.mark.parametrize("name", ["gqa", "mamba2"])
def test_beside_others_it_has_the_same_bits(name):
    _, kept = pair(name, "int8")
    x_BTD = tokens(LENGTH).view(1, LENGTH, D)
    whole = run(kept, x_BTD, [LENGTH])
    rows = [kept.new_state(1) for _ in range(2)]
    for state, seen in zip(rows, (1, 64), strict=True):
        kept(x_BTD[:, :seen].contiguous(), state=state)
    together = kept(torch.cat([x_BTD[:, 1:2], x_BTD[:, 64:65]]), state=Rows(rows))
    assert torch.equal(together, torch.cat([whole[:, 1:2], whole[:, 64:65]]))


def test_biases_and_other_dtypes():
    linear = made(lambda: PlainLinear(None, D, 50, bias=True))
    x_ND = tokens(7)
    expected = linear(x_ND)
    linear.form = "bf16"
    linear.adopt(linear.pack())
    torch.testing.assert_close(linear(x_ND), expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(linear(x_ND.bfloat16()), linear(x_ND.bfloat16().float()).bfloat16())
    torch.testing.assert_close(linear.unpack(), linear.matrix.data[0].float())


def test_unasked_it_packs_to_nothing():
    linear = made(lambda: PlainLinear(None, D, 50))
    assert linear.packed_like() == {} and linear.pack() is None and linear.packed_bits == 16
    linear.form = "int8"
    assert linear.packed_bits == 8 + 32 / D
