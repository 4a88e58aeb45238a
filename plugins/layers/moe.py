"""Mixture of experts: many small gated MLPs, a few of them for each token, and shared ones for all.

Shapes: B batch, T time, D hidden, N tokens (B*T), E experts, K slots of a token, S rows sorted by expert, F
inner (or twice that, gate and up), M size of a sketch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tryplicity import (
    Count,
    FeedForward,
    Part,
    Repair,
    Report,
    Router,
    Size,
    Some,
    check_experts,
    check_routing,
    grouped_product_works,
    kernels,
    output_and_report,
    uses,
)
from tryplicity_plugins.layers import native
from tryplicity_plugins.layers.activations import Elementwise, GateInC, gate_in_c, gated, gated_and_report
from tryplicity_plugins.layers.gated_mlp import GatedMLPInC, mlp_in_c
from tryplicity_plugins.layers.prepared import Told, matrix_of, packed, prepared, products
from tryplicity_plugins.layers.router import BalancedRouter, RouterInC, full_precision, router_in_c

#: Every group begins and ends at a multiple of this many rows. MKL rounds a product of 1, and of 2 or 3 rows,
#: unlike one of 4 or more (with several threads: the rows after the last multiple of 4), so without it a
#: token's result would depend on how many others share its expert. And CUDA wants groups of a multiple of 16
#: bytes.
GROUP_ROWS = 8
FEW_TOKENS = 2  # up to this many are decoded one by one, reading the weights of the chosen experts alone
SKETCH_SIZE = 128  # for each of the two stacks


class MixtureInC(ctypes.Structure):
    """moe.cpp"""

    _fields_ = [("router", RouterInC), ("activation", GateInC), ("inner", ctypes.c_int64),
                ("gate_up", ctypes.c_void_p), ("down", ctypes.c_void_p), ("shared", GatedMLPInC)]


class Layout(NamedTuple):
    """Where the tokens' slots lie when sorted by expert. Shapes depend on N, K and E alone."""

    slot_NK: Tensor  # the row of each slot; an unused slot names the row of the token's first
    used_NK: Tensor
    token_S: Tensor  # the token of each row; a row without one has token 0
    expert_S: Tensor  # the expert of each row; a row without one has E
    offsets_E: Tensor  # int32, the end of each expert's rows


def lay_out(experts_NK: Tensor, experts: int) -> Layout:
    """Sort slots by expert into groups of a multiple of GROUP_ROWS rows. A token's unused slots come last,
    and it uses one at least."""
    tokens, slots = experts_NK.shape
    device = experts_NK.device
    sorted_S, order_S = experts_NK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(sorted_S, torch.arange(experts, device=device), right=True)
    sizes_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    padded_E = (sizes_E + GROUP_ROWS - 1) // GROUP_ROWS * GROUP_ROWS
    offsets_E = padded_E.cumsum(0)
    shift_E = (offsets_E - padded_E) - (ends_E - sizes_E)
    row_S = torch.arange(tokens * slots, device=device) + shift_E[sorted_S.clamp(max=experts - 1)]
    row_NK = torch.empty_like(row_S).scatter_(0, order_S, row_S).view(tokens, slots)
    used_NK = experts_NK < experts
    slot_NK = row_NK.where(used_NK, row_NK[:, :1])

    # GROUP_ROWS for each thread, too: where the shares of two threads meet inside a row, its last elements
    # take the scalar code of sigmoid and the like, which rounds unlike the vector code
    eager_cpu = device.type == "cpu" and not torch.compiler.is_compiling()
    step = GROUP_ROWS * (torch.get_num_threads() if eager_cpu else 1)
    rows = -(-(tokens * slots + experts * (GROUP_ROWS - 1)) // step) * step
    token_NK = torch.arange(tokens, device=device)[:, None].expand(tokens, slots)
    token_S = slot_NK.new_zeros(rows).scatter_(0, slot_NK.flatten(), token_NK.flatten())
    expert_NK = experts_NK.where(used_NK, experts_NK[:, :1])
    expert_S = slot_NK.new_full((rows,), experts).scatter_(0, slot_NK.flatten(), expert_NK.flatten())
    return Layout(slot_NK, used_NK, token_S, expert_S, offsets_E.to(torch.int32))


class _Spread(torch.autograd.Function):
    """Tokens to their rows. Both ways a gather: no sum whose order could change."""

    @staticmethod
    def forward(ctx, x_ND, slot_NK, used_NK, token_S):
        ctx.save_for_backward(slot_NK, used_NK)
        return x_ND.index_select(0, token_S)

    @staticmethod
    def backward(ctx, grad_SD):
        slot_NK, used_NK = ctx.saved_tensors
        if torch.compiler.is_compiling():
            grad_NKD = grad_SD.index_select(0, slot_NK.flatten()).view(*slot_NK.shape, -1).float()
            return (grad_NKD * used_NK[..., None]).sum(1).to(grad_SD.dtype), None, None, None
        grad_ND = torch.zeros(len(slot_NK), grad_SD.shape[1], device=grad_SD.device)
        for slot_N, used_N in zip(slot_NK.T, used_NK.float().T, strict=True):
            grad_ND.addcmul_(grad_SD.index_select(0, slot_N), used_N[:, None])
        return grad_ND.to(grad_SD.dtype), None, None, None


def spread(x_ND: Tensor, layout: Layout) -> Tensor:
    """Tokens to their rows, in the dtype of the product to come."""
    kind = x_ND.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        x_ND = x_ND.to(torch.get_autocast_dtype(kind))
    return _Spread.apply(x_ND, layout.slot_NK, layout.used_NK, layout.token_S)


class _Collect(torch.autograd.Function):
    """Rows back to their tokens, weighted and summed in fp32."""

    @staticmethod
    def forward(ctx, y_SD, weights_NK, slot_NK, used_NK, token_S):
        ctx.save_for_backward(y_SD, weights_NK, slot_NK, used_NK, token_S)
        if torch.compiler.is_compiling():
            y_NKD = y_SD.index_select(0, slot_NK.flatten()).view(*slot_NK.shape, -1)
            return _cast((y_NKD.float() * weights_NK.float()[..., None]).sum(1), y_SD.dtype)
        out_ND = torch.zeros(len(weights_NK), y_SD.shape[1], device=y_SD.device)
        for slot_N, weight_N in zip(slot_NK.T, weights_NK.float().T, strict=True):
            out_ND.addcmul_(y_SD.index_select(0, slot_N), weight_N[:, None])
        return out_ND.to(y_SD.dtype)

    @staticmethod
    def backward(ctx, grad_ND):
        y_SD, weights_NK, slot_NK, used_NK, token_S = ctx.saved_tensors
        weight_S = torch.zeros(len(y_SD), device=y_SD.device, dtype=y_SD.dtype)
        weight_S.scatter_add_(0, slot_NK.flatten(), weights_NK.flatten().to(y_SD.dtype))
        if torch.compiler.is_compiling():
            y_NKD = y_SD.index_select(0, slot_NK.flatten()).view(*slot_NK.shape, -1)
            grad_NK = ((grad_ND[:, None] * y_NKD).sum(-1) * used_NK).to(weights_NK.dtype)
            return grad_ND.index_select(0, token_S) * weight_S[:, None], grad_NK, None, None, None
        grad_SD = grad_ND.index_select(0, token_S).mul_(weight_S[:, None])
        grad_w = [(grad_ND * y_SD.index_select(0, slot_N)).sum(-1) for slot_N in slot_NK.T]
        grad_NK = torch.stack(grad_w, -1).where(used_NK, 0)
        return grad_SD, grad_NK.to(weights_NK.dtype), None, None, None


def collect(y_SD: Tensor, weights_NK: Tensor, layout: Layout) -> Tensor:
    """Rows back to their tokens, weighted and summed: [N, D]."""
    return _Collect.apply(y_SD, weights_NK, layout.slot_NK, layout.used_NK, layout.token_S)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In torch 2.11 a compiled Function loses its gradient if its forward ends in a cast that changes nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def pairs(router: Router, experts: int, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A router's choice as its pairs: the token, the expert and the weight of each [S], a token's one after another."""
    found = router.pairs(x_ND) if isinstance(router, BalancedRouter) else None
    if found is None:
        routing = router(x_ND[None])
        check_routing(router, routing, len(x_ND), experts)
        used_NK = routing.experts_NK < experts
        found = used_NK.nonzero()[:, 0], routing.experts_NK[used_NK], routing.weights_NK[used_NK].float()
    return found


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

    @classmethod
    def check(cls, config, site):
        if config.top_k > config.experts:
            yield "top_k", f"{config.top_k} of {config.experts} experts; at most {config.experts}"
        most = getattr(config.router.config, "max_experts", 0)
        if most > config.experts:
            yield "router.max_experts", f"{most} of {config.experts} experts; at most {config.experts}"

    def __init__(self, config, site) -> None:
        super().__init__()
        self.config = config
        hidden, experts, inner = site.hidden_size, config.experts, config.inner_size
        self.router = config.router.build(site, experts, config.top_k)
        stack = {"experts": experts, "active_experts": self.router.mean_k}
        self.gate_up = site.linear(hidden, 2 * inner, **stack)
        self.activation = config.activation.build(inner, groups=experts)
        self.activation.active_fraction = self.router.mean_k / experts
        self.down = site.linear(inner, hidden, writes_residual=True, **stack)
        if config.shared_experts:
            width = config.shared_experts * (config.shared_inner_size or inner)
            self.shared_gate_up = site.linear(hidden, 2 * width)
            self.shared_activation = config.activation.build(width)
            self.shared_down = site.linear(width, hidden, writes_residual=True)
        # one elementwise function for the routed experts and the shared, of one width
        self.all_alike = (config.shared_experts > 0 and width == inner
                          and isinstance(self.activation, Elementwise))

    def forward(self, x_BTD: Tensor, *, state=None, doc_ids=None):
        if matrix_of(self.gate_up) is not None and matrix_of(self.down) is not None:
            told = prepared(self, self._in_c) if native.works_on(x_BTD) else None
            if told is None:
                return self._packed(x_BTD.flatten(0, 1)).view(x_BTD.shape)
            out_BTD = torch.empty_like(x_BTD)
            native.function("mixture_of_experts", "ppip")(told.address, x_BTD.data_ptr(),
                                                          x_BTD.shape[0] * x_BTD.shape[1], out_BTD.data_ptr())
            return out_BTD
        # a FakeTensor or DTensor has no values to read on the host
        if (x_BTD.shape[0] * x_BTD.shape[1] <= FEW_TOKENS and not torch.is_grad_enabled()
                and type(x_BTD) is Tensor and x_BTD.device.type == "cpu" and not torch.is_autocast_enabled("cpu")):
            if x_BTD.shape[0] == 1 and x_BTD.shape[1] == 1:
                return self._one_token(x_BTD.view(-1)).view(x_BTD.shape)
            return torch.stack([self._one_token(x_D) for x_D in x_BTD.flatten(0, 1)]).view(x_BTD.shape)
        report, routing = Report(), self.router(x_BTD)
        check_routing(self.router, routing, x_BTD.shape[0] * x_BTD.shape[1], self.config.experts)
        report.include("router", routing.report)
        layout = lay_out(routing.experts_NK, self.config.experts)

        gate_up_SF = self.gate_up(x_BTD.flatten(0, 1), layout.offsets_E, lambda x_ND: spread(x_ND, layout))
        h_SF, said = gated_and_report(self.activation, gate_up_SF, layout.expert_S)
        report.include("activation", said)
        y_SD = self.down(h_SF, layout.offsets_E)
        y_BTD = collect(y_SD, routing.weights_NK, layout).view_as(x_BTD)
        if self.config.shared_experts:
            y_BTD = y_BTD + self._shared(x_BTD, report)
        return y_BTD, report

    def path(self, device: torch.device, compiled: bool) -> str:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return ("slots sorted by expert; " + ("gathered and combined in one pass each, " if compiled else "") +
                ("torch's grouped product" if grouped_product_works(device.type, dtype)
                 else "one product for each expert, since torch's grouped one fails here"))

    def before_step(self, step: int) -> None:
        """Once per optimizer step, and not in the forward passes, which are many, and computed again."""
        inhibition = getattr(self.router, "inhibition", None)
        asking = [part for part in (self.router, inhibition) if part is not None and part.wants_sketch(step)]
        sketch_EM = self._sketch() if asking else None
        for part in asking:
            part.take_sketch(sketch_EM)

    def _in_c(self) -> Told | None:
        """What C must know to do all of a packed layer in one call; None where a part is not known to it."""
        router = router_in_c(self.router)
        gate, matrices = gate_in_c(self.activation), packed(self.gate_up, self.down)
        if router is None or gate is None or matrices is None:
            return None
        shared = GatedMLPInC(products=products()), [], []
        if self.config.shared_experts:
            shared = mlp_in_c(self.shared_gate_up, self.shared_activation, self.shared_down)
            if shared is None:
                return None
        struct = MixtureInC(router[0], gate[0], self.down.in_features, *matrices, shared[0])
        return struct, [*router[1], *gate[1], *shared[1]], [self.gate_up, self.down, *shared[2]]

    def _packed(self, x_ND: Tensor) -> Tensor:
        """Inference with packed weights, part by part: of those of the experts only the chosen ones' are read, once for
        all tokens."""
        row_S, expert_S, weight_S = pairs(self.router, self.config.experts, x_ND)
        gate_up_SF = kernels.packed_experts(x_ND, self.gate_up.matrix, row_S, expert_S)
        h_SF = gated(self.activation, gate_up_SF, expert_S)
        if self.config.shared_experts:
            out_ND = self.shared_down(gated(self.shared_activation, self.shared_gate_up(x_ND))).float()
        else:
            out_ND = x_ND.new_zeros(x_ND.shape, dtype=torch.float32)
        return kernels.packed_experts(h_SF, self.down.matrix, None, expert_S, weight_S, out_ND, row_S).to(x_ND.dtype)

    def _shared(self, x: Tensor, report: Report) -> Tensor:
        h, said = gated_and_report(self.shared_activation, self.shared_gate_up(x))
        report.include("shared_activation", said)
        return self.shared_down(h)

    def _one_token(self, x_D: Tensor) -> Tensor:
        """Decoding: the weights of the chosen experts alone are read. A small operation costs as much as the
        product of a small expert, so there are as few as can be, and the choice is made on the host."""
        chosen = self.router.choose(x_D)
        check_experts(self.router, (expert for expert, _ in chosen), self.config.experts)
        chosen = [(expert, weight) for expert, weight in chosen if expert < self.config.experts]
        gate_up, down = self.gate_up, self.down
        in_D = gate_up.effective_input(x_D)
        gate_up_F = [torch.mv(gate_up.expert_weight(expert), in_D) for expert, _ in chosen]
        if self.all_alike:  # the shared expert goes through the activation with the others
            gate_KF, up_KF = torch.stack([*gate_up_F, self.shared_gate_up(x_D)]).chunk(2, dim=-1)
            *h_F, shared_F = (self.activation(gate_KF) * up_KF).unbind()
            out_D = self.shared_down(shared_F)
        else:
            gate_KF, up_KF = torch.stack(gate_up_F).chunk(2, dim=-1)
            gate_KF, _ = output_and_report(self.activation(gate_KF, torch.tensor([e for e, _ in chosen])))
            h_F = (gate_KF * up_KF).unbind()
            out_D = self._shared(x_D, Report()) if self.config.shared_experts else torch.zeros_like(x_D)
        for h, (expert, weight) in zip(h_F, chosen, strict=True):
            out_D.addmv_(down.expert_weight(expert), down.effective_input(h), alpha=weight)
        return out_D

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
        for attribute in ("gate_up", "activation", "down"):
            for name in _redraw(getattr(self, attribute), mask_E, generator):
                reset[f"{attribute}.{name}"] = mask_E
        self.router.revive(dead, [alive[i % len(alive)] for i in range(len(dead))], generator)
        return Repair(stats, reset)

    @torch.no_grad()
    def _sketch(self) -> Tensor:
        """Products of each expert's weights with random signs from both sides, the same signs for all
        experts: the inner product of two experts' sketches is on average that of their weights."""
        sketches = []
        for linear in (self.gate_up, self.down):
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


def _redraw(stack: nn.Module, mask_E: Tensor, generator: torch.Generator) -> list[str]:
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
