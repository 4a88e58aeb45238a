"""Two ways that training could go on a card and does not yet, beside those it goes: what they would bring there.

    python -m tests.benchmarks.card --only choices

Attention over packed documents by torch's `varlen_attn`, whose kernels know where each document begins, against the
masks of today. Its work grows with the number of documents that there may be, which the host must know before it
launches it: the least number (that there are) and a round one are timed. And ternary weights from digits that are kept
for a step, one byte each, against those worked out in every pass.

Shapes: B rows, T tokens of a row, H heads, G key/value heads, K head dim, N documents at most.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.card_parts import DOCUMENTS, Place
from tryplicity_plugins.layers.bitlinear import ternary, ternary_weight
from tryplicity_plugins.layers.masked_attention import masked_attention

ROUND = 64  # documents of a row, in a bound that few rows reach


def borders(docs_BT: Tensor, most: int) -> Tensor:
    """[most + 1] int32: where each document begins in the rows laid end to end, then their length again and again.
    Nothing of it waits for the device. most: no fewer than there are; a document is a run of one number in one row."""
    new_BT = torch.ones_like(docs_BT, dtype=torch.bool)
    new_BT[:, 1:] = docs_BT[:, 1:] != docs_BT[:, :-1]
    document_S = new_BT.flatten().cumsum(0) - 1
    place_S = torch.arange(docs_BT.numel(), device=docs_BT.device, dtype=torch.int32)
    ends = torch.full((most + 1,), docs_BT.numel(), device=docs_BT.device, dtype=torch.int32)
    return ends.scatter_reduce_(0, document_S, place_S, "amin")


def varlen(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, docs_BT: Tensor, most: int,
           window: int | None = None) -> Tensor:
    """`masked_attention` of rows without a past, by torch's kernel."""
    from torch.nn.attention.varlen import varlen_attn

    rows, tokens = docs_BT.shape
    told = {"window_size": (-1 if window is None else window - 1, 0)}
    if q_BHTK.shape[1] != k_BGTK.shape[1]:
        told["enable_gqa"] = True  # torch 2.12
    at = borders(docs_BT, most)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q_BHTK, k_BGTK, v_BGTK))
    y_SHK = varlen_attn(q, k, v, at, at, tokens, tokens, **told)
    return y_SHK.unflatten(0, (rows, tokens)).transpose(1, 2)


def knows_groups() -> bool:
    """Whether this torch's kernel takes fewer heads of keys than of queries."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def seconds(run: Callable[[], Any], device: str) -> float:
    """The median of nine."""
    def once() -> float:
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    for _ in range(3):
        once()
    return statistics.median(once() for _ in range(9))


def attention(place: Place) -> list[dict[str, Any]]:
    """The shapes of the 5090 spec, forward and backward."""
    rows, tokens, heads, groups, size = place.rows, 4096, 16, 4, 64
    q, k, v = (torch.randn(rows, n, tokens, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
               for n in (heads, groups if knows_groups() else heads, groups if knows_groups() else heads))
    docs_BT = (torch.arange(tokens, device="cuda") * DOCUMENTS // tokens).to(torch.int32).expand(rows, -1).contiguous()
    weights = torch.randn(rows, heads, tokens, size, device="cuda", dtype=torch.bfloat16)

    def both(way: Callable) -> list[Tensor]:
        y = way(q, k, v)
        return [y.detach(), *torch.autograd.grad((y * weights).sum(), (q, k, v))]

    ways: dict[str, Callable] = {
        "masks, eager": lambda q, k, v: masked_attention(q, k, v, docs_BT),
        "masks, compiled": torch.compile(lambda q, k, v: masked_attention(q, k, v, docs_BT)),
        "varlen, as many documents": lambda q, k, v: varlen(q, k, v, docs_BT, rows * DOCUMENTS),
        f"varlen, {ROUND} a row": lambda q, k, v: varlen(q, k, v, docs_BT, rows * ROUND)}
    right, found = both(ways["masks, eager"]), []
    for name, way in ways.items():
        try:
            apart = max(float((a.float() - b.float()).norm() / b.float().norm())
                        for a, b in zip(both(way), right, strict=True))
            found.append({"what": name, "ms": 1e3 * seconds(lambda way=way: both(way), "cuda"), "apart": apart})
        except Exception as error:  # a version that cannot do it says so, and the others are timed
            found.append({"what": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
    return found


def digits(place: Place, shape: tuple[int, ...] = (32, 640, 1024)) -> list[dict[str, Any]]:
    """One stack of experts' ternary weights in bf16, as a pass under autocast needs them."""
    weight = torch.randn(shape, device=place.device) * 0.02
    signs, scale = ternary(weight)
    kept = signs.to(torch.int8)

    def anew() -> Tensor:
        return ternary_weight(weight).bfloat16()

    def from_kept() -> Tensor:
        return kept.to(scale.dtype).mul_(scale).bfloat16()

    assert torch.equal(anew(), from_kept())
    found = {"worked out": anew, "from kept digits": from_kept}
    if place.device == "cuda":
        found |= {f"{name}, compiled": torch.compile(way) for name, way in list(found.items())}
    return [{"what": name, "ms": 1e3 * seconds(way, place.device)} for name, way in found.items()]


def choices(place: Place) -> dict[str, Any]:
    """As a part of `tests.benchmarks.card`."""
    found = {"ternary weights": digits(place, (32, 640, 1024) if place.device == "cuda" else (4, 64, 64))}
    if place.device == "cuda":
        found["attention"] = attention(place)
    said = [f"{what}: " + ", ".join(f"{one['what']} {one['ms']:.2f} ms" if "ms" in one else
                                    f"{one['what']}: {one['error']}" for one in ways) for what, ways in found.items()]
    right = all(one.get("apart", 0.0) < 0.05 for ways in found.values() for one in ways)
    return {"result": "; ".join(said), "ok": right, "choices": found}
