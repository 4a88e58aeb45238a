"""AdamW against the algorithm of the paper, step by step, in plain Python."""

import math

import pytest
import torch

from tryplicity_plugins.optimization.adamw import AdamW


def by_hand(p, gradients, *, lr, beta1, beta2, eps, decay):
    """Loshchilov and Hutter, arXiv:1711.05101, algorithm 2, with lr times the decay."""
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        p -= lr * decay * p
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        p -= lr * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + eps)
    return p


@pytest.mark.parametrize("options", [
    {}, {"learning_rate": 0.1, "beta1": 0.5, "beta2": 0.999, "epsilon": 0.3, "weight_decay": 0.7},
    {"beta1": 0.0, "beta2": 0.5, "weight_decay": 0.0}])
def test_every_option_does_what_the_paper_says(options):
    said = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1} | options
    matrix, vector = (torch.nn.Parameter(torch.full((2, 2), 1.5)), torch.nn.Parameter(torch.full((3,), -0.5)))
    optimizer = AdamW(AdamW.Config(**options)).build([matrix], [vector])
    gradients = [0.3, -2.0, 0.01, 5.0]
    for gradient in gradients:
        for p in (matrix, vector):
            p.grad = torch.full_like(p, gradient)
        optimizer.step()
    hand = {"lr": said["learning_rate"], "beta1": said["beta1"], "beta2": said["beta2"], "eps": said["epsilon"]}
    wanted = by_hand(1.5, gradients, decay=said["weight_decay"], **hand)
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), wanted), rtol=1e-5, atol=0)
    torch.testing.assert_close(vector.detach(), torch.full((3,), by_hand(-0.5, gradients, decay=0.0, **hand)),
                               rtol=1e-5, atol=0)


def test_its_state_is_the_bytes_that_the_plan_counts():
    p = torch.nn.Parameter(torch.ones(1000, 10))
    optimizer = AdamW(AdamW.Config()).build([p], [])
    p.grad = torch.ones_like(p)
    optimizer.step()
    held = sum(t.numel() * t.element_size() for t in optimizer.state[p].values() if torch.is_tensor(t) and t.ndim)
    assert held == AdamW.state_bytes * p.numel()
    assert len(optimizer.param_groups) == 1  # none for parameters that there are none of
