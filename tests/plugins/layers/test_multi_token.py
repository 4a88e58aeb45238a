"""Multi-token prediction against loops."""

import pytest
import torch
from layer_tools import assemble, assert_same, gradients, part, site
from torch.nn import functional as F

from tryplicity import IGNORE
from tryplicity_plugins.layers.multi_token import MultiTokenPrediction

V = 50


def build(tokens=4, **options):
    return part(MultiTokenPrediction, tokens=tokens, inner_size=24).build(site(vocab=V, **options))


def by_loop(ids_BT, next_BT, doc_ids_BT, depths):
    """Position t, depth k: the token t + k, if it is there (perhaps just beyond the row), of t's document and
    not masked as a next token."""
    B, T = ids_BT.shape
    targets = torch.full((B, T, len(depths)), IGNORE)
    for b in range(B):
        for t in range(T):
            for i, k in enumerate(depths):
                source = t + k - 1  # the position whose next token this is
                if source >= T or next_BT[b, source] == IGNORE:
                    continue
                if doc_ids_BT is not None:
                    others = doc_ids_BT[b, t:min(t + k, T - 1) + 1]
                    if (others != doc_ids_BT[b, t]).any():
                        continue
                targets[b, t, i] = next_BT[b, source]
    return targets


def rows(B=3, T=16):
    torch.manual_seed(1)
    tokens = torch.randint(V, (B, T + 1))
    docs = (torch.rand(B, T) < 0.3).long().cumsum(1)
    return tokens[:, :-1], tokens[:, 1:].clone(), docs


@pytest.mark.parametrize("tokens", [2, 3, 4])
@pytest.mark.parametrize("masked", ["nothing", "crossings", "crossings and some"])
@pytest.mark.parametrize("packed", [False, True])
def test_targets(tokens, masked, packed):
    ids, following, docs = rows()
    if masked != "nothing":
        following[:, :-1][docs[:, 1:] != docs[:, :-1]] = IGNORE
    if masked == "crossings and some":
        following[torch.rand(following.shape) < 0.3] = IGNORE
    docs = docs if packed else None
    targets = build(tokens).targets(ids, following, docs)
    assert targets.shape == (3, 16, tokens - 1)
    assert torch.equal(targets, by_loop(ids, following, docs, range(2, tokens + 1)))
    assert (targets != IGNORE).any()


def test_targets_by_hand():
    ids = torch.tensor([[10, 11, 12, 20, 21]])
    following = torch.tensor([[11, 12, IGNORE, 21, 22]])
    docs = torch.tensor([[0, 0, 0, 1, 1]])
    I = IGNORE
    assert build(3).targets(ids, following, docs)[0].tolist() == [[12, I], [I, I], [I, I], [22, I], [I, I]]
    assert build(3).targets(ids, following, None)[0].tolist() == [[12, I], [I, 21], [21, 22], [22, I], [I, I]]


def test_rows_shorter_than_the_depths():
    for T in (1, 2, 3):
        ids = torch.arange(T)[None]
        targets = build(4).targets(ids, ids + 1, torch.zeros_like(ids))
        assert torch.equal(targets, by_loop(ids, ids + 1, torch.zeros_like(ids), [2, 3, 4]))


def test_values_and_gradients():
    head = assemble(build, spread=0.3)
    assert head.weight == 0.5
    ids, following, docs = rows()
    targets = head.targets(ids, following, docs)
    h, unembedding = torch.randn(3, 16, 32, requires_grad=True), torch.randn(V, 32, requires_grad=True)
    total, count = 0, 0
    for i, depth in enumerate(head.depths):
        normal = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * depth.norm.weight
        gate, up = depth.gate_up.weight.chunk(2)
        inner = (normal @ gate.T) * (normal @ gate.T).sigmoid() * (normal @ up.T)
        logits = (h + inner @ depth.down.weight.T) @ unembedding.T
        total = total + F.cross_entropy(logits.flatten(0, 1), targets[..., i].flatten(), reduction="sum")
        count += (targets[..., i] != IGNORE).sum()
    mean = head(h, targets, unembedding)
    assert_same([mean.total], [total], 1e-5)
    assert mean.count == count > 0
    wanted = [h, unembedding, *head.parameters()]
    assert_same(gradients(mean.total, wanted), gradients(total, wanted), 1e-4)


def test_size_of_the_full_model():
    """Three depths of hidden 2048 and inner 8192, three matrices each: about 151 million."""
    with torch.device("meta"):
        head = MultiTokenPrediction(MultiTokenPrediction.Config(), site(hidden=2048, vocab=32000))
    assert sum(p.numel() for p in head.parameters()) == 3 * (3 * 2048 * 8192 + 2048)
