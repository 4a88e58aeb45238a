"""Mamba-2 against the recurrence itself, against another implementation, and against itself in pieces."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tryplicity import Linear, Part, Site
from tryplicity_plugins.layers import ssd
from tryplicity_plugins.layers.mamba2 import Mamba2
from tryplicity_plugins.layers.recurrent import conv_masks


class Plain(Linear):
    name = "plain_for_test"


class Halved(Linear):
    """Shows that the mixer's matrices go through the spec's linear."""

    name = "halved_for_test"

    def effective_weight(self, weight):
        return weight / 2


def make(hidden=32, linear=Plain, dtype=torch.float32, seed=0, **options):
    options = {"state_size": 16, "head_dim": 8, "chunk": 8, **options}
    site = Site(hidden_size=hidden, vocab_size=64, context_length=64, layers=2, layer=0,
                linear_part=Part(linear, linear.Config()))
    with torch.device("meta"):
        mixer = Mamba2(Mamba2.Config(**options), site)
    mixer.to_empty(device="cpu")
    for parameter in mixer.parameters():
        nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(seed)
    for module in mixer.modules():
        module.reset_parameters()
    # larger than a fresh model's, so that the scan and not only the skip decides the output
    nn.init.normal_(mixer.in_proj.weight, std=hidden**-0.5)
    nn.init.normal_(mixer.out_proj.weight, std=mixer.inner**-0.5)
    nn.init.uniform_(mixer.norm_weight, 0.5, 1.5)
    nn.init.uniform_(mixer.D, 0.5, 1.5)
    nn.init.uniform_(mixer.dt_bias, -3, 1)
    return mixer.to(dtype)


def recurrence(mixer, x_BTD, doc_ids=None):
    """The layer token by token and document by document, as plainly as it can be said."""
    if doc_ids is None:
        doc_ids = torch.zeros(x_BTD.shape[:2], dtype=torch.long)
    c = mixer.config
    heads_per_group = mixer.heads // c.groups
    rows = []
    for x_TD, ids in zip(x_BTD, doc_ids.tolist(), strict=True):
        outputs, history, S, last = [], [], None, None
        for x_D, doc in zip(x_TD, ids, strict=True):
            if doc != last:
                history, last = [], doc
                S = [x_D.new_zeros(c.head_dim, c.state_size) for _ in range(mixer.heads)]
            z, xBC, dt = mixer.in_proj(x_D).split([mixer.inner, sum(mixer.channels), mixer.heads])
            history.append(xBC)
            taps = zip(reversed(history), reversed(list(mixer.conv_weight)), strict=False)
            xBC = F.silu(mixer.conv_bias + sum(value * weight for value, weight in taps))
            x, B, C = xBC.split(mixer.channels)
            dt = F.softplus(dt + mixer.dt_bias)
            y = []
            for h in range(mixer.heads):
                x_P = x.view(mixer.heads, c.head_dim)[h]
                group = h // heads_per_group
                B_N, C_N = B.view(c.groups, -1)[group], C.view(c.groups, -1)[group]
                S[h] = torch.exp(-dt[h] * mixer.A_log[h].exp()) * S[h] + dt[h] * torch.outer(x_P, B_N)
                y.append(S[h] @ C_N + mixer.D[h] * x_P)
            g = (torch.cat(y) * F.silu(z)).view(mixer.norm_groups, -1)
            g = g / (g.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
            outputs.append(mixer.out_proj(g.flatten() * mixer.norm_weight))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def values_and_gradients(mixer, function, x_BTD, weights):
    mixer.zero_grad()
    x_BTD = x_BTD.clone().requires_grad_()
    y = function(x_BTD)
    (y * weights).sum().backward()
    return {"y": y.detach(), "x": x_BTD.grad} | {name: p.grad.clone() for name, p in mixer.named_parameters()}


def assert_same(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3)
        error = ((got[name] - value).abs().max() / scale).item()
        assert error < tolerance, f"{name}: {error}"


def documents(batch, time):
    """Packed documents of 1 to 9 tokens, each row cut at other places."""
    lengths = torch.tensor([2, 1, 9, 1, 7, 3, 8])
    ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return torch.stack([ids[row : row + time] for row in range(batch)])


def packing(packed, batch, time):
    return documents(batch, time) if packed else None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("time,groups", [(24, 1), (21, 2), (5, 4), (1, 1)])
def test_equals_the_recurrence(time, groups, dtype, tolerance, packed):
    mixer = make(dtype=dtype, groups=groups)
    x, weights = torch.randn(2, 3, time, 32, dtype=dtype)
    ids = packing(packed, 3, time)
    expected = values_and_gradients(mixer, lambda x: recurrence(mixer, x, ids), x, weights)
    assert_same(values_and_gradients(mixer, lambda x: mixer(x, doc_ids=ids), x, weights), expected, tolerance)


def test_norm_groups_need_not_be_the_heads_groups():
    mixer = make(dtype=torch.float64, groups=2, norm_groups=16)
    x, weights = torch.randn(2, 3, 11, 32, dtype=torch.float64)
    expected = values_and_gradients(mixer, lambda x: recurrence(mixer, x), x, weights)
    assert_same(values_and_gradients(mixer, mixer, x, weights), expected, 1e-11)


def test_many_small_blocks_equal_the_recurrence(monkeypatch):
    """A row at a time, as long texts are worked on, and all rows at once, as short ones are."""
    monkeypatch.setattr(ssd, "_row_blocks", lambda like, batch, row: [slice(i, i + 1) for i in range(batch)])
    mixer = make(dtype=torch.float64)
    x, weights = torch.randn(2, 3, 20, 32, dtype=torch.float64)
    ids = documents(3, 20)
    expected = values_and_gradients(mixer, lambda x: recurrence(mixer, x, ids), x, weights)
    assert_same(values_and_gradients(mixer, lambda x: mixer(x, doc_ids=ids), x, weights), expected, 1e-11)


def test_blocks_cover_the_batch():
    for batch, row in [(1, 10), (8, 2**18), (8, 2**19), (7, 2**17), (5, 2**25)]:
        blocks = ssd._row_blocks(torch.empty(0), batch, row)
        assert [i for rows in blocks for i in range(batch)[rows]] == list(range(batch))


@pytest.mark.parametrize("function", ["conv", "scan", "norm"])
def test_hand_written_gradients(function):
    """Each by finite differences, with a state and documents."""
    torch.manual_seed(0)
    runs = documents(2, 11)
    f64 = {"dtype": torch.float64, "requires_grad": True}
    if function == "conv":
        inputs = torch.randn(2, 11, 5, **f64), torch.randn(4, 5, **f64), torch.randn(5, **f64)
        same = conv_masks(runs, 4)
        for lead, mask in [(0, None), (0, same), (3, same)]:
            torch.autograd.gradcheck(lambda *args, lead=lead, mask=mask: ssd.conv_silu(
                *args, sizes=[2, 3], lead=lead, same_BWT=mask), inputs)
    elif function == "scan":
        x, dt, rate = torch.randn(1, 7, 4, 2, **f64), torch.rand(1, 7, 4, **f64), torch.rand(4, **f64)
        B, C, start = (torch.randn(*shape, **f64) for shape in [(1, 7, 2, 3), (1, 7, 2, 3), (1, 4, 2, 3)])
        for mask in [None, runs[1:, :7]]:
            torch.autograd.gradcheck(lambda x, dt, rate, B, C, start, mask=mask: ssd.scan(
                x, dt, -rate, B, C, chunk=3, start_BHPN=start, runs_BT=mask), (x, dt, rate, B, C, start))
    else:
        y, x = torch.randn(2, 3, 4, 3, **f64), torch.randn(2, 3, 4, 3, **f64)
        D, z, weight = torch.randn(4, **f64), torch.randn(2, 3, 12, **f64), torch.randn(12, **f64)
        for groups in (1, 2):
            torch.autograd.gradcheck(lambda *args, groups=groups: ssd.gated_norm(*args, groups=groups),
                                     (y, x, D, z, weight))


def test_equals_transformers():
    """The same weights in the Mamba-2 of the transformers package: outputs and gradients."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    mixer = make(hidden=64, head_dim=16, state_size=32, groups=2, chunk=16)
    theirs = Mamba2Mixer(Mamba2Config(hidden_size=64, num_heads=8, head_dim=16, state_size=32, n_groups=2,
                                      chunk_size=32, num_hidden_layers=1, layer_norm_epsilon=1e-5), 0)
    pairs = {"conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias", "norm_weight": "norm.weight"}
    pairs |= {name: name for name in ("in_proj.weight", "out_proj.weight", "A_log", "dt_bias", "D")}
    ours_named, theirs_named = dict(mixer.named_parameters()), dict(theirs.named_parameters())
    assert set(pairs) == set(ours_named) and set(pairs.values()) == set(theirs_named)
    with torch.no_grad():
        for a, b in pairs.items():
            value = ours_named[a]
            theirs_named[b].copy_(value.T[:, None] if a == "conv_weight" else value)
    x, weights = torch.randn(2, 3, 75, 64)
    ours = values_and_gradients(mixer, mixer, x, weights)
    ours["conv_weight"] = ours["conv_weight"].T[:, None]
    expected = values_and_gradients(theirs, theirs, x, weights)
    assert_same({pairs.get(name, name): value for name, value in ours.items()}, expected, 1e-4)


def in_pieces(mixer, x, ids, sizes):
    state, outputs, start = mixer.new_state(len(x), dtype=x.dtype), [], 0
    addresses = {name: value.data_ptr() for name, value in state.items()}
    for size in sizes:
        piece = slice(start, start + size)
        outputs.append(mixer(x[:, piece], state=state, doc_ids=None if ids is None else ids[:, piece]))
        start += size
    assert start == x.shape[1]
    assert {name: value.data_ptr() for name, value in state.items()} == addresses, "the state moved"
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sizes", [[24], [8, 16], [1] * 24, [3, 1, 1, 9, 2, 1, 7], [23, 1]], ids=str)
def test_whole_equals_pieces(sizes, groups, packed):
    mixer = make(dtype=torch.float64, groups=groups)
    x, ids = torch.randn(3, 24, 32, dtype=torch.float64), packing(packed, 3, 24)
    whole, whole_state = in_pieces(mixer, x, ids, [24])
    torch.testing.assert_close(whole, mixer(x, doc_ids=ids), rtol=0, atol=1e-12)
    for gradients in (True, False):  # without gradients a single token takes a path of its own
        with torch.set_grad_enabled(gradients):
            pieces, state = in_pieces(mixer, x, ids, sizes)
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)
        for name in state:
            torch.testing.assert_close(state[name], whole_state[name], rtol=0, atol=1e-12)


def test_a_state_can_go_on_without_document_ids():
    """A prompt of packed documents, then tokens that continue the last of them."""
    mixer = make(dtype=torch.float64)
    x, ids = torch.randn(2, 30, 32, dtype=torch.float64), documents(2, 30)
    ids[:, 21:] = ids[:, 20:21]
    expected = mixer(x, doc_ids=ids)[:, 21:]
    with torch.no_grad():
        for sizes in ([9], [1] * 9):
            state = mixer.new_state(2, dtype=torch.float64)
            mixer(x[:, :21], state=state, doc_ids=ids[:, :21])
            rest = [mixer(part, state=state) for part in x[:, 21:].split(sizes, 1)]
            torch.testing.assert_close(torch.cat(rest, 1), expected, rtol=0, atol=1e-12)


def test_gradients_flow_into_a_state():
    """The second half of a text trained on the state the first half left."""
    mixer = make(dtype=torch.float64)
    x, weights = torch.randn(2, 2, 20, 32, dtype=torch.float64)
    state = mixer.new_state(2, dtype=torch.float64)
    with torch.no_grad():
        mixer(x[:, :9], state=state)
    got = values_and_gradients(mixer, lambda tail: mixer(tail, state=state.clone()), x[:, 9:], weights[:, 9:])
    assert_same({"y": got["y"], "x": got["x"]}, _tail_gradients(mixer, x, weights), 1e-11)


def _tail_gradients(mixer, x, weights):
    tail = x[:, 9:].clone().requires_grad_()
    y = recurrence(mixer, torch.cat([x[:, :9], tail], 1))[:, 9:]
    (y * weights[:, 9:]).sum().backward()
    return {"y": y.detach(), "x": tail.grad}


@pytest.mark.parametrize("sizes", [[24], [10, 14], [1] * 24], ids=str)
def test_documents_are_isolated_bit_for_bit(sizes):
    """Another text in document 2, of far larger numbers, changes no bit of the others."""
    mixer = make()
    x, ids = torch.randn(3, 24, 32), documents(3, 24)
    changed = torch.where((ids == 2)[..., None], 100 * torch.randn_like(x), x)
    others = ids != 2
    with torch.no_grad():
        before, after = in_pieces(mixer, x, ids, sizes)[0], in_pieces(mixer, changed, ids, sizes)[0]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])
    if len(sizes) == 1:
        weights = torch.randn_like(x)
        first, second = (values_and_gradients(mixer, lambda x: mixer(x, doc_ids=ids), x, weights)
                         for x in (x, changed))
        assert torch.equal(first["y"][others], second["y"][others])
        assert torch.equal(first["x"][others], second["x"][others])
        assert not torch.equal(first["x"][~others], second["x"][~others])


def test_packed_documents_equal_documents_alone():
    mixer = make(dtype=torch.float64)
    x, ids = torch.randn(3, 24, 32, dtype=torch.float64), documents(3, 24)
    packed = mixer(x, doc_ids=ids)
    for row in range(3):
        for doc in ids[row].unique():
            alone = mixer(x[row : row + 1, ids[row] == doc])
            torch.testing.assert_close(packed[row : row + 1, ids[row] == doc], alone, rtol=0, atol=1e-12)


def test_long_decays_stay_finite():
    """Time steps of 50 and rates of 16: the masked half of exp(sum of decays) would overflow."""
    mixer = make()
    nn.init.constant_(mixer.dt_bias, 50.0)
    nn.init.constant_(mixer.A_log, 2.8)
    x, ids = torch.randn(2, 24, 32), documents(2, 24)
    for doc_ids in (None, ids):
        got = values_and_gradients(mixer, lambda x, d=doc_ids: mixer(x, doc_ids=d), x, torch.ones(()))
        for name, value in got.items():
            assert value.isfinite().all(), name


def test_no_time_step_no_trouble():
    """softplus(-200) is exactly 0: the token adds nothing, and gradients stay finite."""
    mixer = make()
    nn.init.constant_(mixer.dt_bias, -200.0)
    for name, value in values_and_gradients(mixer, mixer, torch.randn(2, 24, 32), torch.ones(())).items():
        assert value.isfinite().all(), name


def test_initialisation_after_meta_and_gradient_flow():
    mixer = make()
    mixer.config = Mamba2.Config(state_size=16, head_dim=8, dt_min=0.01, dt_max=0.2, dt_floor=0.05, A_min=2.0,
                                 A_max=5.0)
    for module in mixer.modules():
        module.reset_parameters()
    assert all(p.isfinite().all() for p in mixer.parameters())
    dt, A = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert dt.min() >= 0.05 - 1e-6 and dt.max() <= 0.2 + 1e-6 and dt.std() > 0
    assert A.min() >= 2 - 1e-5 and A.max() <= 5 + 1e-5 and A.std() > 0
    assert set(mixer.undecayed) <= dict(mixer.named_parameters(recurse=False)).keys()
    mixer(torch.randn(2, 24, 32)).square().mean().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_matrices_go_through_the_specs_linear():
    plain, halved = make(seed=1), make(linear=Halved, seed=1)
    assert isinstance(halved.in_proj, Halved) and isinstance(halved.out_proj, Halved)
    assert halved.out_proj.init_std < halved.in_proj.init_std
    with torch.no_grad():
        for linear in (plain.in_proj, plain.out_proj):
            linear.weight /= 2
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(plain(x), halved(x))


@pytest.mark.parametrize("packed", [False, True])
def test_bf16_autocast_stays_near_fp32(packed):
    mixer = make()
    x, weights = torch.randn(2, 3, 24, 32)
    ids = packing(packed, 3, 24)
    expected = values_and_gradients(mixer, lambda x: mixer(x, doc_ids=ids), x, weights)
    with torch.autocast("cpu", torch.bfloat16):
        got = values_and_gradients(mixer, lambda x: mixer(x, doc_ids=ids), x, weights)
        with torch.no_grad():
            one_by_one, state = in_pieces(mixer, x, ids, [1] * 24)
            pieces, _ = in_pieces(mixer, x, ids, [10, 14])
    assert got["y"].dtype == torch.bfloat16 and state["ssm"].dtype == torch.float32
    assert_same({name: value.float() for name, value in got.items()}, expected, 0.06)
    for other in (one_by_one, pieces):
        assert_same({"y": other.float()}, {"y": expected["y"]}, 0.06)


def test_whole_model_in_bf16():
    mixer = make(dtype=torch.bfloat16)
    x = torch.randn(2, 24, 32, dtype=torch.bfloat16)
    state = mixer.new_state(2)
    assert state["conv"].dtype == torch.bfloat16 and state["ssm"].dtype == torch.float32
    whole = mixer(x)
    with torch.no_grad():
        pieces = torch.cat([mixer(part, state=state) for part in x.split([13, 1, 1, 9], 1)], 1)
    assert whole.dtype == pieces.dtype == torch.bfloat16
    assert_same({"y": pieces.float()}, {"y": whole.float()}, 0.05)


@pytest.mark.parametrize("options,option,words", [
    ({"head_dim": 15}, "head_dim", ["64", "15", "16"]),
    ({"head_dim": 8, "groups": 3}, "groups", ["8 heads", "3", "2"]),
    ({"dt_min": 0.5}, "dt_min", ["0.5", "0.1"]),
    ({"A_min": 20.0}, "A_min", ["20.0", "16.0"]),
])
def test_check_names_the_nearest_legal_value(options, option, words):
    site = Site(hidden_size=32, vocab_size=64, context_length=64, layers=2)
    [(at, message)] = Mamba2.check(Mamba2.Config(**options), site)
    assert at == option
    assert all(word in message for word in words), message


def test_check_accepts_what_is_legal():
    site = Site(hidden_size=32, vocab_size=64, context_length=64, layers=2)
    assert list(Mamba2.check(Mamba2.Config(head_dim=16, groups=2), site)) == []
