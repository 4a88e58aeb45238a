"""Mixtures of experts as published, against their blocks in the transformers package: values and gradients."""

import pytest
import torch
from layer_tools import assemble, part, site
from torch import nn

from tryplicity import Report, output_and_report
from tryplicity_plugins.layers.activations import ReLU2, SiLU
from tryplicity_plugins.layers.bitlinear import BitLinear
from tryplicity_plugins.layers.moe import MixtureOfExperts
from tryplicity_plugins.layers.router import TopKRouter

HIDDEN, EXPERTS, INNER = 32, 8, 24


def block(kind, name, **options):
    import transformers

    module = getattr(transformers.models, kind)
    config = getattr(module, f"configuration_{kind}")
    config = next(value for key, value in vars(config).items() if key.lower() == f"{kind.replace('_', '')}config")
    theirs = getattr(getattr(module, f"modeling_{kind}"), name)(config(hidden_size=HIDDEN, **options))
    theirs.eval()
    return theirs


def qwen2_moe(shared):
    return block("qwen2_moe", "Qwen2MoeSparseMoeBlock", moe_intermediate_size=INNER,
                 shared_expert_intermediate_size=shared, **ROUTED)


ROUTED = {"num_experts": EXPERTS, "num_experts_per_tok": 3}
DEEP = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": INNER, "n_shared_experts": 2,
        "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
#: theirs, and what ours is told: of the layer, of its router
PUBLISHED = {
    "mixtral": (lambda: block("mixtral", "MixtralSparseMoeBlock", num_local_experts=EXPERTS, num_experts_per_tok=3,
                              intermediate_size=INNER), {}, {"score": "softmax"}),
    "qwen3_moe": (lambda: block("qwen3_moe", "Qwen3MoeSparseMoeBlock", moe_intermediate_size=INNER,
                                norm_topk_prob=True, **ROUTED), {}, {"score": "softmax"}),
    "olmoe": (lambda: block("olmoe", "OlmoeSparseMoeBlock", intermediate_size=INNER, **ROUTED),
              {}, {"score": "softmax", "normalize": False}),
    "granite": (lambda: block("granitemoe", "GraniteMoeMoE", num_local_experts=EXPERTS, num_experts_per_tok=3,
                              intermediate_size=INNER), {}, {"score": "softmax"}),
    "jamba": (lambda: block("jamba", "JambaSparseMoeBlock", intermediate_size=INNER, **ROUTED),
              {}, {"score": "softmax", "normalize": False}),
    "lfm2_moe": (lambda: block("lfm2_moe", "Lfm2MoeSparseMoeBlock", moe_intermediate_size=INNER,
                               routed_scaling_factor=1.7, **ROUTED), {}, {"scale": 1.7}),
    "qwen2_moe": (lambda: qwen2_moe(40), {"shared_experts": 1, "shared_inner_size": 40, "shared_gate": True},
                  {"score": "softmax", "normalize": False}),
    "qwen2_moe, all of one width": (lambda: qwen2_moe(INNER), {"shared_experts": 1, "shared_gate": True},
                                    {"score": "softmax", "normalize": False}),
    "deepseek_v2": (lambda: block("deepseek_v2", "DeepseekV2Moe", topk_method="group_limited_greedy", **DEEP),
                    {"shared_experts": 2}, {"score": "softmax", "normalize": False, "groups": 4, "groups_kept": 2,
                                            "group_best": 1, "scale": 2.5}),
    "deepseek_v3": (lambda: block("deepseek_v3", "DeepseekV3MoE", **DEEP), {"shared_experts": 2},
                    {"groups": 4, "groups_kept": 2, "scale": 2.5}),
    "nemotron_h": (lambda: block("nemotron_h", "NemotronHMoE", moe_shared_expert_intermediate_size=40, **DEEP),
                   {"shared_experts": 1, "shared_inner_size": 40, "gated": False, "activation": part(ReLU2)},
                   {"groups": 4, "groups_kept": 2, "scale": 2.5}),
}


def make(options, router, linear=None):
    options = {"experts": EXPERTS, "top_k": 3, "inner_size": INNER, "shared_experts": 0, "activation": part(SiLU),
               **options}
    here = site(hidden=HIDDEN, linear=linear)
    return assemble(lambda: part(MixtureOfExperts, router=part(TopKRouter, **router), **options).build(here))


def names(key):
    """Of a tensor of theirs: that of ours, and whether it is the first or second half of one."""
    if key.endswith(("e_score_correction_bias", "expert_bias")):
        return "router.bias", None
    if key.endswith(("gate.weight", "router.weight", "layer.weight")) and "shared" not in key:
        return "router.weight", None
    if "shared_expert_gate" in key:
        return "shared_gate", None
    if "shared" in key:
        which = {"gate_proj": ("shared_gate_up.weight", 0), "down_proj": ("shared_down.weight", None)}
        up = ("shared_gate_up.weight", 1)
        return which.get(key.split(".")[-2], up)
    stacks = {"down_proj": "down.weight", "gate_up_proj": "gate_up.weight", "up_proj": "up.weight"}
    return stacks[key.split(".")[-1]], None


def both(name):
    build, options, router = PUBLISHED[name]
    torch.manual_seed(0)
    theirs, ours = build(), make(options, router)
    own, matched = dict(ours.named_parameters()) | dict(ours.named_buffers()), []
    with torch.no_grad():
        for key, value in (*theirs.named_parameters(), *theirs.named_buffers()):
            nn.init.normal_(value, std=0.3)
            to, half = names(key)
            if not options.get("gated", True):
                to, half = to.replace("gate_up", "up"), None
            matched.append((key, to, half))
            target = own[to] if half is None else own[to].chunk(2)[half]
            target.copy_(value.view_as(target))
    assert {to for _, to, _ in matched} >= {key for key, _ in ours.named_parameters()}
    return theirs, ours, matched


def said(layer, x):
    return output_and_report(layer(x))[0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_and_gradients(name):
    theirs, ours, matched = both(name)
    x, weights = torch.randn(2, 2, 21, HIDDEN)
    found = []
    for layer in (ours, theirs):
        given = x.clone().requires_grad_()
        y = said(layer, given)
        (y * weights).sum().backward()
        found.append({"y": y.detach(), "x": given.grad} | {key: p.grad for key, p in layer.named_parameters()})
    mine, wanted = found
    pairs = [("y", mine["y"], wanted["y"]), ("x", mine["x"], wanted["x"])]
    for key, to, half in matched:
        if key in wanted:
            got = mine[to] if half is None else mine[to].chunk(2)[half]
            pairs.append((key, got.view_as(wanted[key]), wanted[key]))
    for key, got, right in pairs:
        torch.testing.assert_close(got, right, rtol=0, atol=1e-5 * right.abs().max().item(),
                                   msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", PUBLISHED)
def test_decoding(name):
    """Token by token, whose experts are chosen on the host, and two at once."""
    theirs, ours, _ = both(name)
    x = torch.randn(1, 9, HIDDEN)
    with torch.no_grad():
        wanted = said(theirs, x)
        for sizes in ([1] * 9, [2, 1, 6]):
            got = torch.cat([said(ours, piece) for piece in x.split(sizes, 1)], 1)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "nemotron_h"])
def test_with_packed_ternary_matrices(name):
    """What C knows of it (groups), and what it does not (no gate, a gate of the shared experts)."""
    _, options, router = PUBLISHED[name]
    layer, x = make(options, router, BitLinear).eval(), torch.randn(1, 12, HIDDEN)
    with torch.no_grad():
        for key, value in layer.named_parameters():
            nn.init.normal_(value, std=1.0 if "router" in key else 0.1)
        wanted = said(layer, x)
        for linear in (layer.first, layer.down, layer.shared_first, layer.shared_down):
            linear.adopt(linear.pack())
        for sizes in ([12], [1] * 12):
            got = torch.cat([said(layer, piece.contiguous()) for piece in x.split(sizes, 1)], 1)
            error = (got - wanted).abs() / wanted.abs().max()  # some numbers round to another of 127 steps
            assert error.max() < 2e-2 and (error > 1e-5).float().mean() < 0.2


def test_the_gate_of_the_shared_experts_scales_them_alone():
    layer = make({"shared_experts": 1, "shared_gate": True}, {})
    x = torch.randn(1, 3, HIDDEN)
    with torch.no_grad():
        layer.shared_gate.zero_()
        half = layer.shared(x, Report())
        layer.shared_gate.copy_(1e4 * x[0, 0])  # sure of the first token
        whole = layer.shared(x, Report())
    torch.testing.assert_close(whole[:, 0], 2 * half[:, 0])


@pytest.mark.parametrize("options, router, option, words", [
    ({}, {"groups": 3}, "router.groups", ["3", "8 experts", "2"]),
    ({}, {"groups": 4, "groups_kept": 5}, "router.groups_kept", ["5 of 4", "at most 4"]),
    ({}, {"groups": 4, "groups_kept": 1}, "router.groups_kept", ["the 3 that", "at least 2"]),
    ({}, {"groups": 8, "groups_kept": 4}, "router.group_best", ["2 of the 1", "at most 1"]),
    ({"shared_gate": True}, {}, "shared_gate", ["no shared experts"]),
])
def test_impossible_options(options, router, option, words):
    config = MixtureOfExperts.Config(experts=EXPERTS, top_k=3, shared_experts=0, router=part(TopKRouter, **router),
                                     **options)
    [(at, message)] = MixtureOfExperts.check(config, site())
    assert at == option
    assert all(word in message for word in words), message
