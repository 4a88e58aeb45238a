"""What is known of the experts of a stack, and those of them drawn anew that nobody uses.

Shapes: E experts, O and I the features out and in, M size of a sketch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tryplicity import Linear
from tryplicity_plugins.layers.router import full_precision

SKETCH_SIZE = 128  # for each stack


@torch.no_grad()
def sketch(stacks: list[Linear]) -> Tensor:
    """Products of each expert's weights with random signs from both sides, the same signs for all
    experts: the inner product of two experts' sketches is on average that of their weights."""
    sketches = []
    for linear in stacks:
        weight_EOI = linear.weight
        if hasattr(weight_EOI, "full_tensor"):  # sharded, as it lies between the steps
            weight_EOI = weight_EOI.full_tensor()
        signs = torch.Generator(weight_EOI.device).manual_seed(0)
        left_OM, right_IM = (
            torch.randint(0, 2, (size, SKETCH_SIZE), generator=signs, device=weight_EOI.device) * 2.0 - 1
            for size in weight_EOI.shape[1:])
        with full_precision(weight_EOI):
            sketches.append(((weight_EOI.float() @ right_IM) * left_OM).sum(1))
    return torch.cat(sketches, -1) / SKETCH_SIZE ** 0.5


def redraw(stack: nn.Module, mask_E: Tensor, generator: torch.Generator) -> list[str]:
    """Initialise these experts of a stack anew; the names of the parameters that hold them. Whatever has no row
    for each expert stays."""
    tensors = dict(stack.named_parameters()) | dict(stack.named_buffers())
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        for module in stack.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    drawn = []
    for name, tensor in tensors.items():
        if tensor.ndim and len(tensor) == len(mask_E):
            kept_E = ~mask_E.to(tensor.device)
            tensor[kept_E] = before[name][kept_E]
            drawn.append(name)
        else:
            tensor.copy_(before[name])
    return [name for name in drawn if isinstance(tensors[name], nn.Parameter)]
