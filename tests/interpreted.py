"""Triton's interpreter, which the root conftest has switched on where there is no card."""

import torch
from triton.runtime import interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

_patch = interpreter._patch_lang_tensor


def _patch_with_index(tensor, *scope):
    """Whole numbers from tensors of one element, as `range` wants them: numpy 2.4 makes them of scalars alone."""
    _patch(tensor, *scope)
    tensor.__index__ = lambda self: self.handle.data.item()


interpreter._patch_lang_tensor = _patch_with_index
