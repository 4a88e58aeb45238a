"""What the benchmark of a card's choices hands to torch's attention over documents, which has no kernel for a CPU: a
plain one stands in, written from that function's documentation."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tests.benchmarks import card_choices
from tests.benchmarks.card_parts import Place
from tryplicity_plugins.layers.masked_attention import masked_attention

DOCS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 6, [2] * 12, [0] * 2 + [1] * 10], dtype=torch.int32)


def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa=False):
    """Sequence by sequence: a query sees window_size[0] keys before its own, or all with -1, and none after."""
    assert cu_seq_q.dtype == torch.int32 and cu_seq_q[0] == 0 and cu_seq_q[-1] == len(query)
    assert max_q >= cu_seq_q.diff().max() and max_k >= cu_seq_k.diff().max() and window_size[1] == 0
    out = torch.full_like(query, torch.nan)
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        place = torch.arange(end - start)
        mask = place[:, None] >= place
        if window_size[0] != -1:
            mask &= place[:, None] - place <= window_size[0]
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        out = torch.cat([out[:start], F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=enable_gqa)
                         .transpose(0, 1), out[end:]])
    return out


def test_where_documents_begin_written_out():
    assert card_choices.borders(DOCS, 6).tolist() == [0, 5, 6, 12, 24, 26, 36]
    assert card_choices.borders(DOCS, 9).tolist() == [0, 5, 6, 12, 24, 26, 36, 36, 36, 36]
    assert card_choices.borders(DOCS[1:2], 1).tolist() == [0, 12]


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_arguments_make_it_the_masked_attention(groups, window, monkeypatch):
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, 12, 8, generator=generator, dtype=torch.float64, requires_grad=True)
               for n in (4, groups, groups))
    found = [card_choices.varlen(q, k, v, DOCS, 8, window), masked_attention(q, k, v, DOCS, window)]
    gradients = [torch.autograd.grad((y * y.detach().cos()).sum(), (q, k, v)) for y in found]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*gradients)


def test_torch_takes_these_arguments():
    """Its operator itself, on tensors without data, forward and backward."""
    groups = 2 if card_choices.knows_groups() else 4
    with FakeTensorMode():
        q, k, v = (torch.empty(3, n, 12, 8, dtype=torch.bfloat16, requires_grad=True) for n in (4, groups, groups))
        y = card_choices.varlen(q, k, v, torch.zeros(3, 12, dtype=torch.int32), 8)
        assert y.shape == q.shape
        assert [g.shape for g in torch.autograd.grad(y.sum(), (q, k, v))] == [t.shape for t in (q, k, v)]


def test_the_part_runs_without_a_card():
    found = card_choices.choices(Place("tiny", "cpu", 1))
    assert found["ok"] and "from kept digits" in found["result"]
