import torch
from tryplicity_retention.mixer import Retention

from tryplicity.testing import check


def test_it_keeps_its_promises():
    assert check(Retention) == []


def test_it_is_the_recurrence_of_the_paper():
    """S_t = g S_(t-1) + k_t v_t, read by q_t, token by token."""
    layer = Retention.__new__(Retention)
    torch.nn.Module.__init__(layer)
    layer.heads, layer.head_dim, layer.decay_H = 2, 3, torch.tensor([0.9, 0.5])
    q, k, v = (torch.randn(1, 2, 6, 3) for _ in range(3))
    memory_HKK, expected = torch.zeros(2, 3, 3), []
    for t in range(6):
        memory_HKK = layer.decay_H[:, None, None] * memory_HKK + k[0, :, t, :, None] * v[0, :, t, None, :]
        expected.append(torch.einsum("hk,hkj->hj", q[0, :, t], memory_HKK))
    torch.testing.assert_close(layer.retained(q, k, v, None, None)[0], torch.stack(expected, 1))
