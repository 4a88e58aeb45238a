"""Hyper-connections: several residual streams with learned mixing.

Shapes: B batch, T time, N tokens (B*T), S streams, D hidden, W = S + 2 coefficients of each stream: how much
of it the sub-layer reads, how much of it each stream gets, how much of the sub-layer's output it takes.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tryplicity import Count, Report, Residual, Site
from tryplicity_plugins.layers import native

NORM_EPS = 1e-6
FIRST_SCALE = 0.01  # of the input-dependent part, as in the paper


def _no_autocast(x: Tensor):
    """No autocast within, forward or backward; free where there is none."""
    device = x.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _mix(coefficients_NSW: Tensor, streams_NSD: Tensor) -> tuple[Tensor, Tensor]:
    """The sub-layer's input [N, D] and the streams that pass it by [N, S, D]."""
    S = streams_NSD.shape[1]
    read, keep = coefficients_NSW[..., :1], coefficients_NSW[..., 1:S + 1]
    return torch.bmm(read.mT, streams_NSD)[:, 0], torch.bmm(keep.mT, streams_NSD)


def _dynamic(streams_NSD: Tensor, weight_WD: Tensor, static_SW: Tensor, scale_W: Tensor):
    """static + scale * tanh(weight @ norm(stream)), and for its gradient: the products, 1/rms, the tanh."""
    rstd_NS1 = torch.linalg.vector_norm(streams_NSD, dim=-1, keepdim=True)
    rstd_NS1 = rstd_NS1.square_().div_(streams_NSD.shape[-1]).add_(NORM_EPS).rsqrt_()
    product_NSW = streams_NSD @ weight_WD.T  # the norm has no parameters, so it can follow the product
    tanh_NSW = (product_NSW * rstd_NS1).tanh_()
    return torch.addcmul(static_SW, scale_W, tanh_NSW), product_NSW, rstd_NS1, tanh_NSW


class _DynamicMix(torch.autograd.Function):
    """Coefficients and both products in one node: the gradient of the streams is built in one tensor, and the
    streams are saved in their own dtype."""

    @staticmethod
    def forward(ctx, streams_NSD, weight_WD, static_SW, scale_W):
        wide_NSD = streams_NSD.to(static_SW.dtype)
        coefficients_NSW, *saved = _dynamic(wide_NSD, weight_WD, static_SW, scale_W)
        ctx.save_for_backward(streams_NSD, weight_WD, scale_W, coefficients_NSW, *saved)
        x_ND, kept_NSD = _mix(coefficients_NSW, wide_NSD)
        return x_ND, kept_NSD, coefficients_NSW[..., -1:].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x_ND, grad_kept_NSD, grad_depth_NS1):
        streams_NSD, weight_WD, scale_W, coefficients_NSW, product_NSW, rstd_NS1, tanh_NSW = ctx.saved_tensors
        with _no_autocast(streams_NSD):
            S, D = streams_NSD.shape[1:]
            wide_NSD = streams_NSD.to(coefficients_NSW.dtype)
            read_NS1, keep_NSS = coefficients_NSW[..., :1], coefficients_NSW[..., 1:S + 1]
            grad_x_N1D = grad_x_ND.unsqueeze(1)
            grad_NSW = torch.cat((torch.bmm(wide_NSD, grad_x_N1D.mT), torch.bmm(wide_NSD, grad_kept_NSD.mT),
                                  grad_depth_NS1), dim=-1)
            grad_static_SW, grad_scale_W = grad_NSW.sum(0), (grad_NSW * tanh_NSW).sum((0, 1))
            grad_NSW = grad_NSW * scale_W * (1 - tanh_NSW.square())
            along_NS1 = (grad_NSW * product_NSW).sum(-1, keepdim=True).mul_(rstd_NS1.pow(3)).div_(-D)
            grad_NSW = grad_NSW.mul_(rstd_NS1)
            grad_weight_WD = grad_NSW.flatten(0, 1).T @ wide_NSD.flatten(0, 1)
            grad_NSD = torch.matmul(grad_NSW, weight_WD)
            grad_NSD.baddbmm_(keep_NSS, grad_kept_NSD).baddbmm_(read_NS1, grad_x_N1D)
            grad_NSD.addcmul_(wide_NSD, along_NS1)
        return grad_NSD.to(streams_NSD.dtype), grad_weight_WD, grad_static_SW, grad_scale_W


def _traced_width(streams_NSD: Tensor, weight_WD: Tensor | None, static_SW: Tensor, scale_W: Tensor | None):
    """The same as a compiler likes it: sums of broadcast products, which it makes one pass of. A product of matrices of
    S rows is none that a device is good at."""
    S = streams_NSD.shape[1]
    wide_NSD = streams_NSD.to(static_SW.dtype)
    coefficients_NSW = static_SW.expand(len(streams_NSD), -1, -1)
    if weight_WD is not None:
        rstd_NS1 = (wide_NSD.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
        product_NSW = (wide_NSD.flatten(0, 1) @ weight_WD.T).view(-1, S, S + 2)
        coefficients_NSW = static_SW + scale_W * (product_NSW * rstd_NS1).tanh()
    parts_ND = wide_NSD.unbind(1)
    read_SN1, depth_NS1 = coefficients_NSW[..., :1].unbind(1), coefficients_NSW[..., -1:]
    x_ND = sum(share_N1 * part_ND for share_N1, part_ND in zip(read_SN1, parts_ND, strict=True))
    keep_SNS1 = coefficients_NSW[..., 1:-1, None].unbind(1)
    kept_NSD = sum(share_NS1 * part_ND[:, None] for share_NS1, part_ND in zip(keep_SNS1, parts_ND, strict=True))
    return x_ND, kept_NSD, depth_NS1


class HyperConnections(Residual):
    """Streams [B, T, S, D], read, mixed and written by learned weights (Zhu et al., arXiv:2409.19606).

    Of stream i the sub-layer reads a share A_m[i] and stream j gets a share A_r[i, j]; of the output it takes
    B[i]. Each is a learned constant plus, if dynamic, a small scale times tanh of a projection of the
    normalised stream. A new one is exactly the plain residual: all streams equal, their average what `add`
    would give. Coefficients and mixing are in fp32, whatever the streams' dtype.
    """

    name = "hyper_connections"
    undecayed = ("static", "scale")

    @dataclass(frozen=True)
    class Config:
        streams: Count = 4
        """Residual streams."""
        dynamic: bool = True
        """Whether the mixing depends on the token."""

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        S = self.streams = config.streams
        self.first = (2 * (site.layer or 0) + site.sublayer) % S  # the stream the sub-layer reads at first
        self.static = nn.Parameter(torch.empty(S, S + 2))
        self.dynamic = nn.Parameter(torch.empty(S + 2, site.hidden_size)) if config.dynamic else None
        self.scale = nn.Parameter(torch.empty(2)) if config.dynamic else None  # of A_m and A_r, of B

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.static.zero_()
        self.static[self.first, 0] = 1
        self.static[:, 1:-1].fill_diagonal_(1)
        self.static[:, -1] = 1
        if self.dynamic is not None:
            self.dynamic.zero_()
            self.scale.fill_(FIRST_SCALE)

    def path(self, device: torch.device, compiled: bool) -> str:
        if compiled:
            return "sums of broadcast products, which the compiler makes one pass of"
        return "products of small matrices and a backward pass written by hand, in one tensor"

    def expand(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unsqueeze(-2).repeat(1, 1, self.streams, 1)

    def reduce(self, streams: Tensor) -> Tensor:
        return streams.mean(-2)

    def forward(self, streams: Tensor, sublayer) -> tuple[Tensor, Report]:
        B, T, S, D = streams.shape
        if native.for_inference(streams):
            read = native.function("hyper_connections_read", "pppppp" "iiif")
            weights = native.own_parameters(self, "static", "dynamic", "scale")
            if read is not None and weights is not None:
                return self._native(read, weights, streams, sublayer)
        streams_NSD = streams.reshape(B * T, S, D)
        with _no_autocast(streams):
            x_ND, kept_NSD, depth_NS1 = self._width(streams_NSD)
        y_BTD, report = sublayer(x_ND.to(streams.dtype).view(B, T, D))
        with _no_autocast(streams):
            y_N1D = y_BTD.to(kept_NSD.dtype).reshape(B * T, 1, D)
            write = torch.addcmul if torch.compiler.is_compiling() else torch.baddbmm
            streams_NSD = write(kept_NSD, depth_NS1, y_N1D)
        return streams_NSD.to(streams.dtype).view(B, T, S, D), report

    def _native(self, read, weights: list[int], streams: Tensor, sublayer) -> tuple[Tensor, Report]:
        """The same in two calls of C, before and after the sub-layer."""
        B, T, S, D = streams.shape
        write = native.function("hyper_connections_write", "pppp" "iii")
        x_BTD, coefficients_NSW = streams.new_empty(B, T, D), streams.new_empty(B * T, S, S + 2)
        read(streams.data_ptr(), *weights, coefficients_NSW.data_ptr(), x_BTD.data_ptr(), B * T, S, D, NORM_EPS)
        y_BTD, report = sublayer(x_BTD)
        y_BTD = y_BTD.to(streams.dtype).contiguous()
        out = torch.empty_like(streams)
        write(streams.data_ptr(), coefficients_NSW.data_ptr(), y_BTD.data_ptr(), out.data_ptr(), B * T, S, D)
        return out, report

    def _width(self, streams_NSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the sub-layer reads [N, D], what passes by [N, S, D], how much each stream takes [N, S, 1]."""
        dtype = torch.promote_types(streams_NSD.dtype, torch.float32)
        static_SW = self.static.to(dtype)
        if self.dynamic is None and torch.compiler.is_compiling():
            return _traced_width(streams_NSD, None, static_SW, None)
        if self.dynamic is None:
            coefficients_NSW = static_SW.expand(len(streams_NSD), -1, -1)
            return *_mix(coefficients_NSW, streams_NSD.to(dtype)), coefficients_NSW[..., -1:]
        scale_W = torch.cat((self.scale[:1].expand(self.streams + 1), self.scale[1:])).to(dtype)
        weight_WD = self.dynamic.to(dtype)
        if torch.compiler.is_compiling():
            return _traced_width(streams_NSD, weight_WD, static_SW, scale_W)
        if torch.is_grad_enabled():
            return _DynamicMix.apply(streams_NSD, weight_WD, static_SW, scale_W)
        wide_NSD = streams_NSD.to(dtype)
        coefficients_NSW = _dynamic(wide_NSD, weight_WD, static_SW, scale_W)[0]
        return *_mix(coefficients_NSW, wide_NSD), coefficients_NSW[..., -1:]
