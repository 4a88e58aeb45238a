"""Mixture of experts: many small MLPs, a few of them for each token, and shared ones for all.

Three ways through the same: slots sorted by expert (training, and reading a text; `slots.py`), and for decoding one
token on the host or packed weights (`moe_decoding.py`). `MixtureOfExperts.forward` chooses.

Shapes: B batch, T time, D hidden, N tokens (B*T), E experts, S rows sorted by expert, F inner (or twice that, gate
and up).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tryplicity import (
    Count,
    FeedForward,
    Linear,
    Part,
    Repair,
    Report,
    Size,
    Some,
    check_routing,
    grouped_product_works,
    later,
    uses,
)
from tryplicity_plugins.layers import native
from tryplicity_plugins.layers.activations import Elementwise, activated
from tryplicity_plugins.layers.c_structs import kept_struct, matrix_of
from tryplicity_plugins.layers.moe_decoding import decode_one, decode_packed, mixture_in_c
from tryplicity_plugins.layers.moe_repair import redraw, sketch
from tryplicity_plugins.layers.moe_upcycling import from_dense
from tryplicity_plugins.layers.router import full_precision, groups_that_fail
from tryplicity_plugins.layers.slots import collect, lay_out, spread

FEW_TOKENS = 2  # up to this many are decoded one by one, reading the weights of the chosen experts alone


class MixtureOfExperts(FeedForward):
    """y = shared(x) + sum over the chosen experts e of weight_e * down_e(activation(gate_e(x)) * up_e(x)).

    Fine-grained routed experts beside shared ones (arXiv:2401.06066). No token is ever dropped: slots are
    sorted by expert and multiplied as groups of whatever size. The shared experts are one MLP of their summed
    width: with plain linears, the sum of separate ones. Routing weights multiply the output, not the inner
    activations, since a linear component may normalise its input.
    """

    name = "moe"

    @dataclass(frozen=True)
    class Config:
        experts: Count = 8
        """Routed experts."""
        top_k: Count = 2
        """Routed experts per token, for routers that give every token as many."""
        inner_size: Size = 256
        """Inner size of a routed expert."""
        shared_experts: Some = 1
        """Experts that every token uses."""
        shared_inner_size: Size | None = None
        """Inner size of a shared expert; by default that of a routed one."""
        activation: Part = uses("activation", default="silu")
        """On the gate, before it multiplies the other half."""
        router: Part = uses("router", default="top_k")
        """What chooses a token's experts."""
        gated: bool = later(True)
        """false: an expert is down(activation(up(x))), as in Nemotron 3."""
        shared_gate: bool = later(False)
        """Whether the shared experts are multiplied by the sigmoid of a learned product with x (Qwen2-MoE)."""

    @classmethod
    def check(cls, config, site):
        if config.top_k > config.experts:
            yield "top_k", f"{config.top_k} of {config.experts} experts; at most {config.experts}"
        options = config.router.config
        most = getattr(options, "max_experts", 0)
        if most > config.experts:
            yield "router.max_experts", f"{most} of {config.experts} experts; at most {config.experts}"
        if config.shared_gate and not config.shared_experts:
            yield "shared_gate", "there are no shared experts to be multiplied; shared_experts: 1 makes one"
        if getattr(options, "groups", 1) > 1:
            yield from groups_that_fail(options, config.experts, max(most, config.top_k))

    def __init__(self, config, site) -> None:
        super().__init__()
        self.config = config
        hidden, experts, inner = site.hidden_size, config.experts, config.inner_size
        self.router = config.router.build(site, experts, config.top_k)
        stack = {"experts": experts, "active_experts": self.router.mean_k}
        halves = 2 if config.gated else 1
        first = site.linear(hidden, halves * inner, **stack)
        self.add_module("gate_up" if config.gated else "up", first)
        self.activation = config.activation.build(inner, groups=experts)
        self.activation.active_fraction = self.router.mean_k / experts
        self.down = site.linear(inner, hidden, writes_residual=True, **stack)
        self.shared_gate = nn.Parameter(torch.empty(hidden)) if config.shared_gate else None
        if config.shared_experts:
            width = config.shared_experts * (config.shared_inner_size or inner)
            self.add_module("shared_gate_up" if config.gated else "shared_up", site.linear(hidden, halves * width))
            self.shared_activation = config.activation.build(width)
            self.shared_down = site.linear(width, hidden, writes_residual=True)
        # one elementwise function for the routed experts and the shared, of one width
        self.all_alike = (config.shared_experts > 0 and width == inner
                          and isinstance(self.activation, Elementwise))

    def reset_parameters(self) -> None:
        if self.shared_gate is not None:
            nn.init.normal_(self.shared_gate, std=0.02)

    @property
    def first(self) -> Linear:
        """The routed experts' first product."""
        return self.gate_up if self.config.gated else self.up

    @property
    def shared_first(self) -> Linear:
        return self.shared_gate_up if self.config.gated else self.shared_up

    def forward(self, x_BTD: Tensor, *, state=None, doc_ids=None):
        if matrix_of(self.first) is not None and matrix_of(self.down) is not None:
            told = kept_struct(self, lambda: mixture_in_c(self)) if native.for_inference(x_BTD) else None
            if told is None:
                return decode_packed(self, x_BTD.flatten(0, 1)).view(x_BTD.shape)
            out_BTD = torch.empty_like(x_BTD)
            native.function("mixture_of_experts", "ppip")(told.address, x_BTD.data_ptr(),
                                                          x_BTD.shape[0] * x_BTD.shape[1], out_BTD.data_ptr())
            return out_BTD
        # a FakeTensor or DTensor has no values to read on the host
        if (x_BTD.shape[0] * x_BTD.shape[1] <= FEW_TOKENS and not torch.is_grad_enabled()
                and type(x_BTD) is Tensor and x_BTD.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
                and not torch.compiler.is_compiling()):
            if x_BTD.shape[0] == 1 and x_BTD.shape[1] == 1:
                return decode_one(self, x_BTD.view(-1)).view(x_BTD.shape)
            return torch.stack([decode_one(self, x_D) for x_D in x_BTD.flatten(0, 1)]).view(x_BTD.shape)
        report, routing = Report(), self.router(x_BTD)
        check_routing(self.router, routing, x_BTD.shape[0] * x_BTD.shape[1], self.config.experts)
        report.include("router", routing.report)
        layout = lay_out(routing.experts_NK, self.config.experts)

        first_SF = self.first(x_BTD.flatten(0, 1), layout.offsets_E, lambda x_ND: spread(x_ND, layout))
        h_SF, said = activated(self.activation, first_SF, layout.expert_S, gate=self.config.gated)
        report.include("activation", said)
        y_SD = self.down(h_SF, layout.offsets_E)
        y_BTD = collect(y_SD, routing.weights_NK, layout).view_as(x_BTD)
        if self.config.shared_experts:
            y_BTD = y_BTD + self.shared(x_BTD, report)
        return y_BTD, report

    def shared(self, x: Tensor, report: Report) -> Tensor:
        """What the shared experts say of any tokens [..., D]; their activation's report goes into `report`."""
        h, said = activated(self.shared_activation, self.shared_first(x), gate=self.config.gated)
        report.include("shared_activation", said)
        return self.times_shared_gate(x, self.shared_down(h))

    def times_shared_gate(self, x: Tensor, shared: Tensor) -> Tensor:
        if self.shared_gate is None:
            return shared
        with full_precision(x):
            logit_1 = F.linear(x.float(), self.shared_gate.float()[None])
        return shared * logit_1.sigmoid().to(shared.dtype)

    def path(self, device: torch.device, compiled: bool) -> str:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return ("slots sorted by expert; " + ("gathered and combined in one pass each, " if compiled else "") +
                ("torch's grouped product" if grouped_product_works(device.type, dtype)
                 else "one product for each expert, since torch's grouped one fails here"))

    def before_step(self, step: int) -> None:
        """Once per optimizer step, and not in the forward passes, which are many, and computed again."""
        inhibition = getattr(self.router, "inhibition", None)
        asking = [part for part in (self.router, inhibition) if part is not None and part.wants_sketch(step)]
        sketch_EM = sketch([self.first, self.down]) if asking else None
        for part in asking:
            part.take_sketch(sketch_EM)

    def converted(self, given, generator):
        return from_dense(self, given, generator)

    @torch.no_grad()
    def consolidate(self, min_use: float, generator: torch.Generator) -> Repair | None:
        """Each expert used less than `min_use` times its even share is drawn anew, and takes the router's row and
        balancing bias of one of the busiest experts, so that it is used at once.

        Tried beside it, on small regressions with an expert killed by hand, 3 seeds, with two routers: a noisy copy
        of the busy expert's weights too fills two of a token's slots with one function, and adds 2 to 6 times as
        much loss at once. A row drawn anew adds 12 times as much or more with BitLinear, where a small weight is
        not a small output (and draws 2.8 times an even load), half as much with plain linears. After 100 steps
        none was worse than leaving the expert dead by more than noise, and after 300 all were used evenly.
        """
        use_E = getattr(self.router, "use_E", None)
        if use_E is None:
            return None
        use = use_E.tolist()
        busiest = sorted(range(len(use)), key=use.__getitem__, reverse=True)
        dead = [expert for expert in busiest if use[expert] < min_use]
        alive = busiest[:len(use) - len(dead)]
        stats = {"least_use": min(use), "revived_experts": float(len(dead) if alive else 0)}
        if not (dead and alive):
            return Repair(stats, {})
        mask_E = torch.zeros(len(use), dtype=torch.bool)
        mask_E[dead] = True
        reset = {"router.weight": mask_E}
        for attribute in ("gate_up" if self.config.gated else "up", "activation", "down"):
            for name in redraw(getattr(self, attribute), mask_E, generator):
                reset[f"{attribute}.{name}"] = mask_E
        self.router.revive(dead, [alive[i % len(alive)] for i in range(len(dead))], generator)
        return Repair(stats, reset)
