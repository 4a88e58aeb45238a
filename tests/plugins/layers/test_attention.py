"""Grouped-query attention against softmax written out, against itself cut into pieces, and for isolation."""

import cmath

import pytest
import torch
from layer_tools import assemble, assert_same, gradients, part, runs_everywhere, site

from tryplicity_plugins.layers.attention import GroupedQueryAttention
from tryplicity_plugins.layers.bitlinear import BitLinear

B, T, D = 2, 13, 32
DOCS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 7, [3] * 1 + [1] * 11 + [7] * 1])


def build(heads=4, kv_heads=2, head_dim=8, qk_norm=False, rope_base=10000.0, **options):
    config = GroupedQueryAttention.Config(heads=heads, kv_heads=kv_heads, head_dim=head_dim, qk_norm=qk_norm,
                                          rope_base=rope_base)
    return GroupedQueryAttention(config, site(hidden=D, **options))


def made(dtype=torch.float32, **options):
    return assemble(lambda: build(**options), spread=0.3, dtype=dtype)


def by_formula(layer, x, docs=None):
    """Each query against each key it may see, one number after the other."""
    H, G, K = layer.heads, layer.kv_heads, layer.head_dim

    def turned(vector, position, norm):
        if norm is not None:
            vector = vector / (vector.square().mean() + norm.eps).sqrt() * norm.weight
        parts = []
        for i in range(K // 2):
            turn = cmath.exp(1j * position * layer.rope_base ** (-2 * i / K))
            a, b = vector[2 * i], vector[2 * i + 1]
            parts += [a * turn.real - b * turn.imag, a * turn.imag + b * turn.real]
        return torch.stack(parts)

    rows = []
    for b, row in enumerate(x):
        q, k, v = (row @ layer.qkv.weight.T).split([H * K, G * K, G * K], dim=-1)
        q, k, v = q.view(-1, H, K), k.view(-1, G, K), v.view(-1, G, K)
        k = [[turned(k[t, g], t, layer.k_norm) for g in range(G)] for t in range(len(row))]
        outputs = []
        for t in range(len(row)):
            seen = [s for s in range(t + 1) if docs is None or docs[b, s] == docs[b, t]]
            heads = []
            for h in range(H):
                g = h * G // H
                query = turned(q[t, h], t, layer.q_norm)
                weights = torch.stack([query @ k[s][g] for s in seen]).div(K**0.5).softmax(0)
                heads.append(sum(w * v[s, g] for w, s in zip(weights, seen, strict=True)))
            outputs.append(torch.cat(heads))
        rows.append(torch.stack(outputs) @ layer.out.weight.T)
    return torch.stack(rows)


@pytest.mark.parametrize("docs", [None, DOCS])
@pytest.mark.parametrize("options", [{}, {"kv_heads": 4}, {"kv_heads": 1, "head_dim": 6, "rope_base": 100.0},
                                     {"qk_norm": True}, {"kv_heads": None, "head_dim": None}])
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
@pytest.mark.parametrize("sizes", [[1] * 150, [64, 1, 85], [63, 2, 1, 1, 83], [100, 50], [7] * 21 + [3]])
@torch.no_grad()
def test_whole_is_chunks_is_token_by_token(sizes, packed):
    layer = made(qk_norm=True, context=64)  # shorter than the text: positions go on
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
def test_nothing_leaks_from_the_cache():
    layer, x = made(), torch.randn(B, T, D)
    results = []
    mine = DOCS.eq(DOCS[:, -1:])
    for text in (x, torch.where(mine[..., None], x, x * 100)):
        outputs, _ = pieces(layer, text, DOCS, [5, *[1] * (T - 5)])
        results.append(outputs[mine])
    assert torch.equal(*results)


@torch.no_grad()
def test_the_future_does_not_matter():
    layer, x = made(), torch.randn(B, T, D)
    changed = x.clone()
    changed[:, 8:] += 1
    for docs in (None, DOCS):
        assert torch.equal(layer(x, doc_ids=docs)[:, :8], layer(changed, doc_ids=docs)[:, :8])


@torch.no_grad()
def test_rotations_stay_fp32_in_a_bf16_model():
    layer, x = made(), torch.randn(B, 40, D)
    expected = layer(x)
    layer.bfloat16()
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert layer.rotation.dtype == torch.float32
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
])
def test_check(options, hidden, problems):
    found = dict(GroupedQueryAttention.check(GroupedQueryAttention.Config(**options), site(hidden=hidden)))
    assert found.keys() == problems.keys()
    for option, words in problems.items():
        assert words in found[option]


@pytest.mark.parametrize("docs", [None, DOCS])
@pytest.mark.parametrize("options", [{}, {"linear": BitLinear}, {"qk_norm": True}])
def test_runs_everywhere(options, docs):
    ids = [] if docs is None else [docs]
    runs_everywhere(lambda: build(**options), lambda m, x, *ids: m(x, doc_ids=ids[0] if ids else None),
                    torch.randn(B, T, D), *ids)


def test_parts_are_built_of_the_specs_components():
    layer = build(linear=BitLinear, qk_norm=True)
    assert isinstance(layer.qkv, BitLinear) and isinstance(layer.out, BitLinear)
    assert part(GroupedQueryAttention).as_dict()["type"] == "gqa"
