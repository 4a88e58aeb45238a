"""Mixers of published models, against those of the transformers package and against their recurrences in fp64."""

import pytest
import torch
from layer_tools import as_a_compiler_sees_them, assemble, gradients, part, site
from torch import nn
from torch.nn import functional as F

from tryplicity import output_and_report
from tryplicity_plugins.layers.attention import GroupedQueryAttention
from tryplicity_plugins.layers.bitlinear import BitLinear
from tryplicity_plugins.layers.delta_rule import delta_rule
from tryplicity_plugins.layers.gated_deltanet import GatedDeltaNet
from tryplicity_plugins.layers.mamba1 import Mamba1
from tryplicity_plugins.layers.mamba2 import Mamba2
from tryplicity_plugins.layers.parallel import Branch, Parallel
from tryplicity_plugins.layers.selective_scan import selective_scan
from tryplicity_plugins.layers.short_conv import ShortConv

HIDDEN, TIME = 32, 37


def lfm2():
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    return Lfm2ShortConv(Lfm2Config(hidden_size=HIDDEN, conv_L_cache=3, conv_bias=True, num_hidden_layers=1,
                                    layer_types=["conv"]), 0)


def mamba():
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return MambaMixer(MambaConfig(hidden_size=HIDDEN, state_size=8, use_bias=True, num_hidden_layers=1), 0)


def jamba():
    from transformers import JambaConfig
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer

    return JambaMambaMixer(JambaConfig(hidden_size=HIDDEN, mamba_d_state=8, mamba_dt_rank=5, num_hidden_layers=1), 0)


def qwen3_next():  # with keys too long to be almost nothing, and an eps that outputs are not below: fp32 is quiet then
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    return Qwen3NextGatedDeltaNet(Qwen3NextConfig(
        hidden_size=HIDDEN, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32,
        linear_value_head_dim=6, rms_norm_eps=0.01, num_hidden_layers=1, layer_types=["linear_attention"]), 0)


DELTA = {"heads": 2, "value_heads": 4, "head_dim": 32, "value_head_dim": 6}
PUBLISHED = {
    "lfm2": (lfm2, ShortConv, {"bias": True}),
    "mamba": (mamba, Mamba1, {"state_size": 8, "bias": True, "chunk": 8}),
    "jamba": (jamba, Mamba1, {"state_size": 8, "dt_rank": 5, "inner_norms": True, "chunk": 16}),
    "qwen3_next": (qwen3_next, GatedDeltaNet, {**DELTA, "chunk": 16, "norm_eps": 0.01}),
}
NAMES = {"conv.weight": "conv_weight", "conv.bias": "conv_bias", "conv1d.weight": "conv_weight",
         "conv1d.bias": "conv_bias", "norm.weight": "norm_weight", "dt_proj.weight": "dt_weight",
         "dt_proj.bias": "dt_bias", "dt_layernorm.weight": "dt_norm", "b_layernorm.weight": "B_norm",
         "c_layernorm.weight": "C_norm"}


def rows_of_qwen3_next():
    """Rows of ours (z; q, k, v; beta; decay) in theirs, which has all of a key head together."""
    G, H, K, V = 2, 4, 32, 6
    sizes = [K, K, V * H // G, V * H // G]  # q, k, v, z
    q, k, v, z = (part.flatten() for part in torch.arange(G * sum(sizes)).view(G, -1).split(sizes, 1))
    b, a = (part.flatten() for part in torch.arange(2 * H).view(G, -1).split(H // G, 1))
    return torch.cat([z, q, k, v]), torch.cat([b, a])


def ours_of(key, value):
    """A tensor of theirs as ours has it: its name, and itself."""
    name = NAMES.get(key, key)
    return name, value[:, 0].T if name == "conv_weight" else value


def as_ours(named):
    found = dict(ours_of(key, value) for key, value in named.items() if "qkvz" not in key and "_ba" not in key)
    if "in_proj_qkvz.weight" in named:
        qkvz, ba = rows_of_qwen3_next()
        found["in_proj.weight"] = torch.cat([named["in_proj_qkvz.weight"][qkvz], named["in_proj_ba.weight"][ba]])
    return found


def make(cls, options, linear=None, dtype=torch.float32, spread=None):
    here = site(hidden=HIDDEN, linear=linear)
    return assemble(lambda: part(cls, **options).build(here), dtype=dtype, spread=spread)


def both(name):
    build, cls, options = PUBLISHED[name]
    torch.manual_seed(0)
    theirs, ours = build(), make(cls, options)
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if key == "A_log":
                value.add_(0.3 * torch.randn_like(value))
            else:
                nn.init.normal_(value, std=0.3)
        ours.load_state_dict(as_ours(dict(theirs.named_parameters())))
    return theirs, ours


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_and_gradients(name):
    theirs, ours = both(name)
    x, weights = torch.randn(2, 2, TIME, HIDDEN)
    found = []
    for mixer in (ours, theirs):
        given = x.clone().requires_grad_()
        y = mixer(given)
        (y * weights).sum().backward()
        grads = {key: value.grad for key, value in mixer.named_parameters()}
        found.append({"y": y.detach(), "x": given.grad} | (grads if mixer is ours else as_ours(grads)))
    assert found[0].keys() == found[1].keys()
    for key, wanted in found[1].items():
        # their decays' gradients are 2e-5 from what fp64 gives, ours 5e-6
        tolerance = 1e-4 if name == "qwen3_next" and key in ("A_log", "dt_bias") else 1e-5
        torch.testing.assert_close(found[0][key], wanted, rtol=0, atol=tolerance * wanted.abs().max().item(),
                                   msg=lambda said, key=key: f"{key}: {said}")


CASES = {**{name: (cls, options) for name, (_, cls, options) in PUBLISHED.items()},
         "parallel": (Parallel, {"of": [
             Branch(part(ShortConv), 0.5, 2.0), Branch(part(GatedDeltaNet, **DELTA, chunk=4)),
             Branch(part(Mamba2, head_dim=8, state_size=8), 1.5)]})}
every_mixer = pytest.mark.parametrize("name", CASES)


def documents(rows, time):
    return (torch.rand(rows, time, generator=torch.Generator().manual_seed(1)) < 0.15).cumsum(1)


def output(mixer, x, **more):
    return output_and_report(mixer(x, **more))[0]


def in_pieces(mixer, x, ids, sizes):
    state, start, outputs = mixer.new_state(len(x), dtype=x.dtype), 0, []
    for size in sizes:
        piece = slice(start, start + size)
        outputs.append(output(mixer, x[:, piece], state=state, doc_ids=None if ids is None else ids[:, piece]))
        start += size
    return torch.cat(outputs, 1)


@every_mixer
@pytest.mark.parametrize("packed", [False, True])
def test_whole_in_chunks_and_token_by_token(name, packed):
    cls, options = CASES[name]
    mixer = make(cls, options, dtype=torch.float64, spread=0.2)
    x, ids = torch.randn(2, TIME, HIDDEN, dtype=torch.float64), documents(2, TIME) if packed else None
    whole = output(mixer, x, doc_ids=ids)
    for sizes in ([TIME], [16, 21], [1] * TIME, [3, 1, 1, 9, 2, 20, 1]):
        with torch.no_grad():
            torch.testing.assert_close(in_pieces(mixer, x, ids, sizes), whole, rtol=0, atol=1e-11)


@every_mixer
@pytest.mark.parametrize("sizes", [[TIME], [9, 28]], ids=str)
def test_another_document_changes_no_bit(name, sizes):
    cls, options = CASES[name]
    mixer = make(cls, options, spread=0.2)
    x, ids = torch.randn(2, TIME, HIDDEN), documents(2, TIME)
    mine = ids == 2
    changed = x.where(mine[..., None], 100 * torch.randn_like(x))
    with torch.no_grad():
        first, second = (in_pieces(mixer, given, ids, sizes) for given in (x, changed))
    assert torch.equal(first[mine], second[mine]) and not torch.equal(first[~mine], second[~mine])
    given = x.clone().requires_grad_()
    output(mixer, given, doc_ids=ids)[mine].square().sum().backward()
    assert not given.grad[~mine].any() and given.grad[mine].any()
    alone = output(mixer, x[:1, mine[0]])
    torch.testing.assert_close(output(mixer, x, doc_ids=ids)[:1, mine[0]], alone, rtol=1e-4, atol=1e-5)


@every_mixer
def test_as_a_compiler_sees_them(name):
    cls, options = CASES[name]
    mixer = make(cls, options, dtype=torch.float64, spread=0.2)
    x, ids = torch.randn(2, TIME, HIDDEN, dtype=torch.float64), documents(2, TIME)
    found = []
    for seen in (False, True):
        given = x.clone().requires_grad_()
        if seen:
            with as_a_compiler_sees_them():
                y = output(mixer, given, doc_ids=ids)
                grads = gradients(y, [given, *mixer.parameters()])
        else:
            y = output(mixer, given, doc_ids=ids)
            grads = gradients(y, [given, *mixer.parameters()])
        found.append([y, *grads])
    for own, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, own, rtol=1e-9, atol=1e-9 * own.abs().max().item())


@every_mixer
def test_with_ternary_weights(name):
    """Trained so, and packed for inference."""
    cls, options = CASES[name]
    mixer, x = make(cls, options, BitLinear, spread=0.2), torch.randn(2, TIME, HIDDEN)
    output(mixer, x).square().mean().backward()
    assert all(value.grad.isfinite().all() for value in mixer.parameters())
    mixer.eval()
    with torch.no_grad():
        wanted = output(mixer, x)
        for linear in [one for one in mixer.modules() if isinstance(one, BitLinear)]:
            linear.adopt(linear.pack())
        for sizes in ([TIME], [1] * TIME):
            got = in_pieces(mixer, x, None, sizes)
            error = (got - wanted).abs() / wanted.abs().max()  # some numbers round to another of 127 steps
            assert error.max() < 0.1 and error.mean() < 5e-3


#: side by side, mixers that take little code: two thirds of the time are the C++ compiler's, a file for each loop
COMPILED = {**CASES, "parallel": (Parallel, {"of": [Branch(part(ShortConv), 0.5, 2.0),
                                                    Branch(part(GroupedQueryAttention, heads=4), 3.0)]})}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(name):
    cls, options = COMPILED[name]
    mixer, x, ids = make(cls, options, spread=0.2), torch.randn(2, 16, HIDDEN), documents(2, 16)
    wanted = output(mixer, x, doc_ids=ids)
    compiled = torch.compile(lambda x, ids: output(mixer, x, doc_ids=ids), fullgraph=True)
    got = compiled(x, ids)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients(got, list(mixer.parameters())), gradients(wanted, list(mixer.parameters())),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


# --- the scans by themselves ---

def delta_by_tokens(q, k, v, g, beta, start, runs):
    S, outputs = start, []
    before = torch.zeros_like(runs[:, 0])
    for t in range(q.shape[1]):
        S = S * ((runs[:, t] == before)[:, None, None, None] * g[:, t].exp()[..., None, None])
        told = torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - told))
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
        before = runs[:, t]
    return torch.stack(outputs, 1), S


def s6_by_tokens(x, dt, A, Bs, Cs, start, runs):
    h, outputs, before = start, [], torch.zeros_like(runs[:, 0])
    for t in range(x.shape[1]):
        decay = (dt[:, t, :, None] * A).exp() * (runs[:, t] == before)[:, None, None]
        h = decay * h + (dt[:, t] * x[:, t])[..., None] * Bs[:, t, None]
        outputs.append((h * Cs[:, t, None]).sum(-1))
        before = runs[:, t]
    return torch.stack(outputs, 1), h


@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
@pytest.mark.parametrize("what", ["delta rule", "selective scan"])
@pytest.mark.parametrize("packed", [False, True])
def test_scans_equal_their_recurrences(what, chunk, packed):
    torch.manual_seed(0)
    B, T, H, K, V, N = 2, 21, 3, 5, 4, 6
    runs = documents(B, T) if packed else torch.zeros(B, T, dtype=torch.long)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    if what == "delta rule":
        inputs = [draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V), draw(B, T, H), draw(B, T, H), draw(B, H, K, V)]
        prepared = [inputs[0], F.normalize(inputs[1], dim=-1), inputs[2], -inputs[3].exp(), inputs[4].sigmoid()]
        got = delta_rule(*prepared, chunk=chunk, start_BHKV=inputs[5], runs_BT=runs if packed else None)
        wanted = delta_by_tokens(*prepared, inputs[5], runs)
    else:
        inputs = [draw(B, T, H), draw(B, T, H), draw(H, N), draw(B, T, N), draw(B, T, N), draw(B, H, N)]
        prepared = [inputs[0], inputs[1].exp(), -inputs[2].exp(), inputs[3], inputs[4]]
        begins = runs != F.pad(runs, (1, 0))[:, :-1]
        got = selective_scan(*prepared, chunk=chunk, start_BIN=inputs[5], begins_BT=begins if packed else None)
        wanted = s6_by_tokens(*prepared, inputs[5], runs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    weights = [torch.randn_like(b) for b in wanted]
    found = [torch.autograd.grad(sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)), inputs,
                                 retain_graph=True) for outputs in (got, wanted)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_extreme_steps_stay_finite():
    """Decays that are zero in fp32, and corrections by whole values."""
    for cls, options in (CASES["mamba"], CASES["qwen3_next"]):
        mixer = make(cls, options, spread=0.2)
        for bias in (-200.0, 60.0):
            nn.init.constant_(mixer.dt_bias, bias)
            mixer.zero_grad()
            mixer(torch.randn(2, TIME, HIDDEN), doc_ids=documents(2, TIME)).sum().backward()
            assert all(value.grad.isfinite().all() for value in mixer.parameters())


def test_multipliers_and_branches_of_a_parallel_mixer():
    branches = [Branch(part(ShortConv), 0.5, 2.0), Branch(part(GroupedQueryAttention, heads=4), 3.0, 0.25)]
    mixer, x = make(Parallel, {"of": branches}, spread=0.2), torch.randn(1, 9, HIDDEN)
    conv, attention = mixer.mixers
    torch.testing.assert_close(output(mixer, x), 2 * output(conv, x / 2) + output(attention, 3 * x) / 4)


def test_what_a_parallel_mixer_cannot_be(registry):
    from tryplicity import UserError

    with pytest.raises(UserError, match="of is missing"):
        registry.part("mixer", "parallel")
    with pytest.raises(UserError, match=r"of\[1\]\.mixer.*gqaa.*did you mean gqa"):
        registry.part("mixer", {"type": "parallel", "of": [{"mixer": "gqa"}, {"mixer": "gqaa"}]})
    with pytest.raises(UserError, match=r"of\[0\]\.mixer\.heads"):
        registry.part("mixer", {"type": "parallel", "of": [{"mixer": {"type": "gqa", "heads": 5}}]}, site())


@pytest.mark.parametrize("cls, options, option, words", [
    (GatedDeltaNet, {"heads": 3, "value_heads": 4}, "value_heads", ["4", "heads 3", "3"]),
    (GatedDeltaNet, {"A_min": 20.0}, "A_min", ["20.0", "16.0"]),
    (Mamba1, {"dt_min": 0.5}, "dt_min", ["0.5", "0.1"]),
])
def test_impossible_options(cls, options, option, words):
    [(at, message)] = cls.check(cls.Config(**options), site())
    assert at == option
    assert all(word in message for word in words), message
