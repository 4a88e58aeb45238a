"""Grouped-query attention against softmax written out, against itself cut into pieces, and for isolation."""

import cmath

import pytest
import torch
from layer_tools import assemble, assert_same, gradients, part, site

from tryplicity_plugins.layers.attention import GroupedQueryAttention
from tryplicity_plugins.layers.bitlinear import BitLinear
from tryplicity_plugins.layers.rotary import RopeScaling

B, T, D = 2, 13, 32
DOCS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 7, [3] * 1 + [1] * 11 + [7] * 1])


#: each option, and several at once
OPTIONS = {
    "plain": {}, "as many": {"kv_heads": 4}, "one": {"kv_heads": 1, "head_dim": 6, "rope_base": 100.0},
    "qk_norm": {"qk_norm": True}, "sizes by default": {"kv_heads": None, "head_dim": None},
    "no positions": {"rope_base": None}, "odd heads": {"rope_base": None, "head_dim": 7},
    "half turned": {"rotary_fraction": 0.5}, "biases": {"bias": True, "out_bias": True},
    "norm of the width": {"qk_norm": True, "qk_norm_over": "width"}, "window": {"window": 4}, "itself": {"window": 1},
    "scale": {"scale": 0.2}, "soft cap": {"softcap": 0.7}, "out norm": {"out_norm": True},
    "all": {"rotary_fraction": 0.75, "bias": True, "qk_norm": True, "qk_norm_over": "width", "window": 5, "scale": 0.5,
            "softcap": 1.5, "out_norm": True, "out_bias": True}}
every = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def build(linear=None, context=64, **options):
    config = GroupedQueryAttention.Config(**{"heads": 4, "kv_heads": 2, "head_dim": 8, **options})
    return GroupedQueryAttention(config, site(hidden=D, linear=linear, context=context))


def made(dtype=torch.float32, **options):
    return assemble(lambda: build(**options), spread=0.3, dtype=dtype)


def by_formula(layer, x, docs=None):
    """Each query against the keys it may see, one query after the other."""
    H, G, K, scores = layer.heads, layer.kv_heads, layer.head_dim, layer.scores

    def normed(x, norm, over):
        if norm is None:
            return x
        x = x.unflatten(-1, (-1, over))
        return (x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight).flatten(-2)

    def turned(vector, position):
        dims = 0 if layer.rotary is None else layer.rotary.dims
        parts = []
        for i in range(dims // 2):
            turn = cmath.exp(1j * position * layer.rotary.base ** (-2 * i / dims))
            a, b = vector[2 * i], vector[2 * i + 1]
            parts += [a * turn.real - b * turn.imag, a * turn.imag + b * turn.real]
        return torch.stack([*parts, *vector[dims:]])

    def product(x, linear):
        return x @ linear.weight.T if linear.bias is None else x @ linear.weight.T + linear.bias

    rows = []
    for b, row in enumerate(x):
        q, k, v = product(row, layer.qkv).split([H * K, G * K, G * K], dim=-1)
        q, k = normed(q, layer.q_norm, H * K if layer.whole_norm else K), normed(k, layer.k_norm,
                                                                                G * K if layer.whole_norm else K)
        q, k, v = q.view(-1, H, K), k.view(-1, G, K), v.view(-1, G, K)
        k = torch.stack([torch.stack([turned(k[t, g], t) for g in range(G)]) for t in range(len(row))])
        outputs = []
        for t in range(len(row)):
            seen = [s for s in range(t + 1) if (docs is None or docs[b, s] == docs[b, t])
                    and (layer.window is None or t - s < layer.window)]
            heads = []
            for h in range(H):
                g = h * G // H
                query = turned(q[t, h], t)
                score = k[seen, g] @ query * (scores.scale or K**-0.5)
                score = score if scores.softcap is None else scores.softcap * torch.tanh(score / scores.softcap)
                heads.append(score.softmax(0) @ v[seen, g])
            outputs.append(torch.cat(heads))
        rows.append(product(normed(torch.stack(outputs), layer.out_norm, H * K), layer.out))
    return torch.stack(rows)


@pytest.mark.parametrize("docs", [None, DOCS])
@every
def test_values_and_gradients(options, docs):
    layer = made(torch.float64, **options)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    actual, expected = layer(x, doc_ids=docs), by_formula(layer, x, docs)
    # the table of rotations is fp32
    assert_same([actual], [expected], 1e-6)
    assert_same(gradients(actual, wanted), gradients(expected, wanted), 1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_fp32(kv_heads):
    layer = made(kv_heads=kv_heads)
    x = torch.randn(B, T, D, requires_grad=True)
    for docs in (None, DOCS):
        actual, expected = layer(x, doc_ids=docs), by_formula(layer, x, docs)
        assert_same([actual], [expected], 1e-5)
        wanted = [x, *layer.parameters()]
        assert_same(gradients(actual, wanted), gradients(expected, wanted), 1e-4)


def pieces(layer, x, docs, sizes):
    state, outputs, start = layer.new_state(len(x)), [], 0
    for size in sizes:
        part_ids = None if docs is None else docs[:, start:start + size]
        outputs.append(layer(x[:, start:start + size], state=state, doc_ids=part_ids))
        start += size
    assert start == x.shape[1] == state["seen"]
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sizes", [[1] * 70 + [80], [64, 1, 85], [63, 2, 1, 1, 83], [100, 50]])
@pytest.mark.parametrize("options", [{"qk_norm": True}, {"rope_base": None}, {"rotary_fraction": 0.5, "scale": 0.2},
                                     {"rope_scaling": RopeScaling("yarn", 4.0, original_context=16)},
                                     {"softcap": 0.7, "bias": True}, {"out_norm": True}], ids=str)
@torch.no_grad()
def test_whole_is_chunks_is_token_by_token(options, sizes, packed):
    layer = made(**options, context=64)  # shorter than the text: positions go on
    x = torch.randn(B, 150, D)
    docs = torch.arange(150).div(40, rounding_mode="floor").expand(B, -1) if packed else None
    expected, expected_state = pieces(layer, x, docs, [150])
    assert_same([layer(x, doc_ids=docs)], [expected], 1e-5)
    actual, state = pieces(layer, x, docs, sizes)
    assert_same([actual], [expected], 1e-5)
    assert state.keys() == expected_state.keys()
    assert len(state["pages"]) == 3
    assert_same(state.read(150), expected_state.read(150), 1e-5)
    if packed:
        assert torch.equal(state["documents"], expected_state["documents"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("sizes, window", [([1] * 150 + [150], 1), ([1] * 150 + [150], 70), ([64, 1, 235], 64),
                                           ([63, 2, 1, 1, 233], 5), ([200, 100], 64), ([7] * 42 + [6], 70)])
@torch.no_grad()
def test_a_window_in_pieces_keeps_no_more_than_it_needs(sizes, window, native, packed):
    layer = made(torch.float32 if native else torch.float64, window=window)
    x = torch.randn(B, 300, D).to(layer.qkv.weight.dtype)
    docs = torch.arange(300).div(80, rounding_mode="floor").expand(B, -1) if packed else None
    state, outputs, start = layer.new_state(B), [], 0
    for size in sizes:
        part_ids = None if docs is None else docs[:, start:start + size]
        outputs.append(layer(x[:, start:start + size], state=state, doc_ids=part_ids))
        start += size
        # of the tokens before the next one `window` are kept, in whole pages
        first = max(0, start - window) // 64
        assert (state["freed"], len(state["pages"])) == (first, -(-start // 64) - first)
        if packed:
            assert state["documents"].shape[1] <= 2 * max(64, window + size + 64)
        state = state.clone()
    assert_same([torch.cat(outputs, 1)], [layer(x, doc_ids=docs)], 1e-5)
    assert_same([torch.cat(outputs, 1)], [made_of_mask(layer, x, docs, window)], 1e-5)


def made_of_mask(layer, x, docs, window):
    """The layer with a mask of every token against every other."""
    H, G = layer.heads, layer.kv_heads
    qkv = layer.qkv(x).unflatten(-1, (-1, layer.head_dim))
    qk, v = layer.rotary(qkv[:, :, :H + G], 0), qkv[:, :, H + G:]
    q, k, v = (t.transpose(1, 2) for t in (qk[:, :, :H], qk[:, :, H:], v))
    near = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    mask = ((near >= 0) & (near < window)).expand(len(x), 1, -1, -1)
    if docs is not None:
        mask = mask & (docs[:, None, :, None] == docs[:, None, None, :])
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    return layer.out(y.transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("native", [True, False])
def test_the_cache_never_recomputes(native):
    """What stands in the cache is not touched by later tokens; it grows by whole pages."""
    layer, x = made(dtype=torch.float32 if native else torch.float64), torch.randn(1, 200, D)
    x = x.to(layer.qkv.weight.dtype)
    state = layer.new_state(1)
    for t in range(200):
        before = state.clone()
        layer(x[:, t:t + 1], state=state)
        if t:
            assert all(map(torch.equal, state.read(t), before.read(t)))
        assert len(state["pages"]) == t // 64 + 1


@torch.no_grad()
def test_a_call_without_ids_goes_on_with_the_last_document():
    layer, x = made(), torch.randn(B, T, D)
    docs = torch.cat([DOCS[:, :9], DOCS[:, 8:9].expand(-1, T - 9)], 1)
    expected = layer(x, doc_ids=docs)
    state = layer.new_state(B)
    first = layer(x[:, :9], state=state, doc_ids=docs[:, :9])
    rest = [layer(x[:, t:t + 1], state=state) for t in range(9, T)]
    assert_same([torch.cat([first, *rest], 1)], [expected], 1e-5)
    state = layer.new_state(B)  # and tokens before any ids are a document of their own
    first = layer(x[:, :5], state=state)
    rest = layer(x[:, 5:], state=state, doc_ids=torch.zeros(B, T - 5, dtype=torch.long))
    apart = torch.zeros(B, T, dtype=torch.long)
    apart[:, 5:] = 1
    assert_same([torch.cat([first, rest], 1)], [layer(x, doc_ids=apart)], 1e-5)


def test_gradients_reach_the_new_tokens_of_a_continued_text():
    layer = made()
    x = torch.randn(B, T, D)
    state = layer.new_state(B)
    with torch.no_grad():
        layer(x[:, :6], state=state)
    new = x[:, 6:].clone().requires_grad_()
    expected = layer(torch.cat([x[:, :6], new], 1))[:, 6:]
    assert_same(gradients(layer(new, state=state), [new]), gradients(expected, [new]), 1e-4)


@torch.no_grad()
def test_packed_documents_are_as_if_alone():
    layer, x = made(torch.float64), torch.randn(B, T, D, dtype=torch.float64)
    packed = layer(x, doc_ids=DOCS)
    for b in range(B):
        for doc in DOCS[b].unique():
            mine = DOCS[b] == doc
            # rotary positions are relative, so where the document starts does not matter
            assert_same([packed[b, mine]], [layer(x[b:b + 1, mine])[0]], 1e-6)


@pytest.mark.parametrize("length", [T, 700])  # within one tile of the kernel and over several
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_nothing_leaks_bit_for_bit(kv_heads, length):
    """Outputs and gradients of a document are equal, not just close, whatever stands in the others."""
    layer = made(kv_heads=kv_heads)
    docs = torch.arange(length).mul(3).div(length, rounding_mode="floor").expand(B, -1)
    x = torch.randn(B, length, D)
    mine = docs[0] == 1
    results = []
    for seed in range(3):
        torch.manual_seed(seed)
        other = torch.where(mine[:, None], x, torch.randn_like(x) * 10.0**seed).requires_grad_()
        y = layer(other, doc_ids=docs)
        y[:, mine].square().sum().backward()
        assert other.grad[:, ~mine].abs().max() == 0
        results.append((y[:, mine].detach(), other.grad[:, mine]))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    assert results[0][1].abs().max() > 0


@torch.no_grad()
def test_rotations_stay_fp32_in_a_bf16_model():
    layer, x = made(), torch.randn(B, 40, D)
    expected = layer(x)
    layer.bfloat16()
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert layer.rotary.rotation.dtype == torch.float32
    torch.testing.assert_close(y.float(), expected, rtol=5e-2, atol=5e-2 * expected.abs().max().item())


@torch.no_grad()
def test_decoding_under_autocast():
    layer, x = made(), torch.randn(B, T, D)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        actual, state = pieces(layer, x, None, [6, *[1] * (T - 6)])
    assert state["pages"][0].dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2 * expected.abs().max().item())


@pytest.mark.parametrize("options, hidden, problems", [
    ({"heads": 4, "kv_heads": 2}, 32, {}),
    ({"heads": 12, "kv_heads": 5}, 48, {"kv_heads": "not divide heads (12); the nearest that does is 4"}),
    ({"heads": 5}, 32, {"heads": "not cut hidden_size (32) into even parts; the nearest that does is 4"}),
    ({"heads": 32}, 32, {"heads": "into even parts; the nearest that does is 16"}),
    ({"heads": 4, "head_dim": 7}, 32, {"head_dim": "the nearest even number is 8"}),
    ({"heads": 5, "kv_heads": 2, "head_dim": 3}, 32, {"kv_heads": "is 1", "head_dim": "is 4"}),
    ({"heads": 32, "rope_base": None}, 32, {}),
    ({"heads": 5, "rope_base": None}, 32, {"heads": "into equal parts; the nearest that does is 4"}),
    ({"heads": 4, "head_dim": 8, "rotary_fraction": 0.4}, 32, {"rotary_fraction": "is 3, and rotary positions turn "
                                                               "pairs; 0.5 is an even number"}),
    ({"heads": 4, "rotary_fraction": 0.1}, 32, {"rotary_fraction": "is 0, and rotary positions turn pairs; 0.25"}),
    ({"heads": 4, "rope_base": None, "rotary_fraction": 0.5, "rope_scaling": RopeScaling("linear", 2.0)}, 32,
     {"rotary_fraction": "no positions to turn", "rope_scaling": "no positions to turn"}),
    ({"heads": 4, "qk_norm_over": "width"}, 32, {"qk_norm_over": "without qk_norm: true"}),
])
def test_check(options, hidden, problems):
    found = dict(GroupedQueryAttention.check(GroupedQueryAttention.Config(**options), site(hidden=hidden)))
    assert found.keys() == problems.keys()
    for option, words in problems.items():
        assert words in found[option]


def test_parts_are_built_of_the_specs_components():
    layer = build(linear=BitLinear, qk_norm=True)
    assert isinstance(layer.qkv, BitLinear) and isinstance(layer.out, BitLinear)
    assert part(GroupedQueryAttention).as_dict()["type"] == "gqa"
