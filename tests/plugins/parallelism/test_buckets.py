"""Gradients of copies, whatever the number of passes in a step, and where they lie."""

from pathlib import Path

import pytest
import torch

from tests.ranks import together
from tryplicity import load_plugins
from tryplicity.data.packing import Batch
from tryplicity.model import assemble
from tryplicity.spec import load_spec
from tryplicity.training.step import decay_groups, training_step
from tryplicity.world import World

SPEC = Path(__file__).parents[2] / "small.yaml"
PASSES = (3, 1, 2, 2)  # of each step


def gradients(world, strategy_name, passes):
    """The gradients of each step, of which none changes the weights, and where each of them lies."""
    registry = load_plugins().registry
    spec = load_spec(str(SPEC), registry)
    strategy = registry.part("parallelism", strategy_name).build()
    model = strategy.place(assemble(spec), world, 0).train()
    optimizer = spec.training.optimizer.build().build(*decay_groups(model))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    found, places = [], []

    def look(*_):
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        places.append([p.grad.data_ptr() for p in model.parameters()])

    optimizer.register_step_pre_hook(look)
    data = torch.Generator().manual_seed(1)
    for number in passes:
        ids = torch.randint(0, spec.vocab_size, (2 * number, spec.context_length), generator=data)
        own = world.part(len(ids))
        batch = Batch(ids[own], ids.roll(-1, 1)[own], torch.zeros_like(ids)[own], ())
        training_step(model, optimizer, strategy, batch, step=1, micro_batch=1, precision="fp32", max_norm=1e9,
                      learning_rate_factor=0.0, world=world)
    return found, places


def test_copies_sum_their_gradients_and_leave_them_in_the_buckets():
    alone, _ = gradients(World(), "single", PASSES)
    for found, places in together(2, gradients, "ddp", PASSES):
        for own, whole in zip(found, alone, strict=True):
            for name, gradient in whole.items():
                assert torch.allclose(own[name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item()), name
        assert places[0] == places[1] == places[2] == places[3], "no gradient was made beside the buckets"


@pytest.mark.parametrize("passes", [(1, 1, 3, 2)])
def test_steps_of_one_pass_come_first(passes):
    alone, _ = gradients(World(), "single", passes)
    for found, places in together(2, gradients, "ddp", passes):
        for own, whole in zip(found, alone, strict=True):
            for name, gradient in whole.items():
                assert torch.allclose(own[name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item()), name
        assert places[1] == places[2] == places[3]
