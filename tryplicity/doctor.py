"""What this machine has, which way each part of a spec would go on it, and whether the fast ways compute what the plain
ones do: tried here, on one block of each kind, with its gradients, its documents and its decoding state.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from tryplicity import kernels
from tryplicity.components import Component, Linear, Rows
from tryplicity.errors import UserError
from tryplicity.functional import grouped_product_works
from tryplicity.guard import cause
from tryplicity.hardware import Hardware
from tryplicity.inference.fixed import way
from tryplicity.model import Block, Model, assemble
from tryplicity.spec import Spec
from tryplicity.training.compiling import cache_folder, compiled, differs, kinds_of, wanted
from tryplicity.training.step import autocast

ROWS, TOKENS, DECODED = 2, 512, 24  # tried with so many; the last token by token
#: (what, whether it is here, what goes wrong with it): versions that compute or do something wrong
KNOWN_WRONG: tuple[tuple[str, Callable[[], bool], str], ...] = (
    ("torch before 2.12", lambda: _version("torch") < (2, 12),
     "its FLOP counter fails on grouped-query attention, and its compiler loses the gradient of some functions in "
     "silence (which the check of compiled blocks notices); use 2.12 or newer"),
    ("triton 3.4 to 3.7.0 on Hopper", lambda: (3, 4) <= _version("triton") <= (3, 7, 0) and _capability() == (9, 0),
     "kernels of flash-linear-attention compute wrong gradients with it; this project uses none of them"),
    ("grouped products on sm_103", lambda: _capability() == (10, 3),
     "the backward pass can give NaN where rows follow the last group"),
    ("grouped products outside of sm_90 and sm_100",
     lambda: _capability() is not None and _capability() not in ((9, 0), (10, 0), (10, 3)),
     "torch multiplies one expert after another there, and waits for the host: experts are slower than planned"),
)


def _version(package: str) -> tuple[int, ...]:
    """As numbers; infinite where it is not installed, so that no bound holds."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        text = version(package).partition("+")[0]
    except PackageNotFoundError:
        return (10**9,)
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def _capability() -> tuple[int, int] | None:
    """Of the first NVIDIA device."""
    return torch.cuda.get_device_capability(0) if torch.cuda.is_available() and torch.version.cuda else None


@dataclass(frozen=True)
class Trial:
    """One way of computing something, compared with the plain one."""

    what: str
    layers: list[int]
    ok: bool
    said: str  # what was compared and how far off it is, or what went wrong
    seconds: float


@dataclass(frozen=True)
class Findings:
    """What `doctor` prints."""

    machine: dict[str, Any]
    known_wrong: list[str]
    paths: list[dict[str, Any]]  # layers, part, path
    trials: list[Trial] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return all(trial.ok for trial in self.trials)

    def as_dict(self) -> dict[str, Any]:
        return {"healthy": self.healthy, **asdict(self)}


def machine() -> dict[str, Any]:
    """Versions, devices and compilers."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__,
                             "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    found["triton"] = ".".join(map(str, _version("triton"))) if _version("triton") < (10**9,) else None
    found["devices"] = [{"name": p.name, "memory_gb": round(p.total_memory / 1e9, 1),
                         "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count}
                        for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))]
    kernels.entry("linear")
    found["own_c"] = kernels.why_not() or "compiled"
    found["compiled_code"] = cache_folder()
    return found


def examine(spec: Spec, hardware: Hardware | None, seed: int = 0) -> Findings:
    """Look at the machine and try one block of each kind of a spec. hardware: the profile whose device and precision
    are meant; by default what is here. Raises UserError for a device that is not here."""
    kind = hardware.torch_device if hardware else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{hardware.name} is of {hardware.device} devices, and torch sees none here; leave --hw out to "
                        "examine what there is")
    device, precision = torch.device(kind), hardware.precision if hardware else "bf16" if kind == "cuda" else "fp32"
    known = [f"{name}: {what}" for name, is_here, what in KNOWN_WRONG if is_here()]
    model = assemble(spec)
    findings = Findings(machine(), known, [])
    for layers in kinds_of(model):
        block = _made(model, layers[0], device, seed)
        findings.paths.extend(_paths(block, layers, device, spec))
        for what, trial in _trials(model, block, device, precision, spec):
            findings.trials.append(_tried(what, layers, trial))
        block.to("meta")
    return findings


def _made(model: Model, layer: int, device: torch.device, seed: int) -> Block:
    """The block with memory and values away from the initial ones, so that nothing is hidden by a zero."""
    block = model.layers[layer].to_empty(device=device)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in block.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for parameter in block.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)
    for module in block.modules():
        if hasattr(module, "before_step"):
            module.before_step(0)
    return block


def _paths(block: Block, layers: list[int], device: torch.device, spec: Spec) -> Iterator[dict[str, Any]]:
    """What its parts say of themselves, each kind of part once."""
    compiles = wanted(spec.training.compile, device)
    told: dict[tuple[str, str], None] = {}
    for module in block.modules():
        path = module.path(device, compiles) if isinstance(module, Component) else None
        if path is not None:
            told.setdefault((f"{module.family} {module.name}", path))
    for part, path in told:
        yield {"layers": layers, "part": part, "path": path}


def _tried(what: str, layers: list[int], trial: Callable[[], tuple[bool, str]]) -> Trial:
    started = time.perf_counter()
    try:
        ok, said = trial()
    except Exception as error:
        ok, said = False, cause(error)
    return Trial(what, layers, ok, said, time.perf_counter() - started)


def _trials(model: Model, block: Block, device: torch.device, precision: str,
            spec: Spec) -> Iterator[tuple[str, Callable[[], tuple[bool, str]]]]:
    tokens = min(TOKENS, spec.context_length)
    generator = torch.Generator().manual_seed(1)
    x_BTD = torch.randn(ROWS, tokens, spec.hidden_size, generator=generator).to(device)
    border = max(1, tokens // 3)
    docs_BT = (torch.arange(tokens, device=device) >= border).to(torch.int32).expand(ROWS, -1).contiguous()
    streams = model.layers[0].residual.expand(x_BTD)
    low = precision == "bf16"
    if low:
        streams = streams.to(torch.bfloat16)

    def training() -> tuple[bool, str]:
        block.train()
        eager = type(block).forward
        with autocast(device.type, precision):
            why = differs(block, eager, compiled(eager), streams, None, docs_BT)
        return why is None, why or "the output and each gradient are as eager PyTorch's"

    def documents() -> tuple[bool, str]:
        block.train()
        with autocast(device.type, precision):
            whole = block(streams.requires_grad_(), None, docs_BT)[0][:, border:].detach()
            alone = block(streams[:, border:], None, docs_BT[:, border:])[0].detach()
        return _compared(alone, whole, low, "a document packed behind another and alone")

    def decoding() -> tuple[bool, str]:
        block.eval()
        few = streams[:, :DECODED].float()
        state = block.new_state(ROWS, device=device, dtype=torch.float32)
        whole = block(few.requires_grad_())[0].detach()
        with torch.no_grad():
            parts = [block(few[:, :DECODED // 2], state)[0]]
            parts += [block(few[:, t:t + 1], state)[0] for t in range(DECODED // 2, few.shape[1])]
        return _compared(torch.cat(parts, 1), whole, False, "the whole text, and half of it token by token")

    def fixed() -> tuple[bool, str]:
        block.eval()
        few, like = streams[:, :DECODED].float().detach(), {"device": device, "dtype": torch.float32}
        states = [block.new_state(1, **like) for _ in range(ROWS)]
        with torch.no_grad():
            for row, (own, read) in enumerate(zip(states, (DECODED // 2, DECODED // 3), strict=True)):
                block(few[row:row + 1, :read], own)
            room = [own and own.fixed(ROWS, DECODED) for own in states[0]]
            if [own is None for own in room] != [own is None for own in states[0]]:
                return True, "its state cannot be kept at one address: steps of decoding are not recorded"
            for row, own in enumerate(states):
                for part, mine in zip(room, own, strict=True):
                    if part is not None:
                        part.put(row, mine)
            got = block(few[:, -1:], room)[0]
            wanted = block(few[:, -1:], [None if own[0] is None else Rows(own) for own in zip(*states, strict=True)])[0]
        return _compared(got, wanted, False, "a token of sequences of two lengths, at fixed addresses and each its own")

    def packed(linear: Linear) -> tuple[bool, str]:
        twin = type(linear)(linear.config, linear.in_features, linear.out_features, experts=linear.experts,
                            bias=linear.bias is not None)
        x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(2)).to(device)
        ends = None if linear.experts is None else torch.full((linear.experts,), 5, dtype=torch.int32, device=device)
        with torch.no_grad():
            twin.adopt({name: t.cpu() for name, t in linear.pack().items()})
            if linear.bias is not None:
                twin.bias.copy_(linear.bias)
            wanted = linear.eval()(x, ends)
            got = twin.eval().to(device)(x, ends)
        return _compared(got, wanted, False, "packed weights and unpacked ones")

    if wanted(spec.training.compile, device):
        yield "training, compiled", training
    yield "training, packed documents", documents
    yield "decoding with its state", decoding
    if way(device) != "eager":
        yield "decoding, recorded", fixed
    linear = next((m for m in block.modules() if isinstance(m, Linear) and m.experts is None and m.packed_like()), None)
    if linear is not None and device.type == "cpu":
        yield "decoding, packed weights", lambda: packed(linear)
    if any(isinstance(m, Linear) and m.experts for m in block.modules()):
        dtype = torch.bfloat16 if low else torch.float32
        yield "grouped products", lambda: (True, "torch's own" if grouped_product_works(device.type, dtype)
                                           else "torch's own fail here: one product for each expert")


def _compared(got: Tensor, wanted: Tensor, low: bool, what: str) -> tuple[bool, str]:
    """Single numbers may be off, where rounding flips a digit of an input; the whole may not."""
    error = float(torch.linalg.vector_norm((got - wanted).float()) / torch.linalg.vector_norm(wanted.float()))
    return error < (0.1 if low else 0.02), f"{what}: {error:.1e} apart"
