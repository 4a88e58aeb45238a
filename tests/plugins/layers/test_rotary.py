"""How rotations are slowed down: by properties of the papers; against transformers in test_published_attention."""

import copy
import math
import pickle

import pytest
import torch
from layer_tools import assemble
from torch import nn
from torch._subclasses import fake_tensor

from tryplicity import UserError
from tryplicity.spec import load_spec, parse_yaml
from tryplicity_plugins.layers.rotary import RopeScaling, Rotary, speeds

LLAMA3 = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
YARN = RopeScaling("yarn", 4.0, original_context=4096)


def test_linear_is_positions_divided():
    whole, slow = (assemble(lambda s=s: Rotary(10000.0, 64, s, 100)) for s in (None, RopeScaling("linear", 4.0)))
    torch.testing.assert_close(slow.rotation[::4], whole.rotation[:25], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scaling, kept, slowed", [(LLAMA3, 4, 1), (YARN, 64, 0.5)])
def test_fast_pairs_turn_as_before_and_slow_ones_by_the_factor(scaling, kept, slowed):
    plain, found = speeds(500000.0, 128, None)[0], speeds(500000.0, 128, scaling)[0]
    turns = scaling.original_context * plain / (2 * math.pi)
    assert torch.equal(found[turns > kept], plain[turns > kept])
    torch.testing.assert_close(found[turns < slowed], plain[turns < slowed] / scaling.factor)
    ratio = (found / plain).diff()
    assert (ratio <= 1e-12).all() and ratio.min() < 0


def test_yarn_sharpens_attention():
    assert speeds(10000.0, 64, YARN)[1] == pytest.approx(0.1 * math.log(4) + 1)
    rotary = assemble(lambda: Rotary(10000.0, 64, RopeScaling("yarn", 4.0, 4096, attention_factor=1.5), 10))
    torch.testing.assert_close(rotary.rotation.norm(dim=-1), torch.full((10, 32), 1.5))


@torch.no_grad()
def test_only_the_first_dimensions_are_turned_and_by_what_they_would_be_alone():
    whole = assemble(lambda: Rotary(100.0, 4, None, 4))
    assert len(whole.rotation) == 4
    part, x = assemble(lambda: Rotary(100.0, 4, None, 16)), torch.randn(2, 9, 3, 10)
    y = part(x, 5)
    assert torch.equal(y[..., 4:], x[..., 4:]) and torch.equal(y[..., :4], whole(x[..., :4].contiguous(), 5))
    whole(torch.randn(1, 30, 1, 4), 0)
    assert len(whole.rotation) == 64  # a longer text made more of them


def stack(layers=3, base=123.0):
    return nn.ModuleList(Rotary(base, 8, None, 32) for _ in range(layers))


@torch.no_grad()
def test_layers_that_turn_alike_have_one_table():
    """On the meta device, with memory, copied, moved, pickled, and after a longer text; another base has its own."""
    with torch.device("meta"):
        model = stack()
    assert len(list(model.buffers())) == 1 and len(list(stack(2, base=7.0).buffers())) == 2
    model = assemble(stack)
    tables = {id(one.rotation) for one in model}
    assert len(tables) == 1 and {id(one.rotation) for one in assemble(stack)} == tables  # of another model too
    other, x = assemble(lambda: stack(base=7.0)), torch.randn(1, 20, 2, 8)
    wanted = model[0](x, 3)
    assert not torch.equal(other[0](x, 3), wanted)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).bfloat16().float()):
        assert torch.equal(again[0](x, 3), wanted) and again[0].rotation is model[0].rotation
    model[1](torch.randn(1, 100, 2, 8), 0)
    assert torch.equal(model[0](x, 3), wanted)
    assert model[0].rotation is model[1].rotation and len(model[0].rotation) == 128


def test_a_table_made_while_inferring_can_be_learnt_with():
    with torch.inference_mode():
        one = assemble(lambda: Rotary(321.0, 8, None, 16))
        one(torch.randn(1, 70, 1, 8), 0)
    two = assemble(lambda: Rotary(321.0, 8, None, 16))
    x = torch.randn(1, 9, 1, 8, requires_grad=True)
    two(x, 0).sum().backward()
    assert x.grad is not None and two.rotation is one.rotation


def test_making_a_model_leaves_the_tables_of_others_as_they_are():
    one = assemble(lambda: Rotary(55.0, 8, None, 16))
    before = one.rotation.clone()
    with torch.device("meta"):
        another = stack(base=55.0)
    another.to_empty(device="cpu")
    for buffer in another.buffers():
        buffer.fill_(torch.nan)
    assert torch.equal(one.rotation, before)
    with fake_tensor.FakeTensorMode():
        fake = Rotary(55.0, 8, None, 16)
        fake.reset_parameters()
        assert fake.rotation is not one.rotation and fake(torch.randn(1, 70, 1, 8), 0).shape == (1, 70, 1, 8)
    assert type(assemble(lambda: Rotary(55.0, 8, None, 16)).rotation) is torch.Tensor


@pytest.mark.parametrize("said, words", [
    ("{type: yarn, factor: 4}", "rope_scaling: yarn needs original_context too; add it"),
    ("{type: llama3, factor: 4, original_context: 64}", "llama3 needs low_freq_factor, high_freq_factor too"),
    ("{type: linear, factor: 4, beta_fast: 3}", "rope_scaling: linear takes no beta_fast; leave it out"),
    ("{type: ntk, factor: 4}", "rope_scaling.type: expected one of linear, llama3, yarn, got the text 'ntk'"),
    ("{type: linear, factor: 0.5}", "rope_scaling.factor: expected a number from 1"),
    ("{type: llama3, factor: 8, low_freq_factor: 4, high_freq_factor: 1, original_context: 64}",
     "low_freq_factor (4) must be below high_freq_factor (1)"),
    ("{type: yarn, factor: 4, original_context: 64, beta_slow: 40}", "beta_slow (40) must be below beta_fast (32)"),
    ("{type: yarn, factor: 4, original_max_position_embeddings: 64}",
     "original_max_position_embeddings: unknown key (th"),
    ("linear", "rope_scaling: expected a mapping, got the text 'linear'"),
])
def test_mistakes(registry, said, words):
    text = ("name: s\nvocab_size: 300\nhidden_size: 32\ncontext_length: 64\n"
            f"layers: [{{mixer: {{type: gqa, heads: 4, rope_scaling: {said}}}}}]")
    with pytest.raises(UserError) as caught:
        load_spec(parse_yaml(text, "s.yaml"), registry)
    assert len(str(caught.value).splitlines()) == 1 and words in str(caught.value)
