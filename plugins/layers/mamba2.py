"""The Mamba-2 mixer: a selective state space with one decay per head, in the state-space dual form.

Dao and Gu, "Transformers are SSMs" (arXiv:2405.21060). One projection gives z, x, B, C and dt of every token;
x, B and C pass a short causal convolution; the scan (`ssd.py`, or as `scans.py` chooses) carries a state of
constant size; z gates the result before the norm.

Shapes: B batch, T time, D hidden, C channels of the convolution, I inner (H * P), H heads, P head dim, G groups,
N state, W conv width.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tryplicity import Count, Mixer, Positive, Rows, Size, State, Weight, later
from tryplicity_plugins.layers import native, scans
from tryplicity_plugins.layers.c_structs import Description, Products, address, kept_struct, packed, products
from tryplicity_plugins.layers.norms import ZERO
from tryplicity_plugins.layers.recurrent import draw_taps, draw_time_steps, keep_tail, new_tail, runs_of, window
from tryplicity_plugins.layers.ssd import conv_silu, gated_norm

GPU_CHUNK = 128  # the least there, when compiled
WEIGHTS = ("conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight")  # in C's order


class Mamba2InC(ctypes.Structure):
    """mamba2.cpp"""

    _fields_ = [*((name, ctypes.c_int64) for name in ("hidden", "heads", "head_dim", "groups", "state", "width",
                                                      "norm_groups")),
                *((name, ctypes.c_double) for name in ("eps", "dt_least", "dt_most")),
                ("weights", ctypes.c_void_p * 6), ("matrices", ctypes.c_void_p * 2), ("products", Products)]


class Mamba2(Mixer):
    """Mamba-2: a linear-time mixer whose decoding state does not grow with the text."""

    name = "mamba2"
    undecayed = ("A_log", "dt_bias", "D")
    takes_rows = True

    @dataclass(frozen=True)
    class Config:
        state_size: Size = 128
        """numbers each channel remembers"""
        head_dim: Size = 64
        """channels that share one decay"""
        expand: Annotated[int, Field(ge=1, le=64)] = 2
        """inner channels per hidden channel"""
        conv_width: Annotated[int, Field(ge=2, le=64)] = 4
        """tokens the short convolution sees, the current one included"""
        groups: Count = 1
        """sets of heads, each with its own B and C"""
        chunk: Count = 64
        """tokens per block of matrix products; changes speed and memory, not the result"""
        dt_min: Positive = 0.001
        """smallest initial time step"""
        dt_max: Positive = 0.1
        """largest initial time step"""
        dt_floor: Positive = 1e-4
        """initial time steps below this are raised to it"""
        A_min: Positive = 1.0
        """slowest initial decay rate of a head"""
        A_max: Positive = 16.0
        """fastest initial decay rate of a head"""
        norm_eps: Positive = 1e-5
        """added to the mean square before its root"""
        heads: Count | None = later(None)
        """how many; by default expand * hidden_size / head_dim of them"""
        bias: bool = later(False)
        """whether the projections into and out of the mixer have one"""
        conv_bias: bool = later(True)
        """whether the convolution has one"""
        norm: bool = later(True)
        """false: what z gates goes out as it is"""
        norm_groups: Count | None = later(None)
        """parts of the inner channels that are normalised each by itself; by default as many as groups"""
        dt_limit_min: Weight = later(0.0)
        """time steps below this are raised to it, at every token"""
        dt_limit_max: Positive | None = later(None)
        """time steps above this are lowered to it, at every token"""
        multipliers: Annotated[list[Positive], Field(min_length=5, max_length=5)] | None = later(None)
        """constant factors of the projected z, x, B, C and dt (Falcon-H1, arXiv:2507.22448)"""

    def __init__(self, config: Config, site) -> None:
        super().__init__()
        self.config = config
        self.heads = config.heads or site.hidden_size * config.expand // config.head_dim
        self.inner = self.heads * config.head_dim
        self.norm_groups = config.norm_groups or config.groups
        self.channels = [self.inner, config.groups * config.state_size, config.groups * config.state_size]
        self.projected = [self.inner, sum(self.channels), self.heads]  # z; x, B and C; dt
        self.in_proj = site.linear(site.hidden_size, sum(self.projected), bias=config.bias)
        self.out_proj = site.linear(self.inner, site.hidden_size, bias=config.bias, writes_residual=True)
        # no rounding in the decay's parameters: they act through exponentials of sums over the whole text
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.A_log = nn.Parameter(torch.empty(self.heads, dtype=wide))
        self.dt_bias = nn.Parameter(torch.empty(self.heads, dtype=wide))
        self.D = nn.Parameter(torch.empty(self.heads, dtype=wide))
        self.conv_weight = nn.Parameter(torch.empty(config.conv_width, sum(self.channels)))
        self.conv_bias = nn.Parameter(torch.empty(sum(self.channels))) if config.conv_bias else None
        self.norm_weight = nn.Parameter(torch.empty(self.inner)) if config.norm else None

    @classmethod
    def check(cls, config, site):
        inner = site.hidden_size * config.expand
        if config.heads is None and inner % config.head_dim:
            yield "head_dim", (f"hidden_size {site.hidden_size} * expand {config.expand} = {inner} does not "
                               f"divide by head_dim {config.head_dim}; the nearest that does is "
                               f"{_nearest_divisor(inner, config.head_dim)}; or say heads, then expand does not count")
            return
        heads = config.heads or inner // config.head_dim
        inner = heads * config.head_dim
        if heads % config.groups:
            yield "groups", (f"{heads} heads ({inner} inner channels / head_dim {config.head_dim}) do not "
                             f"divide by groups {config.groups}; the nearest that does is "
                             f"{_nearest_divisor(heads, config.groups)}")
        if config.norm_groups and inner % config.norm_groups:
            yield "norm_groups", (f"{inner} inner channels do not divide by {config.norm_groups}; the nearest that "
                                  f"does is {_nearest_divisor(inner, config.norm_groups)}")
        if config.norm_groups and not config.norm:
            yield "norm_groups", "with norm: false there is nothing to be grouped; leave one of them out"
        if (most := config.dt_limit_max) is not None and config.dt_limit_min > most:
            yield "dt_limit_min", f"{config.dt_limit_min} is above dt_limit_max; it can be {most} at most"
        if config.dt_min > config.dt_max:
            yield "dt_min", f"{config.dt_min} is above dt_max; it can be {config.dt_max} at most"
        if config.A_min > config.A_max:
            yield "A_min", f"{config.A_min} is above A_max; it can be {config.A_max} at most"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        config = self.config
        self.A_log.uniform_(config.A_min, config.A_max).log_()
        draw_time_steps(self.dt_bias, config.dt_min, config.dt_max, config.dt_floor)
        nn.init.ones_(self.D)
        draw_taps(self.conv_weight, self.conv_bias)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    def path(self, device: torch.device, compiled: bool) -> str:
        config = self.config
        if triton := scans.path(device, config.head_dim, config.state_size):
            return triton
        reason = None
        if device.type == "cuda":
            reason = scans.why_not("cuda", device.index, torch.bfloat16, config.head_dim, config.state_size)
        no_triton = f" (not Triton's: {reason})" if reason else ""
        how = ("as plain products, which the compiler fuses with what is around them" if compiled else
               "with gradients written by hand, in blocks of rows that fit a cache")
        return f"the scan in chunks of {self._chunk(device, compiled)}, {how}{no_triton}"

    def _chunk(self, device: torch.device, compiled: bool) -> int:
        """Compiled code keeps no table of decays in memory, and a GPU wants larger products."""
        return max(self.config.chunk, GPU_CHUNK) if compiled and device.type != "cpu" else self.config.chunk

    def new_state(self, batch: int, *, device=None, dtype=None) -> State:
        """conv [B, W - 1, C]: the last inputs of the convolution, those of an earlier document zeroed; ssm
        [B, H, P, N]; doc [B]: the document of the last token."""
        config = self.config
        device, dtype = device or self.conv_weight.device, dtype or self.conv_weight.dtype
        state = new_tail(batch, config.conv_width, sum(self.channels), device=device, dtype=dtype)
        state["ssm"] = torch.zeros(batch, self.heads, config.head_dim, config.state_size, device=device,
                                   dtype=torch.promote_types(dtype, torch.float32))
        return state

    def forward(self, x_BTD: Tensor, *, state: State | Rows | None = None,
                doc_ids: Tensor | None = None) -> Tensor:
        """See `Layer.forward`. Documents are runs of equal ids: an id that comes back begins a new one."""
        if doc_ids is None and native.for_inference(x_BTD) and (out_BTD := self._native(x_BTD, state)) is not None:
            return out_BTD
        if isinstance(state, Rows):
            return torch.cat([self(x_BTD[i:i + 1], state=own) for i, own in enumerate(state)])
        if state is not None and x_BTD.shape[1] == 1 and not torch.is_grad_enabled():
            return self._step(x_BTD, state, doc_ids)
        config = self.config
        z_BTI, xBC_BTC, dt_BTH = self._project(x_BTD).split(self.projected, -1)
        runs_BT = runs_of(doc_ids, state)
        seen = window(xBC_BTC, config.conv_width, state, runs_BT)
        bias_C = self.conv_weight.new_zeros(sum(self.channels)) if self.conv_bias is None else self.conv_bias
        x, Bs, Cs = conv_silu(seen.x_BTC, self.conv_weight, bias_C, sizes=self.channels, lead=seen.lead,
                              same_BWT=seen.same_BWT)
        x_BTHP = x.unflatten(-1, (self.heads, config.head_dim))
        Bs, Cs = (t.unflatten(-1, (config.groups, config.state_size)) for t in (Bs, Cs))
        wide = torch.promote_types(x.dtype, torch.float32)
        dt_BTH = self._limited(F.softplus(dt_BTH.to(wide) + self.dt_bias.to(wide)))
        y_BTHP, last_BHPN = scans.scan(x_BTHP, dt_BTH, -self.A_log.to(wide).exp(), Bs, Cs,
                                       chunk=self._chunk(x.device, torch.compiler.is_compiling()),
                                       start_BHPN=None if state is None else state["ssm"].to(wide), runs_BT=runs_BT)
        if state is not None:
            keep_tail(state, seen, doc_ids)
            state["ssm"].copy_(last_BHPN.detach())
        if self.norm_weight is None:
            u_BTI = (y_BTHP.to(wide) + x_BTHP.to(wide) * self.D.to(wide)[:, None]).flatten(2)
            return self.out_proj((u_BTI * F.silu(z_BTI.to(wide))).to(z_BTI.dtype))
        y_BTI = gated_norm(y_BTHP, x_BTHP, self.D, z_BTI, self.norm_weight, groups=self.norm_groups,
                           eps=config.norm_eps)
        return self.out_proj(y_BTI)

    def _project(self, x_BTD: Tensor) -> Tensor:
        projected = self.in_proj(x_BTD)
        if self.config.multipliers is None:
            return projected
        sizes = [self.inner, *self.channels, self.heads]
        return projected * torch.cat([projected.new_full((size,), factor)
                                      for size, factor in zip(sizes, self.config.multipliers, strict=True)])

    def _limited(self, dt: Tensor) -> Tensor:
        low, high = self.config.dt_limit_min, self.config.dt_limit_max
        return dt if low == 0 and high is None else dt.clamp(low, high)

    def _told(self) -> Description | None:
        config, linears = self.config, [self.in_proj, self.out_proj]
        own = [self._parameters.get(name) for name in WEIGHTS]
        weights = [weight for weight in own if weight is not None]
        if not native.plain(*weights):
            return None
        # between the projections there is no place for multipliers in C
        matrices = packed(*linears) if config.multipliers is None else None
        struct = Mamba2InC(self.in_proj.in_features, self.heads, config.head_dim, config.groups, config.state_size,
                           config.conv_width, self.norm_groups, config.norm_eps, config.dt_limit_min,
                           config.dt_limit_max or math.inf, tuple(map(address, own)), tuple(matrices or (None, None)),
                           products() if matrices else Products())
        return struct, weights, linears

    def _native(self, x_BTD: Tensor, state: State | Rows | None) -> Tensor | None:
        """The same in one call of C, with the projections if packed, else between them; None where C cannot."""
        mix, told = native.function("mamba2", "pppppii"), kept_struct(self, self._told)
        batch, time, _ = x_BTD.shape
        states = state if isinstance(state, Rows) else (state or self.new_state(batch),)
        if (mix is None or told is None
                or not all(one["conv"].dtype is torch.float32 and one["ssm"].is_cpu for one in states)):
            return None
        whole = told.struct.matrices[0] is not None
        given = x_BTD if whole else self._project(x_BTD)
        if not (whole or native.for_inference(given)):
            return None
        out = torch.empty_like(x_BTD) if whole else x_BTD.new_empty(batch, time, self.inner)
        conv, ssm = native.row_addresses(states, "conv", batch), native.row_addresses(states, "ssm", batch)
        mix(told.address, given.data_ptr(), conv, ssm, out.data_ptr(), batch, time)
        return out if whole else self.out_proj(out)

    def _step(self, x_B1D: Tensor, state: State, doc_ids: Tensor | None) -> Tensor:
        """One token without gradients: the recurrence itself, in as few operations as can be."""
        config, batch = self.config, x_B1D.shape[0]
        conv_BWC, ssm_BHPN = state["conv"], state["ssm"]
        if doc_ids is not None:
            same_B11 = (doc_ids == state["doc"][:, None])[..., None]
            conv_BWC.mul_(same_B11)
            ssm_BHPN.mul_(same_B11[..., None])
            state["doc"].copy_(doc_ids[:, 0])
        # split_with_sizes and view rather than split and unflatten, which are Python around them
        z_B1I, xBC_B1C, dt_B1H = self._project(x_B1D).split_with_sizes(self.projected, -1)
        window_BWC = torch.cat([conv_BWC, xBC_B1C], 1)
        conv_BWC.copy_(window_BWC[:, 1:])
        xBC_BC = (window_BWC * self.conv_weight).sum(1)
        if self.conv_bias is not None:
            xBC_BC.add_(self.conv_bias)
        xBC_BC = F.silu(xBC_BC, inplace=True)
        wide = ssm_BHPN.dtype
        x_BI, B_BY, C_BY = xBC_BC.to(wide).split_with_sizes(self.channels, -1)

        dt_B1H = self._limited(F.softplus(dt_B1H + self.dt_bias))  # its bias is wide already
        decay_B1H = torch.mul(dt_B1H, self.A_log.exp()).neg_().exp_()
        ssm_BHPN.mul_(decay_B1H.view(batch, -1, 1, 1))
        x_BHP = x_BI.view(batch, self.heads, -1)
        # one product for all heads of a group: X counts their head dims
        sets = batch * config.groups
        ssm_ZXN = ssm_BHPN.view(sets, -1, config.state_size)
        ssm_ZXN.addcmul_((x_BHP * dt_B1H.view(batch, -1, 1)).view(sets, -1, 1), B_BY.reshape(sets, 1, -1))
        y_BHP = torch.bmm(ssm_ZXN, C_BY.reshape(sets, -1, 1)).view(x_BHP.shape).addcmul_(x_BHP, self.D[:, None])

        g_B1I = y_BHP.view(z_B1I.shape) * F.silu(z_B1I)
        if self.norm_weight is None:
            return self.out_proj(g_B1I.to(z_B1I.dtype))
        # F.rms_norm is a dozen operations on a CPU
        g_BGX = g_B1I.view(batch, self.norm_groups, -1)
        size, one = g_BGX.shape[-1], batch * self.norm_groups == 1
        if (one and g_BGX.device.type == "cpu" and type(g_BGX) is Tensor and g_BGX.dtype == torch.float32
                and not torch.compiler.is_compiling()):
            # one number, and on the host: see RMSNorm
            rstd = (float(torch.linalg.vector_norm(g_BGX)) ** 2 / size + config.norm_eps) ** -0.5
            return self.out_proj(torch.addcmul(ZERO, g_BGX, self.norm_weight, value=rstd).to(z_B1I.dtype))
        norm_BG1 = torch.linalg.vector_norm(g_BGX, dim=-1, keepdim=True)
        g_BGX.mul_(norm_BG1.square_().mul_(1 / size).add_(config.norm_eps).rsqrt_())
        return self.out_proj((g_BGX.view(z_B1I.shape) * self.norm_weight).to(z_B1I.dtype))


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))
