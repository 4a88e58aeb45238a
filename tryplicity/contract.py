"""What a mixer or a feed-forward owes (docs/plugins.md), tried on one, promise by promise.

Shapes: B batch, T time, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tryplicity.components import Layer, Rows, State, output_and_report

ROWS, TIME = 2, 9
#: where a text of so many tokens is cut into chunks
CUTS = ([1] * TIME, [4, 5], [3, 1, 5])
#: where the documents of the rows begin: at the cuts, beside them, after a single token, differently in each row
BORDERS = (((4,), (4,)), ((3, 4), (1, 8)))
CLOSE = 1e-4  # of the largest value: fp32 in another order of sums


class Broken(Exception):
    """A promise that is not kept."""


def check_layer(build: Callable[[], Layer], hidden_size: int) -> list[str]:
    """A line for each promise that the layer breaks. build: makes it anew, on whatever device is set."""
    broken = []
    for promise in (_initialised, _shapes, _any_length, _rows, _documents, _states, _gradients, _half, _on_the_device):
        what = promise.__doc__.partition(".")[0]
        try:
            promise(build, hidden_size)
        except Broken as error:
            broken.append(f"{what}: {error}")
        except Exception as error:  # a stranger's layer may fail in any way
            broken.append(f"{what}: {type(error).__name__}: {error}")
    return broken


# --- what they are tried with ---

def _made(build: Callable[[], Layer], dtype: torch.dtype = torch.float32) -> Layer:
    """As a model's layer is made, then away from its initial values: no term is hidden by a zero."""
    with torch.device("meta"):
        layer = build()
    layer.to_empty(device="cpu")
    own = dict(layer.named_parameters()) | dict(layer.named_buffers())
    with torch.no_grad():
        for tensor in own.values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        torch.manual_seed(0)
        for module in layer.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for name, tensor in own.items():
            if tensor.is_floating_point() and tensor.isnan().any():
                raise Broken(f"{name} is left as it was")
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return layer.to(dtype).eval()


def _tokens(hidden_size: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, TIME, hidden_size, generator=generator).to(dtype)


def _ids(borders: Sequence[Sequence[int]]) -> Tensor:
    """[B, T]: 0, 1, ... along each row, a new number at each border."""
    return torch.stack([torch.isin(torch.arange(TIME), torch.tensor(row, dtype=torch.long)).cumsum(0)
                        for row in borders])


def _run(layer: Layer, x_BTD: Tensor, state: State | Rows | None = None, doc_ids: Tensor | None = None) -> Tensor:
    return output_and_report(layer(x_BTD, state=state, doc_ids=doc_ids))[0]


@torch.no_grad()
def _in_chunks(layer: Layer, x_BTD: Tensor, cuts: Sequence[int], ids_BT: Tensor | None = None,
               given: int | None = None) -> Tensor:
    """With a state; ids for the first `given` chunks, by default for all."""
    state, parts, start = layer.new_state(len(x_BTD), device=x_BTD.device, dtype=x_BTD.dtype), [], 0
    for i, size in enumerate(cuts):
        own = None if ids_BT is None or (given is not None and i >= given) else ids_BT[:, start:start + size]
        parts.append(_run(layer, x_BTD[:, start:start + size].contiguous(), state, own))
        start += size
    return torch.cat(parts, 1)


def _same(actual: Tensor, expected: Tensor, where: str) -> None:
    if actual.shape != expected.shape:
        raise Broken(f"{where}: {list(actual.shape)} instead of {list(expected.shape)}")
    far = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    if not far <= CLOSE:
        raise Broken(f"{where}: off by {far:.0e} of the largest value")


def _cases() -> Iterator[tuple[str, Tensor | None]]:
    yield "without documents", None
    for borders in BORDERS:
        yield f"with documents that begin at {borders[0]} and {borders[1]}", _ids(borders)


# --- the promises ---

def _initialised(build: Callable[[], Layer], hidden_size: int) -> None:
    """Everything is initialised in reset_parameters."""
    _made(build)


@torch.no_grad()
def _shapes(build: Callable[[], Layer], hidden_size: int) -> None:
    """[B, T, D] becomes [B, T, D]."""
    layer, x_BTD = _made(build), _tokens(hidden_size)
    y_BTD = _run(layer, x_BTD)
    if y_BTD.shape != x_BTD.shape or y_BTD.dtype != x_BTD.dtype:
        raise Broken(f"{list(x_BTD.shape)} in {x_BTD.dtype} became {list(y_BTD.shape)} in {y_BTD.dtype}")


@torch.no_grad()
def _any_length(build: Callable[[], Layer], hidden_size: int) -> None:
    """One forward for any length, whatever the documents and wherever the chunks meet."""
    layer, x_BTD = _made(build), _tokens(hidden_size)
    for case, ids_BT in _cases():
        whole_BTD = _run(layer, x_BTD, doc_ids=ids_BT)
        for cuts in CUTS:
            _same(_in_chunks(layer, x_BTD, cuts, ids_BT), whole_BTD, f"in chunks of {cuts} {case}")
    ids_BT = _ids(BORDERS[0])  # which goes on to the end
    whole_BTD = _run(layer, x_BTD, doc_ids=ids_BT)
    for cuts in ([6, 3], [6, 1, 1, 1]):
        _same(_in_chunks(layer, x_BTD, cuts, ids_BT, given=1), whole_BTD,
              f"a chunk without ids, after {cuts[0]} tokens with them, does not go on with the last document")


@torch.no_grad()
def _rows(build: Callable[[], Layer], hidden_size: int) -> None:
    """A row is as if alone, in a batch and in Rows of different lengths."""
    layer, x_BTD = _made(build), _tokens(hidden_size)
    for case, ids_BT in _cases():
        alone = [_run(layer, x_BTD[i:i + 1], doc_ids=None if ids_BT is None else ids_BT[i:i + 1]) for i in range(ROWS)]
        _same(_run(layer, x_BTD, doc_ids=ids_BT), torch.cat(alone), case)
    if not layer.takes_rows:
        return
    seen = [2, 5]
    together, apart = ([layer.new_state(1, dtype=x_BTD.dtype) for _ in seen] for _ in range(2))
    for states in (together, apart):
        for i, length in enumerate(seen):
            _run(layer, x_BTD[i:i + 1, :length].contiguous(), states[i])
    for new in (1, 3):
        step_BTD = torch.stack([x_BTD[i, length:length + new] for i, length in enumerate(seen)])
        wanted = [_run(layer, step_BTD[i:i + 1], state) for i, state in enumerate(apart)]
        _same(_run(layer, step_BTD, Rows(together)), torch.cat(wanted), "as Rows")
        seen = [length + new for length in seen]


def _documents(build: Callable[[], Layer], hidden_size: int) -> None:
    """Tokens with different ids never reach one another, not across the edge of two chunks either."""
    layer, x_BTD = _made(build), _tokens(hidden_size)
    for borders in BORDERS:
        ids_BT = _ids(borders)
        for document in (0, 1):
            mine_BT = ids_BT == document
            other_BTD = torch.where(mine_BT[..., None], x_BTD, 30 * _tokens(hidden_size, seed=2))
            for cuts in ([TIME], CUTS[1]):
                outputs = [_in_chunks(layer, own_BTD, cuts, ids_BT)[mine_BT] for own_BTD in (x_BTD, other_BTD)]
                _same(*outputs, f"document {document} of those that begin at {borders}, in chunks of {cuts}, when "
                                f"others change")
            whole = x_BTD.clone().requires_grad_()
            _run(layer, whole, doc_ids=ids_BT)[mine_BT].square().sum().backward()
            if whole.grad[~mine_BT].abs().sum() != 0:
                raise Broken(f"a gradient from document {document} of those that begin at {borders} reaches others")


@torch.no_grad()
def _states(build: Callable[[], Layer], hidden_size: int) -> None:
    """A state is a State of its own, and so is its clone."""
    layer, x_BTD = _made(build), _tokens(hidden_size)
    wanted_BTD, other_BTD = _run(layer, x_BTD), 30 * _tokens(hidden_size, seed=2)
    state, foreign = (layer.new_state(ROWS, dtype=x_BTD.dtype) for _ in range(2))
    if state is None:
        return
    if not isinstance(state, State):
        raise Broken(f"new_state gives a {type(state).__name__}")
    given = x_BTD.clone()
    _run(layer, other_BTD[:, :4], foreign)
    _run(layer, given[:, :4], state)
    given.fill_(torch.nan)  # what a model lays its tokens in is used again
    twin = state.clone()
    _run(layer, other_BTD[:, 4:7], twin)
    _run(layer, other_BTD[:, 4:7], foreign)
    _same(_run(layer, x_BTD[:, 4:], state), wanted_BTD[:, 4:], "other text in another state or in a clone changed it")
    once_more, expected = state.clone(), state.clone()
    _same(_run(layer, other_BTD, once_more), _run(layer, other_BTD, expected), "two clones go on differently")


def _gradients(build: Callable[[], Layer], hidden_size: int) -> None:
    """Every parameter gets a finite gradient, the same when the forward is run again for it."""
    layer, x_BTD, ids_BT = _made(build), _tokens(hidden_size), _ids(BORDERS[1])
    layer.train()
    found = []
    for again in (False, True):
        layer.zero_grad()

        def loss(x_BTD: Tensor) -> Tensor:
            y_BTD, report = output_and_report(layer(x_BTD, state=None, doc_ids=ids_BT))
            return y_BTD.square().mean() + sum(report.losses.values())

        x = x_BTD.clone().requires_grad_()
        (checkpoint(loss, x, use_reentrant=False, preserve_rng_state=False) if again else loss(x)).backward()
        found.append(dict(layer.named_parameters()) | {"its input": x})
        for name, tensor in found[-1].items():
            if tensor.requires_grad and (tensor.grad is None or tensor.grad.dtype != tensor.dtype):
                raise Broken(f"{name} gets none")
            if tensor.requires_grad and not tensor.grad.isfinite().all():
                raise Broken(f"that of {name} is not finite")
        found[-1] = {name: tensor.grad.clone() for name, tensor in found[-1].items() if tensor.requires_grad}
    for name, grad in found[0].items():
        if grad.abs().sum() > 0:
            _same(found[1][name], grad, f"{name}, with activation checkpointing")


def _half(build: Callable[[], Layer], hidden_size: int) -> None:
    """It runs in bf16, and in fp32 under autocast to bf16."""
    ids_BT = _ids(BORDERS[0])
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        layer, x_BTD = _made(build, dtype).train(), _tokens(hidden_size, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y_BTD = _run(layer, x_BTD, doc_ids=ids_BT)
        y_BTD.float().square().mean().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            decoded_BTD = _in_chunks(layer.eval(), x_BTD, [4, 1, 4])
        where = "fp32 under autocast" if autocast else "bf16"
        if not (y_BTD.isfinite().all() and decoded_BTD.isfinite().all()):
            raise Broken(f"the output is not finite in {where}")
        if y_BTD.dtype not in (dtype, torch.bfloat16):
            raise Broken(f"the output is {y_BTD.dtype} in {where}")


def _on_the_device(build: Callable[[], Layer], hidden_size: int) -> None:
    """Nothing is read from the device while gradients are on."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    with FakeTensorMode():
        layer = build().train()
        x_BTD = torch.empty(ROWS, TIME, hidden_size, requires_grad=True)
        ids_BT = torch.zeros(ROWS, TIME, dtype=torch.long)
        try:
            y_BTD, report = output_and_report(layer(x_BTD, state=None, doc_ids=ids_BT))
            (y_BTD.square().mean() + sum(report.losses.values())).backward()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Broken(f"{error} reads it") from error
