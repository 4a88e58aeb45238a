"""How a fast path is tried before it is trusted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def constant(function: Callable) -> Callable:
    """Tell torch's compiler that what a function gives does not change: what torch.compiler.assume_constant_result
    does, which imports the compiler first, and that takes as long as torch itself."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def on_its_device(operator: Callable) -> Callable:
    """An operator that works on its first tensor's device, which need not be the current one; Triton launches there."""

    @wraps(operator)
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):
            return operator(first, *rest)

    return run


def tried(test: Callable[[torch.device], str | None], device: torch.device) -> str | None:
    """What `test` finds wrong on the device, in one line, an error that it raises included; None if nothing.

    It runs in a thread of its own: whatever the caller is in the middle of (autocast, no gradients, a checkpoint that
    counts what is saved, a tracer) is left behind.
    """
    found: list[str | None] = []

    def run() -> None:
        try:
            with torch.cuda.device_of(torch.empty(0, device=device)):
                found.append(test(device))
        except Exception as error:  # whatever a compiler or a driver raises
            found.append(f"{type(error).__name__}: {error}".splitlines()[0])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]
