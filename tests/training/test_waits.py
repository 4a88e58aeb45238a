"""A training step that hands all its work to the device and never asks it for a number, without a device: on tensors
that have no data, where every question that a card would wait for ends the test."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.plugins.layers.layer_tools import as_a_compiler_sees_them
from tests.training.test_compiled_code import SMALL
from tryplicity.data import Batch
from tryplicity.model import assemble
from tryplicity.spec import load_spec
from tryplicity.training.step import ONE, decay_groups, training_step

SHORT = [*SMALL[:-4], "context_length=64", "layers=[memory, attention]"]
SPECS = {"tiny": ["layers=[memory, attention]", "context_length=64"], "5090": SHORT, "full": SHORT}
#: what reads a number from the device, makes a shape of one, or sends one over that is not in pinned memory
WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique", "aten._unique",
           "aten.bincount", "aten.equal", "aten.repeat_interleave.Tensor", "aten.lift_fresh")


class Waits(AssertionError):
    pass


class NeverWaits(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) and any(
            index is not None and index.dtype == torch.bool for index in args[1])
        if by_mask or str(func).startswith(WAITING):
            raise Waits(str(func))
        return func(*args, **(kwargs or {}))


def without_data(model):
    """Every parameter and buffer as a tensor without data, shared ones once."""
    made = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = torch.nn.Parameter(empty) if held is module._parameters else empty
                held[name] = None if tensor is None else made[id(tensor)]
    return model.train()


def step_of(spec, precision, model=None):
    """`step(number)` of a model on tensors without data, checkpointed, of one row."""
    model = without_data(model or assemble(spec))
    model.activation_checkpointing = True
    optimizer = spec.training.optimizer.build().build(*decay_groups(model))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    ids_BT = torch.zeros(1, spec.context_length, dtype=torch.int64)
    batch = Batch(ids_BT, ids_BT.clone(), ids_BT.to(torch.int32), 0)
    return lambda number: training_step(model, optimizer, ONE, batch, step=number, micro_batch=1, precision=precision,
                                        max_norm=1.0, learning_rate_factor=1.0)


@pytest.mark.parametrize(("name", "traced"), [("tiny", False), ("5090", True), ("full", False)],
                         ids=["tiny", "5090 as compiled", "full"])
def test_no_shipped_spec_waits(registry, name, traced):
    """A step in which routers look at their experts anew too."""
    spec = load_spec(name, registry, SPECS[name])
    assert len(spec.brain) == 4 and {block.mixer.name for block in spec.layers} == {"mamba2", "gqa"}
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = step_of(spec, "fp32" if traced else "bf16")
        with as_a_compiler_sees_them() if traced else nullcontext(), NeverWaits():
            assert step(0).finite.shape == ()


@pytest.mark.parametrize("question", [lambda h: h.sum().item() > 0, lambda h: bool((h > 0).any()),
                                      lambda h: h[h > 0].sum(), lambda h: h * torch.tensor(2.0)],
                         ids=["item", "truth", "mask", "number"])
def test_a_layer_that_asks_is_noticed(make_spec, question):
    spec = make_spec("context_length=16")
    model = assemble(spec)
    model.layers[1].mixer.register_forward_hook(lambda module, given, out: question(out[0]) and None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = step_of(spec, "fp32", model)
        with NeverWaits(), pytest.raises(Waits):
            step(0)
