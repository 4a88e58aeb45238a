"""Experts that begin as copies of a dense feed-forward (sparse upcycling, arXiv:2212.05055).

The first forward pass gives what the dense feed-forward gave, whatever the router chooses: every expert is the same
function, and the weights of a token's experts sum to one. No noise is added: the rows of a fresh router differ, so
each expert gets tokens of its own, and from the first step on other gradients.

Where an expert is narrower than the dense feed-forward, that is cut into parts of its width (fine-grained upcycling,
arXiv:2410.07524): neighbouring experts hold neighbouring parts, and the router's rows of those that make up a whole
are alike, so that a token gets all of them or none at first.

Shapes: E experts, P parts of the dense feed-forward, G = E / P whole copies of it, D hidden, F its neurons, I those of
an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tryplicity import Router, UserError
from tryplicity_plugins.layers.router import TopKRouter

if TYPE_CHECKING:
    from tryplicity_plugins.layers.moe import MixtureOfExperts

GATE_SHARE = 0.5  # sigmoid(0), what a gate of the shared experts begins with here


def from_dense(moe: MixtureOfExperts, given: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The tensors of a mixture out of those of a `gated_mlp` or `mlp`; none where `given` is neither, or of another
    hidden size. Raises UserError where they cannot become its experts."""
    config = moe.config
    first, other = ("gate_up", "up") if config.gated else ("up", "gate_up")
    down_DF = given.get("down.weight")
    if down_DF is None or down_DF.ndim != 2 or down_DF.shape[0] != moe.down.out_features:
        return {}
    if f"{other}.weight" in given:
        here, there, remedy = ("with", "without", "false") if config.gated else ("without", "with", "true")
        raise UserError(f"experts {here} a gate cannot be copies of a feed-forward {there} one; give the moe gated: "
                        f"{remedy}")
    if f"{first}.weight" not in given:
        return {}
    own = {*dict(moe.named_parameters()), *dict(moe.named_buffers())}
    neurons = [name for name in given if name.startswith("activation.") and name in own]
    if strange := sorted(set(given) - {f"{first}.weight", "down.weight", *neurons}):
        raise UserError(f"a moe's experts have no place for the {strange[0]} of the feed-forward they would be copies "
                        "of")
    width, inner = down_DF.shape[1], config.inner_size
    parts, copies = _parts(moe, width), _shared_copies(moe, width)
    halves = given[f"{first}.weight"].shape[0] // width

    def stacked(tensor_P: Tensor) -> Tensor:
        return tensor_P.repeat(config.experts // parts, *[1] * (tensor_P.ndim - 1))

    # routed and shared experts are 1 + copies whole ones, which add up
    scale = parts / (1 + copies) / _sum_of_weights(moe.router, config.experts)
    dense = given[f"{first}.weight"].view(halves, parts, inner, -1)
    made = {f"{first}.weight": stacked(dense.transpose(0, 1).flatten(1, 2)),
            "down.weight": stacked(scale * down_DF.unflatten(1, (parts, inner)).transpose(0, 1))}
    for name in neurons:
        made[name] = stacked(given[name].view(parts, inner) if given[name].shape[-1:] == (width,)
                             else given[name].expand(parts, *given[name].shape))
    if parts > 1:
        rows_GD = 0.02 * torch.randn(config.experts // parts, down_DF.shape[0], generator=generator)
        made["router.weight"] = rows_GD.repeat_interleave(parts, 0)
    if copies:
        gate = 1.0 if moe.shared_gate is None else GATE_SHARE
        made[f"shared_{first}.weight"] = given[f"{first}.weight"].unflatten(0, (halves, width)).repeat(
            1, copies, 1).flatten(0, 1)
        made["shared_down.weight"] = (down_DF / (1 + copies) / gate).repeat(1, copies)
        made |= {f"shared_{name}": given[name].repeat(copies) if given[name].shape[-1:] == (width,) else given[name]
                 for name in neurons}
        if moe.shared_gate is not None:
            made["shared_gate"] = torch.zeros_like(down_DF[:, 0])
    return made


def _parts(moe: MixtureOfExperts, width: int) -> int:
    """Into how many the dense feed-forward is cut. Raises UserError where a token would not get all of them."""
    config, router = moe.config, moe.router
    parts, rest = divmod(width, config.inner_size)
    if parts == 1 and not rest:
        return 1
    said = f"experts of {config.inner_size} neurons cannot be made of a feed-forward of {width}"
    if rest or not parts:
        raise UserError(f"{said}; give the moe inner_size: {width}, or a divisor of it")
    plain = type(router) is TopKRouter and router.inhibition is None and router.config.groups == 1
    if not plain or config.experts % parts or config.top_k % parts:
        raise UserError(f"{said}: a token must get all {parts} parts at once, which takes a plain top_k router, and "
                        f"experts and top_k that are multiples of {parts}; or give the moe inner_size: {width}")
    return parts


def _shared_copies(moe: MixtureOfExperts, width: int) -> int:
    """How many of the dense feed-forward the shared experts hold, which are one of their summed width."""
    config = moe.config
    if not config.shared_experts:
        return 0
    together = moe.shared_down.in_features
    if together % width:
        raise UserError(f"shared experts of {together} neurons together cannot be copies of a feed-forward of {width}; "
                        f"give the moe shared_inner_size: {width}, or shared_experts: 0")
    return together // width


def _sum_of_weights(router: Router, experts: int) -> float:
    """Of a token's experts, where all scores are alike, as they nearly are with a fresh router."""
    options = getattr(router, "config", None)
    total = 1.0
    if not getattr(options, "normalize", True):
        total = router.mean_k * (0.5 if options.score == "sigmoid" else 1 / experts)
    return total * getattr(options, "scale", 1.0)
