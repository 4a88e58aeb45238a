"""Latent attention against that of the transformers package, and its two ways against each other."""

import pytest
import torch
from layer_tools import assemble, gradients, part, site
from torch import nn

from tryplicity_plugins.layers.bitlinear import BitLinear
from tryplicity_plugins.layers.mla import LatentAttention

HIDDEN, TIME = 32, 23
OPTIONS = {"heads": 4, "head_dim": 8, "rope_dim": 4, "value_head_dim": 6, "latent_size": 16}
CASES = {"queries of the token": OPTIONS, "queries of a latent": {**OPTIONS, "query_latent_size": 12},
         "with biases": {**OPTIONS, "query_latent_size": 12, "bias": True, "scale": 0.4}}
every_case = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


def make(options, linear=None, dtype=torch.float64):
    here = site(hidden=HIDDEN, linear=linear)
    return assemble(lambda: part(LatentAttention, **options).build(here), dtype=dtype, spread=0.2)


def deepseek_v3(options):
    """Theirs, as a function of the tokens, and its parameters."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    config = DeepseekV3Config(
        hidden_size=HIDDEN, num_attention_heads=4, num_key_value_heads=4, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=6, kv_lora_rank=16, q_lora_rank=options.get("query_latent_size"),
        attention_bias=options.get("bias", False), max_position_embeddings=64)
    config._attn_implementation = "eager"
    theirs, rotary = DeepseekV3Attention(config, 0), DeepseekV3RotaryEmbedding(config)
    theirs.scaling = options.get("scale", theirs.scaling)
    mask = torch.full((TIME, TIME), -torch.inf).triu(1)[None, None]

    def run(x):
        return theirs(x, position_embeddings=rotary(x, torch.arange(TIME)[None]), attention_mask=mask)[0]

    return theirs, run


NAMES = {"q_proj": "q", "q_a_proj": "q_down", "q_a_layernorm": "q_norm", "q_b_proj": "q",
         "kv_a_proj_with_mqa": "kv_down", "kv_a_layernorm": "kv_norm", "o_proj": "out"}


def as_ours(named):
    found = {}
    for key, value in named.items():
        module, _, kind = key.partition(".")
        if module == "kv_b_proj":
            found["kv_up"] = value.view(4, 14, 16)
        else:
            found[f"{NAMES[module]}.{kind}"] = value
    return found


@every_case
def test_equals_transformers(options):
    torch.manual_seed(0)
    (theirs, run), ours = deepseek_v3(options), make(options, dtype=torch.float32)
    with torch.no_grad():
        for value in theirs.parameters():
            nn.init.normal_(value, std=0.3)
        ours.load_state_dict(as_ours(dict(theirs.named_parameters())))
    x, weights = torch.randn(2, 2, TIME, HIDDEN)
    found = []
    for module, call in ((ours, ours), (theirs, run)):
        given = x.clone().requires_grad_()
        y = call(given)
        (y * weights).sum().backward()
        grads = {key: value.grad for key, value in module.named_parameters()}
        found.append({"y": y.detach(), "x": given.grad} | (grads if module is ours else as_ours(grads)))
    assert found[0].keys() == found[1].keys()
    for key, wanted in found[1].items():
        torch.testing.assert_close(found[0][key], wanted, rtol=0, atol=1e-5 * wanted.abs().max().item(),
                                   msg=lambda said, key=key: f"{key}: {said}")


def in_pieces(layer, x, ids, sizes):
    state, start, outputs = layer.new_state(len(x), dtype=x.dtype), 0, []
    for size in sizes:
        piece = slice(start, start + size)
        outputs.append(layer(x[:, piece], state=state, doc_ids=None if ids is None else ids[:, piece]))
        start += size
    return torch.cat(outputs, 1), state


def documents():
    return (torch.rand(2, TIME, generator=torch.Generator().manual_seed(1)) < 0.2).cumsum(1)


@every_case
@pytest.mark.parametrize("packed", [False, True])
def test_whole_in_chunks_and_token_by_token(options, packed):
    """Both ways: chunks of 8 and more have keys and values made, shorter ones are in the latents' space."""
    layer, x = make(options), torch.randn(2, TIME, HIDDEN, dtype=torch.float64)
    ids = documents() if packed else None
    whole = layer(x, doc_ids=ids)
    for sizes in ([TIME], [10, 13], [1] * TIME, [9, 1, 3, 10]):
        with torch.no_grad():
            y, state = in_pieces(layer, x, ids, sizes)
        torch.testing.assert_close(y, whole, rtol=0, atol=1e-11)
    assert state["latents"].shape == (2, 64, 16 + 4)  # and nothing for each head


def test_both_ways_have_the_same_gradients(monkeypatch):
    layer, x = make(OPTIONS), torch.randn(2, TIME, HIDDEN, dtype=torch.float64)
    found = []
    for way in (layer._made, layer._in_latents):
        monkeypatch.setattr(layer, "_made", way)
        y = layer(x, doc_ids=documents())
        found.append([y, *gradients(y, list(layer.parameters()))])
    for made, latent in zip(*found, strict=True):
        torch.testing.assert_close(latent, made, rtol=0, atol=1e-10)


def test_another_document_changes_no_bit():
    layer, x, ids = make(OPTIONS, dtype=torch.float32), torch.randn(2, TIME, HIDDEN), documents()
    mine = ids == 2
    changed = x.where(mine[..., None], 100 * torch.randn_like(x))
    for sizes in ([TIME], [9, 14], [1] * TIME):
        with torch.no_grad():
            first, second = (in_pieces(layer, given, ids, sizes)[0] for given in (x, changed))
        assert torch.equal(first[mine], second[mine]) and not torch.equal(first[~mine], second[~mine])


def test_with_ternary_weights():
    layer, x = make(OPTIONS, BitLinear, torch.float32), torch.randn(2, TIME, HIDDEN)
    layer(x).square().mean().backward()
    assert all(value.grad.isfinite().all() for value in layer.parameters())
    layer.eval()
    with torch.no_grad():
        wanted = layer(x)
        for linear in (layer.q, layer.kv_down, layer.out):
            linear.adopt(linear.pack())
        for sizes in ([TIME], [1] * TIME):
            error = (in_pieces(layer, x, None, sizes)[0] - wanted).abs() / wanted.abs().max()
            assert error.max() < 0.1 and error.mean() < 5e-3


@pytest.mark.slow
def test_compiles_as_one_graph():
    layer, x, ids = make(OPTIONS, dtype=torch.float32), torch.randn(2, 16, HIDDEN), documents()[:, :16]
    got = torch.compile(lambda x, ids: layer(x, doc_ids=ids), fullgraph=True)(x, ids)
    torch.testing.assert_close(got, layer(x, doc_ids=ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options, option, words", [
    ({"rope_dim": 5}, "rope_dim", ["5", "6"]),
    ({"head_dim": 8, "rope_dim": 4, "value_head_dim": 16}, "value_head_dim", ["16", "12"]),
])
def test_impossible_options(options, option, words):
    [(at, message)] = LatentAttention.check(LatentAttention.Config(**options), site())
    assert at == option
    assert all(word in message for word in words), message
