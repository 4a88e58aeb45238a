"""Attention and feed-forwards against transformers' own modules, with the same weights: values and gradients."""

import importlib

import pytest
import torch
from layer_tools import assemble, assert_same, part, site
from torch.nn import functional as F

from tryplicity.model import NEXT_TOKEN
from tryplicity.model import assemble as assemble_model
from tryplicity.spec import load_spec, parse_yaml
from tryplicity_plugins.layers.activations import GELU, ReLU2, SiLU
from tryplicity_plugins.layers.attention import GroupedQueryAttention
from tryplicity_plugins.layers.gated_mlp import GatedMLP
from tryplicity_plugins.layers.mlp import MLP
from tryplicity_plugins.layers.rotary import RopeScaling, speeds

B, T, D, H, G, K = 2, 23, 48, 6, 2, 8
SIZES = {"hidden_size": D, "num_attention_heads": H, "num_key_value_heads": G, "head_dim": K, "intermediate_size": 40,
         "num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 128, "attn_implementation": "eager",
         "rms_norm_eps": 1e-6, "pad_token_id": 0}
DOCS = torch.tensor([[0] * 5 + [1] * 11 + [2] * 7, [3] * 2 + [1] * 20 + [7] * 1])
STRETCHED = {"linear": {"factor": 4.0},
             "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 64},
             "yarn": {"factor": 4.0, "original_context": 32},
             "yarn, all said": {"factor": 16.0, "original_context": 64, "beta_fast": 16.0, "beta_slow": 2.0,
                                "attention_factor": 1.3}}


def classes(family):
    """(the module with its classes, its configuration's class)"""
    package = f"transformers.models.{family}"
    modeling = importlib.import_module(f"{package}.modeling_{family}")
    configuration = importlib.import_module(f"{package}.configuration_{family}")
    name = next(n for n in vars(configuration) if n.lower() == f"{family.replace('_', '')}config")
    return modeling, getattr(configuration, name)


def of(modeling, family, what):
    return next(c for n, c in vars(modeling).items() if n.lower() == f"{family.replace('_', '')}{what}".lower())


def scrambled(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module


def turned(rows, head, dims):
    """Rows (or a bias, or a norm's weight) of heads whose halves are turned, as heads whose neighbours are."""
    order = torch.arange(head)
    order[:dims] = torch.arange(dims).view(2, -1).T.flatten()
    return rows.unflatten(0, (-1, head))[:, order].flatten(0, 1)


def their_attention(theirs, dims, what, out="o_proj"):
    """Ours by name from theirs: `what` takes a parameter's value or its gradient."""
    found = {}
    for kind in ("weight", "bias"):
        parts = [getattr(theirs.q_proj, kind), getattr(theirs.k_proj, kind), getattr(theirs.v_proj, kind)]
        if parts[0] is not None:
            q, k, v = map(what, parts)
            found[f"qkv.{kind}"] = torch.cat((turned(q, K, dims), turned(k, K, dims), v))
        if (given := getattr(getattr(theirs, out), kind)) is not None:
            found[f"out.{kind}"] = what(given)
    for ours, names in {"q_norm": ("q_norm",), "k_norm": ("k_norm",), "out_norm": ("attn_sub_norm",)}.items():
        if (norm := next((getattr(theirs, n) for n in names if hasattr(theirs, n)), None)) is not None:
            found[f"{ours}.weight"] = turned(what(norm.weight), K, dims) if ours != "out_norm" else what(norm.weight)
    return found


def adopted(layer, weights):
    named = dict(layer.named_parameters())
    assert named.keys() == weights.keys()
    with torch.no_grad():
        for name, weight in weights.items():
            named[name].copy_(weight)
    return layer


def assert_as_theirs(ours, theirs, mapped, tolerance=1e-5):
    """ours and theirs: x -> y; mapped: ours by name of theirs, values or gradients."""
    adopted(ours[0], mapped(lambda p: p.detach()))
    torch.manual_seed(3)
    x, weights = torch.randn(B, T, D), torch.randn(B, T, D)
    results = []
    for module, run in (ours, theirs):
        given = x.clone().requires_grad_()
        module.zero_grad()
        y = run(given)
        (y * weights).sum().backward()
        results.append((y.detach(), given.grad))
    assert_same(*zip(*([*zip(*results, strict=True)]), strict=True), tolerance)
    named, expected = dict(ours[0].named_parameters()), mapped(lambda p: p.grad)
    for name, gradient in expected.items():
        assert_same([named[name].grad], [gradient], tolerance)


def mask_of(docs, window):
    """What transformers' eager attention adds to its scores."""
    near = torch.arange(T)[:, None] - torch.arange(T)
    seen = (near >= 0) & (near < (window or T))
    seen = seen.expand(B, 1, -1, -1)
    if docs is not None:
        seen = seen & (docs[:, None, :, None] == docs[:, None, None, :])
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def theirs_said(name):
    """STRETCHED as transformers has it."""
    said = {{"original_context": "original_max_position_embeddings"}.get(k, k): v for k, v in STRETCHED[name].items()}
    return {"rope_parameters": {"rope_type": name.partition(",")[0], "rope_theta": 100.0, **said}}


#: of each family: their options, and ours
ATTENTION = {
    "llama": ({}, {}),
    **{f"llama, {name}": (theirs_said(name), {"rope_base": 100.0, "rope_scaling": RopeScaling(
        name.partition(",")[0], **said)}) for name, said in STRETCHED.items()},
    "qwen2": ({}, {"bias": True}),
    "qwen3": ({}, {"qk_norm": True}),
    "olmo2": ({}, {"qk_norm": True, "qk_norm_over": "width"}),
    "gemma2": ({"query_pre_attn_scalar": 20, "attn_logit_softcapping": 1.5, "sliding_window": 6},
               {"scale": 20**-0.5, "softcap": 1.5, "window": 6}),
    "granite": ({"attention_multiplier": 0.3, "attention_bias": True}, {"scale": 0.3, "bias": True, "out_bias": True}),
    "mistral": ({"sliding_window": 5}, {"window": 5}),
    "bitnet": ({}, {"out_norm": True, "rope_base": 500000.0}),
    "phi": ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
            {"bias": True, "out_bias": True, "rotary_fraction": 0.5, "rope_base": 500.0}),
    "granitemoehybrid": ({"attention_multiplier": 0.2, "position_embedding_type": None, "mamba_n_heads": 12},
                         {"scale": 0.2, "rope_base": None}),
}


@pytest.mark.parametrize("docs", [None, DOCS], ids=["one document", "packed"])
@pytest.mark.parametrize("family", ATTENTION)
def test_attention(family, docs):
    their_options, our_options = ATTENTION[family]
    family = family.partition(",")[0]
    modeling, config_class = classes(family)
    config = config_class(**{**SIZES, **their_options})
    theirs = scrambled(of(modeling, family, "Attention")(config, layer_idx=0))
    rotary = our_options.get("rope_base", 1.0) and of(modeling, family, "RotaryEmbedding")(config)
    dims = int(K * our_options.get("rotary_fraction", 1.0)) if rotary else 0
    ours = assemble(lambda: GroupedQueryAttention(
        GroupedQueryAttention.Config(heads=H, kv_heads=G, head_dim=K, **our_options), site(hidden=D)))
    mask = mask_of(docs, our_options.get("window"))

    def run(x):
        positions = rotary(x, torch.arange(T)[None]) if rotary else None
        return theirs(hidden_states=x, position_embeddings=positions, attention_mask=mask)[0]

    assert_as_theirs((ours, lambda x: ours(x, doc_ids=docs)), (theirs, run), lambda what: their_attention(
        theirs, dims, what, "dense" if family == "phi" else "o_proj"))


@pytest.mark.parametrize("base, dims", [(10000.0, 128), (500000.0, 64), (100.0, 8)])
@pytest.mark.parametrize("name", STRETCHED)
def test_rotations_are_as_slow(name, base, dims):
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    said = theirs_said(name)["rope_parameters"]
    config = LlamaConfig(**{**SIZES, "head_dim": dims, "rope_parameters": {**said, "rope_theta": base}})
    theirs = LlamaRotaryEmbedding(config)
    speed_P, factor = speeds(base, dims, RopeScaling(name.partition(",")[0], **STRETCHED[name]))
    torch.testing.assert_close(speed_P.float(), theirs.inv_freq, rtol=1e-5, atol=0)
    assert factor == pytest.approx(theirs.attention_scaling)


def their_mlp(theirs, what):
    found = {}
    for kind in ("weight", "bias"):
        if hasattr(theirs, "gate_proj"):
            into, out = [theirs.gate_proj, theirs.up_proj], theirs.down_proj
        else:
            up, out = (theirs.up_proj, theirs.down_proj) if hasattr(theirs, "up_proj") else (theirs.fc1, theirs.fc2)
            into = [up]
        if getattr(out, kind) is not None:
            found[f"{'gate_up' if len(into) > 1 else 'up'}.{kind}"] = torch.cat([what(getattr(p, kind)) for p in into])
            found[f"down.{kind}"] = what(getattr(out, kind))
    if hasattr(theirs, "ffn_sub_norm"):
        found["inner_norm.weight"] = what(theirs.ffn_sub_norm.weight)
    return found


MLPS = {
    "llama": ({"mlp_bias": True}, GatedMLP, {"bias": True}, SiLU),
    "bitnet": ({}, GatedMLP, {"inner_norm": True}, ReLU2),
    "falcon_h1": ({"mlp_multipliers": [0.88, 0.59]}, GatedMLP,
                  {"gate_multiplier": 0.88, "down_multiplier": 0.59}, SiLU),
    "nemotron": ({"mlp_bias": False}, MLP, {}, ReLU2),
    "phi": ({"hidden_act": "gelu"}, MLP, {"bias": True}, GELU),
}


@pytest.mark.parametrize("family", MLPS)
def test_feed_forward(family):
    their_options, component, our_options, activation = MLPS[family]
    modeling, config_class = classes(family)
    theirs = scrambled(of(modeling, family, "MLP")(config_class(**{**SIZES, **their_options})))
    config = component.Config(inner_size=40, activation=part(activation), **our_options)
    ours = assemble(lambda: component(config, site(hidden=D)))
    assert_as_theirs((ours, lambda x: ours(x)[0]), (theirs, theirs), lambda what: their_mlp(theirs, what))
    x = torch.randn(B, T, D)
    with torch.no_grad():
        y = ours.eval()(x)
        assert_same([y[0] if isinstance(y, tuple) else y], [theirs(x)], 1e-5)


SPEC = """\
name: published
vocab_size: 300
hidden_size: 48
context_length: 128
{ends}
layers:
  - repeat: 2
    of: {{mixer: {{type: gqa, heads: 6, kv_heads: 2, head_dim: 8{mixer}}},
          feed_forward: {{type: gated_mlp, inner_size: 40, activation: {activation}}}}}
"""
#: of each family: their options, our lines, our options of attention, the names of the norms around the sub-layers
MODELS = {
    "granite": ({"attention_multiplier": 0.3, "embedding_multiplier": 6.0, "residual_multiplier": 0.25,
                 "logits_scaling": 4.0},
                "embedding_multiplier: 6.0\nlogits_multiplier: 0.25\nresidual: {type: add, multiplier: 0.25}\n"
                "tied_embeddings: false", ", scale: 0.3",
                {"mixer.norm": "input_layernorm", "feed_forward.norm": "post_attention_layernorm"}),
    "olmo2": ({}, "norms: after\ntied_embeddings: false", ", qk_norm: true, qk_norm_over: width",
              {"mixer.norm_after": "post_attention_layernorm",
               "feed_forward.norm_after": "post_feedforward_layernorm"}),
    "gemma2": ({"query_pre_attn_scalar": 20, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0,
                "sliding_window": 6, "layer_types": ["sliding_attention"] * 2, "hidden_activation": "gelu"},
               f"norms: around\nembedding_multiplier: {48**0.5}\nlogits_softcap: 3.0",
               f", scale: {20**-0.5}, softcap: 1.5, window: 6",
               {"mixer.norm": "input_layernorm", "mixer.norm_after": "post_attention_layernorm",
                "feed_forward.norm": "pre_feedforward_layernorm",
                "feed_forward.norm_after": "post_feedforward_layernorm"}),
}


@pytest.mark.parametrize("family", MODELS)
def test_model(family, registry):
    their_options, ends, mixer, norms = MODELS[family]
    modeling, config_class = classes(family)
    theirs = of(modeling, family, "ForCausalLM")(config_class(**{
        **SIZES, "tie_word_embeddings": family == "gemma2", **their_options}))
    theirs = scrambled(theirs)
    text = SPEC.format(ends=ends, mixer=mixer, activation="gelu" if family == "gemma2" else "silu")
    ours = assemble(lambda: assemble_model(load_spec(parse_yaml(text, "s.yaml"), registry)))

    def mapped(what, more=0.0):
        base, one = theirs.model, lambda p: what(p) + more
        found = {"embedding.weight": what(base.embed_tokens.weight), "norm.weight": one(base.norm.weight)}
        if ours.unembedding is not None:
            found["unembedding.weight"] = what(theirs.lm_head.weight)
        for i, layer in enumerate(base.layers):
            own = {f"mixer.layer.{n}": t for n, t in their_attention(layer.self_attn, K, what).items()}
            own |= {f"feed_forward.layer.{n}": t for n, t in their_mlp(layer.mlp, what).items()}
            own |= {f"{name}.weight": one(getattr(layer, their).weight) for name, their in norms.items()}
            found |= {f"layers.{i}.{name}": t for name, t in own.items()}
        return found

    adopted(ours, mapped(lambda p: p.data, float(family == "gemma2")))  # whose norms are 1 + weight
    ids = torch.randint(1, 300, (B, T + 1), generator=torch.Generator().manual_seed(1))
    next_BT = ids[:, 1:]
    logits = theirs(ids[:, :-1], use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), next_BT.flatten(), reduction="sum").backward()
    assert_same([ours(ids[:, :-1])], [logits], 1e-5)
    ours(ids[:, :-1], targets={NEXT_TOKEN: next_BT}).objectives[NEXT_TOKEN].total.backward()
    named = dict(ours.named_parameters())
    for name, gradient in mapped(lambda p: p.grad).items():
        assert_same([named[name].grad], [gradient], 1e-4)
