"""Attention over pages in C: against the PyTorch path, and the same bits however the tokens come."""

import pytest
import torch
from layer_tools import assemble, assert_same, site

from tryplicity import Rows
from tryplicity_plugins.layers import native
from tryplicity_plugins.layers.attention import GroupedQueryAttention
from tryplicity_plugins.layers.bitlinear import BitLinear

D, LENGTH = 32, 210
SHAPES = [{"heads": 4, "kv_heads": 2, "head_dim": 8}, {"heads": 3, "kv_heads": 3, "head_dim": 6},
          {"heads": 8, "kv_heads": 1, "head_dim": 10}, {"heads": 2, "kv_heads": 1, "head_dim": 64},
          {"heads": 4, "kv_heads": 2, "head_dim": 8, "qk_norm": True},
          {"heads": 4, "kv_heads": 2, "head_dim": 7, "rope_base": None, "scale": 0.2},
          {"heads": 4, "kv_heads": 2, "head_dim": 8, "rotary_fraction": 0.5, "softcap": 1.5},
          {"heads": 4, "kv_heads": 1, "head_dim": 8, "window": 5},
          {"heads": 4, "kv_heads": 2, "head_dim": 8, "window": 65},
          {"heads": 4, "kv_heads": 1, "head_dim": 16, "window": 100, "softcap": 0.5, "rotary_fraction": 0.25}]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Same(torch.nn.Module):
    """A product that is none, so that what is compared is attention alone."""

    def forward(self, x):
        return x


def made(shape, seed=0):
    """The layer with its input and output left bare: it maps q, k and v [B, T, (H + 2 G) K] to [B, T, H K]."""
    torch.manual_seed(seed)
    layer = assemble(lambda: GroupedQueryAttention(GroupedQueryAttention.Config(**shape), site(hidden=D)), spread=0.3)
    layer.qkv = layer.out = Same()
    return layer


def qkv_of(layer, batch, length=LENGTH, seed=1):
    torch.manual_seed(seed)
    return torch.randn(batch, length, (layer.heads + 2 * layer.kv_heads) * layer.head_dim) * 2


def in_pieces(layer, qkv, sizes, state=None):
    state = state or layer.new_state(len(qkv))
    return torch.cat([layer(part.contiguous(), state=state) for part in qkv.split(sizes, dim=1)], 1)


@pytest.fixture(autouse=True)
def in_c():
    if native.library() is None:
        pytest.fail("these tests need a C++ compiler")
    with torch.no_grad():
        yield


@every_shape
def test_the_values_are_those_of_the_pytorch_path(shape, monkeypatch):
    layer = made(shape)
    qkv = qkv_of(layer, 2)
    state = layer.new_state(2)
    actual = in_pieces(layer, qkv, [100, 28, 1, 81], state)
    assert_same([actual], [layer(qkv)], 2e-6)
    monkeypatch.setattr(native, "for_inference", lambda x: False)
    theirs = layer.new_state(2)
    assert_same([actual], [in_pieces(layer, qkv, [100, 28, 1, 81], theirs)], 2e-6)
    kept = state["freed"] * 64
    assert_same(state.read(LENGTH, kept), theirs.read(LENGTH, kept), 1e-6)
    # either path goes on from where the other stopped
    more = qkv_of(layer, 2, 3, seed=5)
    assert_same([layer(more, state=state)], [layer(more, state=theirs)], 2e-6)


@every_shape
@pytest.mark.parametrize("sizes", [[1] * LENGTH, [64, 64, 64, 18], [63, 2, 1, 144], [7] * 30, [200, 10]])
def test_a_token_has_the_same_bits_in_any_chunk(shape, sizes):
    layer = made(shape)
    qkv = qkv_of(layer, 1)
    assert torch.equal(in_pieces(layer, qkv, sizes), in_pieces(layer, qkv, [LENGTH]))


@every_shape
def test_a_token_has_the_same_bits_beside_others(shape):
    layer = made(shape)
    qkv, lengths = qkv_of(layer, 4), [0, 63, 130, 5]
    rows, alone = [layer.new_state(1) for _ in lengths], [layer.new_state(1) for _ in lengths]
    for i, length in enumerate(lengths):
        for state in (rows[i], alone[i]):
            if length:
                layer(qkv[i:i + 1, :length].contiguous(), state=state)
    for new in (1, 1, 70):
        step = torch.stack([qkv[i, state["seen"]:state["seen"] + new] for i, state in enumerate(rows)])
        together = layer(step, state=Rows(rows))
        for i, state in enumerate(alone):
            assert torch.equal(together[i:i + 1], layer(step[i:i + 1], state=state))
    assert [state["seen"] for state in rows] == [length + 72 for length in lengths]
    # and a batch that goes in step
    both = layer.new_state(4)
    assert torch.equal(layer(qkv, state=both), torch.cat([layer(row[None], state=layer.new_state(1)) for row in qkv]))


def test_rows_without_c(monkeypatch):
    layer = made(SHAPES[0])
    qkv, lengths = qkv_of(layer, 2), [3, 70]
    expected = [in_pieces(layer, qkv[i:i + 1, :length + 2], [length, 2])[:, length:]
                for i, length in enumerate(lengths)]
    monkeypatch.setattr(native, "for_inference", lambda x: False)
    rows = [layer.new_state(1) for _ in lengths]
    for i, length in enumerate(lengths):
        layer(qkv[i:i + 1, :length].contiguous(), state=rows[i])
    step = torch.stack([qkv[i, length:length + 2] for i, length in enumerate(lengths)])
    assert_same([layer(step, state=Rows(rows))], [torch.cat(expected)], 2e-6)


@pytest.mark.parametrize("shape", [{"heads": 16, "kv_heads": 4, "head_dim": 64}])
def test_threads_change_no_bit(shape):
    layer = made(shape)
    qkv = qkv_of(layer, 2, 400)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(in_pieces(layer, qkv, [399, 1]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("window", [5, 64, 100])
def test_what_is_behind_a_window_reaches_nothing_even_as_nan(window):
    layer = made({"heads": 4, "kv_heads": 2, "head_dim": 8, "window": window})
    qkv = qkv_of(layer, 1)
    broken = qkv.clone()
    broken[:, :70] = torch.nan
    clean = in_pieces(layer, qkv, [100, LENGTH - 100])
    assert torch.equal(in_pieces(layer, broken, [100, LENGTH - 100])[:, 70 + window - 1:], clean[:, 70 + window - 1:])


def test_a_later_token_reaches_no_earlier_one_even_as_nan():
    layer = made(SHAPES[0])
    qkv = qkv_of(layer, 1)
    broken = qkv.clone()
    broken[:, 100:] = torch.nan
    assert torch.equal(in_pieces(layer, broken, [LENGTH])[:, :100], in_pieces(layer, qkv, [LENGTH])[:, :100])


def test_scores_far_apart_and_equal():
    """One key in front of all others by hundreds: its value; all keys the same: the mean of the values."""
    layer = made({"heads": 1, "kv_heads": 1, "head_dim": 8})
    state, count = layer.new_state(1), 130
    q, k, v = torch.zeros(1, count, 8), torch.zeros(1, count, 8), torch.randn(1, count, 8)
    layer(torch.cat((q, k, v), -1), state=state)
    last = layer(torch.cat((q[:, :1], k[:, :1], v[:, :1]), -1), state=state)
    torch.testing.assert_close(last[0, 0], torch.cat((v[0], v[0, :1])).mean(0))
    state = layer.new_state(1)
    k[:, 20] = 100.0  # of the query's own position: rotations leave no product of it this large elsewhere
    layer(torch.cat((q, k, v), -1), state=state)
    rotation = torch.view_as_complex(layer.rotary.rotation)
    turned = torch.view_as_complex(torch.full((1, 4, 2), 100.0)) * rotation[20:21]
    q_last = torch.view_as_real(turned * rotation[count:count + 1].conj()).view(1, 1, 8)
    last = layer(torch.cat((q_last, k[:, :1], v[:, :1]), -1), state=state)
    torch.testing.assert_close(last[0, 0], v[0, 20])


@pytest.mark.parametrize("seen", [1, 63, 64, 65, 128])
def test_a_clone_shares_full_pages_and_goes_its_own_way(seen):
    layer = made(SHAPES[0])
    qkv, other = qkv_of(layer, 1), qkv_of(layer, 1, seed=2)
    state = layer.new_state(1)
    layer(qkv[:, :seen], state=state)
    twin = state.clone()
    shared = [a.data_ptr() == b.data_ptr() for a, b in zip(state["pages"], twin["pages"], strict=True)]
    assert shared == [True] * (seen // 64) + [False] * (seen % 64 > 0)
    theirs = in_pieces(layer, other[:, seen:], [1] * 5 + [LENGTH - seen - 5], twin)
    mine = in_pieces(layer, qkv[:, seen:], [LENGTH - seen], state)
    assert torch.equal(mine, in_pieces(layer, qkv, [LENGTH])[:, seen:])
    branched = torch.cat((qkv[:, :seen], other[:, seen:]), 1)
    assert torch.equal(theirs, in_pieces(layer, branched, [LENGTH])[:, seen:])


def test_positions_beyond_the_context_length():
    layer = made(SHAPES[0])
    layer.rotary.rotation = layer.rotary.rotation[:32].clone()
    qkv = qkv_of(layer, 1)
    assert_same([in_pieces(layer, qkv, [150, 60])], [made(SHAPES[0])(qkv)], 2e-6)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"window": 70, "rotary_fraction": 0.5, "softcap": 2.0},
                                     {"out_norm": True}, {"bias": True}, {"out_bias": True}], ids=str)
def test_a_packed_layer(options):
    """In one call with its products: what it gives unpacked, and the same bits in any chunk and beside others."""
    torch.manual_seed(0)
    layer = assemble(lambda: GroupedQueryAttention(GroupedQueryAttention.Config(heads=4, kv_heads=2, **options),
                                                   site(hidden=D, linear=BitLinear)), spread=0.3).eval()
    x = torch.randn(1, LENGTH, D)
    expected = in_pieces(layer, x, [LENGTH])
    for linear in (layer.qkv, layer.out):
        linear.adopt(linear.pack())
    whole = in_pieces(layer, x, [LENGTH])
    error = (whole - expected).abs() / expected.abs().max()
    assert error.max() < 2e-2 and (error > 1e-5).float().mean() < 0.3  # a few numbers fall to the next of 127 steps
    assert torch.equal(in_pieces(layer, x, [1] * 70 + [LENGTH - 70]), whole)
    rows = [layer.new_state(1) for _ in range(3)]
    for state, length in zip(rows, (1, 64, 130), strict=True):
        layer(x[:, :length].contiguous(), state=state)
    step = torch.cat([x[:, state["seen"]:state["seen"] + 2] for state in rows])
    at = [state["seen"] for state in rows]
    together = layer(step, state=Rows(rows))
    assert torch.equal(together, torch.cat([whole[:, start:start + 2] for start in at]))
