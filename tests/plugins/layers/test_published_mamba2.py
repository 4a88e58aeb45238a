"""Mamba-2 as published hybrids have it, against their mixers in the transformers package: values, gradients, pieces."""

import pytest
import torch
from layer_tools import assemble, part, site
from torch import nn

from tryplicity_plugins.layers import native
from tryplicity_plugins.layers.mamba2 import Mamba2

HIDDEN, TIME = 40, 53


def mamba2():
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    return Mamba2Mixer(Mamba2Config(hidden_size=HIDDEN, num_heads=10, head_dim=8, state_size=16, n_groups=1, expand=2,
                                    use_bias=True, use_conv_bias=False, num_hidden_layers=1), 0)


def bamba():
    from transformers import BambaConfig
    from transformers.models.bamba.modeling_bamba import BambaMixer

    return BambaMixer(BambaConfig(hidden_size=HIDDEN, mamba_n_heads=8, mamba_d_head=10, mamba_d_state=16,
                                  mamba_n_groups=2, mamba_proj_bias=True, num_hidden_layers=1), 0)


def granite():
    from transformers import GraniteMoeHybridConfig
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

    return GraniteMoeHybridMambaLayer(GraniteMoeHybridConfig(
        hidden_size=HIDDEN, mamba_n_heads=10, mamba_d_head=8, mamba_d_state=16, mamba_conv_bias=False,
        num_hidden_layers=1, layer_types=["mamba"]), 0)


def nemotron_h():
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    return NemotronHMamba2Mixer(NemotronHConfig(
        hidden_size=HIDDEN, mamba_num_heads=16, mamba_head_dim=4, ssm_state_size=16, n_groups=8, use_bias=True,
        time_step_min=0.5, layers_block_type=["mamba"]), 0)  # so large a least step that it counts here


def zamba2():
    from transformers import Zamba2Config
    from transformers.models.zamba2.modeling_zamba2 import Zamba2MambaMixer

    return Zamba2MambaMixer(Zamba2Config(hidden_size=HIDDEN, n_mamba_heads=8, mamba_d_state=16, mamba_ngroups=2,
                                         add_bias_linear=True, time_step_min=0.3), 0)


def falcon_h1(norm, **options):
    from transformers import FalconH1Config
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer, compute_mup_vector

    config = FalconH1Config(hidden_size=HIDDEN, mamba_d_ssm=96, mamba_n_heads=12, mamba_d_head=8, mamba_d_state=16,
                            mamba_n_groups=2, mamba_rms_norm=norm, mamba_norm_before_gate=False, num_hidden_layers=1,
                            ssm_multipliers=[0.3, 1.7, 0.6, 1.2, 0.8], **options)
    mixer = FalconH1Mixer(config, 0)
    mixer.register_buffer("mup_vector", compute_mup_vector(config))
    return mixer


FALCON = {"heads": 12, "head_dim": 8, "groups": 2, "multipliers": [0.3, 1.7, 0.6, 1.2, 0.8]}
#: theirs, and what ours is told; a model's heads * head_dim is no multiple of its hidden_size in three of them
PUBLISHED = {
    "mamba2": (mamba2, {"head_dim": 8, "bias": True, "conv_bias": False}),
    "bamba": (bamba, {"head_dim": 10, "groups": 2, "bias": True}),
    "granite": (granite, {"head_dim": 8, "conv_bias": False, "norm_eps": 1e-6}),
    "nemotron_h": (nemotron_h, {"heads": 16, "head_dim": 4, "groups": 8, "bias": True, "dt_limit_min": 0.5}),
    "zamba2": (zamba2, {"head_dim": 10, "groups": 2, "bias": True, "dt_limit_min": 0.3}),
    "falcon_h1": (lambda: falcon_h1(True), FALCON),
    "falcon_h1 without norm": (lambda: falcon_h1(False), {**FALCON, "norm": False}),
    "falcon_h1, steps at most": (lambda: falcon_h1(True, time_step_limit=(0.2, 0.9)),
                                 {**FALCON, "dt_limit_min": 0.2, "dt_limit_max": 0.9}),
}
NAMES = {"conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias", "norm_weight": "norm.weight"}


def make(**options):
    return assemble(lambda: part(Mamba2, state_size=16, chunk=16, **options).build(site(hidden=HIDDEN)))


def both(name):
    """Theirs and ours, with the same weights, all away from where they begin."""
    build, options = PUBLISHED[name]
    torch.manual_seed(0)
    theirs, ours = build(), make(**options)
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, value in named.items():
            nn.init.normal_(value, std=HIDDEN**-0.5 if key.endswith("proj.weight") else 0.5)
        named["A_log"].uniform_(0, 2)
        for key, value in ours.named_parameters():
            other = named.pop(NAMES.get(key, key))
            value.copy_(other[:, 0].T if key == "conv_weight" else other)
    assert not named, "theirs has parameters that ours has not"
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
        found.append((y.detach(), given.grad, {key: value.grad for key, value in mixer.named_parameters()}))
    (y, dx, own), (their_y, their_dx, their) = found
    pairs = [("y", y, their_y), ("x", dx, their_dx)]
    pairs += [(key, value.T[:, None] if key == "conv_weight" else value, their[NAMES.get(key, key)])
              for key, value in own.items()]
    for key, got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item(),
                                   msg=lambda said, key=key: f"{key}: {said}")


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("native_code", [True, False])
def test_decoding(name, native_code, monkeypatch):
    """In chunks and token by token, with C and without."""
    if not native_code:
        monkeypatch.setattr(native, "for_inference", lambda x: False)
    theirs, ours = both(name)
    x = torch.randn(2, TIME, HIDDEN)
    with torch.no_grad():
        wanted = theirs(x)
        for sizes in ([TIME], [20, 33], [1] * TIME, [30, 1, 1, 21]):
            state = ours.new_state(2)
            got = torch.cat([ours(piece.contiguous(), state=state) for piece in x.split(sizes, 1)], 1)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("name", PUBLISHED)
def test_documents_stay_apart(name):
    ours = both(name)[1]
    x, ids = torch.randn(2, 24, HIDDEN), torch.tensor([0] * 5 + [1] * 11 + [2] * 8).expand(2, -1)
    packed = ours(x, doc_ids=ids)
    for document in range(3):
        alone = ours(x[:, ids[0] == document])
        torch.testing.assert_close(packed[:, ids[0] == document], alone, rtol=0, atol=1e-5 * packed.abs().max().item())


def test_with_packed_ternary_matrices():
    """Whatever C does of the mixer, it gives what the matrices give that are not packed."""
    from tryplicity_plugins.layers.bitlinear import BitLinear

    for options in ({"heads": 6, "head_dim": 8}, {"heads": 6, "head_dim": 8, "norm": False, "conv_bias": False},
                    {"head_dim": 8, "bias": True}, FALCON, {"head_dim": 8, "norm_groups": 5, "dt_limit_max": 0.05}):
        here = site(hidden=HIDDEN, linear=BitLinear)
        mixer = assemble(lambda o=options, h=here: part(Mamba2, state_size=16, **o).build(h), spread=0.2).eval()
        x = torch.randn(2, 9, HIDDEN)
        with torch.no_grad():
            wanted = mixer(x)
            for linear in (mixer.in_proj, mixer.out_proj):
                linear.adopt(linear.pack())
            torch.testing.assert_close(mixer(x), wanted, rtol=0, atol=2e-3 * wanted.abs().max().item())


@pytest.mark.parametrize("options, option, words", [
    ({"heads": 6, "groups": 4}, "groups", ["6 heads", "48 inner", "3"]),
    ({"heads": 6, "norm_groups": 7}, "norm_groups", ["48", "7", "6"]),
    ({"norm": False, "norm_groups": 2}, "norm_groups", ["norm: false"]),
    ({"dt_limit_min": 0.5, "dt_limit_max": 0.2}, "dt_limit_min", ["0.5", "0.2"]),
])
def test_impossible_options(options, option, words):
    [(at, message)] = Mamba2.check(Mamba2.Config(head_dim=8, **options), site(hidden=32))
    assert at == option
    assert all(word in message for word in words), message
