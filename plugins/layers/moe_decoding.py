"""A mixture of experts as it decodes: of the weights of its experts only the chosen ones' are read.

Shapes: N tokens, D hidden, E experts, K chosen experts, S pairs of a token and an expert of its, F inner (or twice
that, gate and up).
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tryplicity import Activation, Report, Router, check_experts, check_routing, kernels
from tryplicity_plugins.layers.activations import GateInC, activated, decoded, gate_in_c
from tryplicity_plugins.layers.c_structs import Description, packed, products
from tryplicity_plugins.layers.gated_mlp import GatedMLPInC, mlp_in_c
from tryplicity_plugins.layers.router import BalancedRouter, RouterInC, router_in_c

if TYPE_CHECKING:
    from tryplicity_plugins.layers.moe import MixtureOfExperts


class MixtureInC(ctypes.Structure):
    """moe.cpp"""

    _fields_ = [("router", RouterInC), ("activation", GateInC), ("inner", ctypes.c_int64),
                ("gate_up", ctypes.c_void_p), ("down", ctypes.c_void_p), ("shared", GatedMLPInC)]


def pairs(router: Router, experts: int, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A router's choice as its pairs: the token, the expert and the weight of each [S], a token's one after another. On
    a card, of few tokens, the unused slots are among them, with the number of experts for an expert: how many there
    are is not to be waited for."""
    found = router.pairs(x_ND) if isinstance(router, BalancedRouter) else None
    if found is not None:
        return found
    routing = router(x_ND[None])
    check_routing(router, routing, len(x_ND), experts)
    chosen_NK, weights_NK = routing.experts_NK, routing.weights_NK.float()
    if torch.compiler.is_compiling() or (not x_ND.is_cpu and chosen_NK.numel() <= kernels.FEW_PAIRS):
        token_N1 = torch.arange(len(x_ND), device=x_ND.device)[:, None]
        return token_N1.expand_as(chosen_NK).flatten(), chosen_NK.flatten(), weights_NK.flatten()
    used_NK = chosen_NK < experts
    return used_NK.nonzero()[:, 0], chosen_NK[used_NK], weights_NK[used_NK]


def mixture_in_c(moe: MixtureOfExperts) -> Description | None:
    """What C must know to do all of a packed layer in one call; None where a part is not known to it."""
    if not moe.config.gated or moe.shared_gate is not None:
        return None
    router = router_in_c(moe.router)
    gate, matrices = gate_in_c(moe.activation), packed(moe.gate_up, moe.down)
    if router is None or gate is None or matrices is None:
        return None
    shared = GatedMLPInC(products=products()), [], []
    if moe.config.shared_experts:
        shared = mlp_in_c(moe.shared_gate_up, moe.shared_activation, moe.shared_down)
        if shared is None:
            return None
    struct = MixtureInC(router[0], gate[0], moe.down.in_features, *matrices, shared[0])
    return struct, [*router[1], *gate[1], *shared[1]], [moe.gate_up, moe.down, *shared[2]]


def decode_packed(moe: MixtureOfExperts, x_ND: Tensor) -> Tensor:
    """With packed weights, part by part: those of the chosen experts are read once for all tokens."""
    row_S, expert_S, weight_S = pairs(moe.router, moe.config.experts, x_ND)
    h_SF = _inner(moe, moe.activation, kernels.packed_experts(x_ND, moe.first.matrix, row_S, expert_S), expert_S)
    if moe.config.shared_experts:
        out_ND = moe.shared_down(_inner(moe, moe.shared_activation, moe.shared_first(x_ND)))
        out_ND = moe.times_shared_gate(x_ND, out_ND).float()
    else:
        out_ND = x_ND.new_zeros(x_ND.shape, dtype=torch.float32)
    return kernels.packed_experts(h_SF, moe.down.matrix, None, expert_S, weight_S, out_ND, row_S).to(x_ND.dtype)


def _inner(moe: MixtureOfExperts, activation: Activation, first: Tensor, group_S: Tensor | None = None) -> Tensor:
    return decoded(activation, first, group_S, gate=moe.config.gated)


def decode_one(moe: MixtureOfExperts, x_D: Tensor) -> Tensor:
    """One token, whose experts are chosen on the host. A small operation costs as much as the product of a small
    expert, so there are as few as can be."""
    chosen = moe.router.choose(x_D)
    check_experts(moe.router, (expert for expert, _ in chosen), moe.config.experts)
    chosen = [(expert, weight) for expert, weight in chosen if expert < moe.config.experts]
    in_D = moe.first.effective_input(x_D)
    first_F = [torch.mv(moe.first.expert_weight(expert), in_D) for expert, _ in chosen]
    if moe.all_alike:  # the shared expert goes through the activation with the others
        first_KF = torch.stack([*first_F, moe.shared_first(x_D)])
        *h_F, shared_F = activated(moe.activation, first_KF, gate=moe.config.gated)[0].unbind()
        out_D = moe.times_shared_gate(x_D, moe.shared_down(shared_F))
    else:
        experts_K = torch.tensor([expert for expert, _ in chosen])
        h_F = activated(moe.activation, torch.stack(first_F), experts_K, gate=moe.config.gated)[0].unbind()
        out_D = moe.shared(x_D, Report()) if moe.config.shared_experts else torch.zeros_like(x_D)
    for h, (expert, weight) in zip(h_F, chosen, strict=True):
        out_D.addmv_(moe.down.expert_weight(expert), moe.down.effective_input(h), alpha=weight)
    return out_D
