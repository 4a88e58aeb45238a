"""Zamba's shared block: attention over the hidden state and the embedding, which tells the mixer of each layer more.

Shapes: B batch, T time, D hidden, H heads, G key/value heads, K head dim, F inner, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tryplicity import Count, Mixer, Part, PerUse, Report, Rows, Site, Size, State, output_and_report, uses
from tryplicity_plugins.layers.activations import activated, decoded
from tryplicity_plugins.layers.attention import GroupedQueryAttention
from tryplicity_plugins.layers.c_structs import Description


class WideAttention(GroupedQueryAttention):
    """Attention from 2 D to D whose scores are those of heads half as wide; something may be added to q, k and v."""

    def __init__(self, config: SharedAttention.Config, site: Site) -> None:
        wide, heads = dataclasses.replace(site, hidden_size=2 * site.hidden_size), config.heads
        size = wide.hidden_size // heads
        super().__init__(GroupedQueryAttention.Config(
            heads=heads, kv_heads=config.kv_heads, rope_base=config.rope_base, scale=(size / 2) ** -0.5), wide)
        self.out = site.linear(heads * size, site.hidden_size, writes_residual=True)

    def _in_c(self) -> Description:
        struct, kept, linears = super()._in_c()
        struct.qkv = struct.out = None  # what is packed there has one width
        return struct, kept, linears

    def also(self, x_BTE: Tensor, added: Tensor, state: State | Rows | None, doc_ids: Tensor | None) -> Tensor:
        """added: to q, k and v, [B, T, (H + 2 G) K]."""
        return self.out(self._attended(self.qkv(x_BTE) + added, state, doc_ids))


class LowRank(nn.Module):
    """A product of two matrices, through R dimensions (Hu et al., arXiv:2106.09685)."""

    def __init__(self, site: Site, in_features: int, rank: int, out_features: int) -> None:
        super().__init__()
        self.down, self.up = site.linear(in_features, rank), site.linear(rank, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class Use(nn.Module):
    """What each layer has of its own."""

    def __init__(self, config: SharedAttention.Config, site: Site, qkv: tuple[int, int, int], inner: int) -> None:
        super().__init__()
        D, rank = site.hidden_size, config.adapter_rank
        self.linear, self.norm, self.mixer = site.linear(D, D), site.norm(D), config.mixer.build(site)
        self.qkv = nn.ModuleList(LowRank(site, 2 * D, rank, out) for out in qkv) if config.adapted_attention else None
        self.gate_up = None if rank is None else LowRank(site, D, rank, 2 * inner)


class SharedAttention(Mixer):
    """A mixer of each layer's own that also hears an attention and a feed-forward over the hidden state beside the
    embedding, which all layers of a block share (Zamba, arXiv:2405.16712; Zamba2, arXiv:2411.15242):

        y = feed_forward(norm(attention(norm([x, embedding]))));  mixer(norm(x + linear(y)))

    linear, norm, mixer and the low-rank adapters are each layer's own. For a block with `shared: NAME` and `norms:
    none`, since what is normalised is the sum.
    """

    name = "shared_attention"
    takes_embedding = takes_use = True
    trials = ({"mixer": {"type": "mamba2", "head_dim": 16, "state_size": 8}, "heads": 4},
              {"mixer": {"type": "mamba2", "head_dim": 16, "state_size": 8}, "heads": 4, "adapter_rank": 4,
               "adapted_attention": True, "rope_base": 10000.0})

    @dataclass(frozen=True)
    class Config:
        mixer: Part = uses("mixer", default="mamba2")
        """each layer's own"""
        heads: Count = 8
        """query heads, which divide 2 hidden_size"""
        kv_heads: Count | None = None
        """key and value heads, a divisor of heads; by default as many"""
        rope_base: Annotated[float, Field(gt=1, le=1e12)] | None = None
        """base of the rotary wavelengths; by default no positions"""
        inner_size: Size | None = None
        """neurons of the feed-forward; by default 4 times hidden_size"""
        activation: Part = uses("activation", default="gelu")
        """what its gate goes through"""
        adapter_rank: Size | None = None
        """of what each layer adds to gate and up; by default nothing"""
        adapted_attention: bool = False
        """whether each layer adds to queries, keys and values too, in that rank"""

    @classmethod
    def check(cls, config: Config, site: Site) -> Iterator[tuple[str, str]]:
        wide, turned = 2 * site.hidden_size, config.rope_base is not None
        if wide % config.heads or (turned and wide // config.heads % 2):
            yield "heads", (f"{config.heads} does not cut 2 hidden_size ({wide}) into "
                            f"{'even' if turned else 'equal'} parts; take a divisor")
        if config.heads % (config.kv_heads or config.heads):
            yield "kv_heads", f"{config.kv_heads} does not divide heads ({config.heads}); take a divisor"
        if config.adapted_attention and config.adapter_rank is None:
            yield "adapted_attention", "it needs adapter_rank; add it"
        if getattr(config.mixer.component, "takes_use", False):
            yield "mixer", f"{config.mixer.name} has parts for each layer itself; it cannot be one of them"

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        D, inner = site.hidden_size, config.inner_size or 4 * site.hidden_size
        self.norm = site.norm(2 * D)
        self.attention = WideAttention(config, site)
        self.attended_norm = site.norm(D)
        self.gate_up = site.linear(D, 2 * inner, parts=(inner, inner))
        self.activation = config.activation.build(inner)
        self.down = site.linear(inner, D)
        H, G, K = self.attention.heads, self.attention.kv_heads, self.attention.head_dim
        self.uses = PerUse(Use(config, site, (H * K, G * K, G * K), inner) for _ in range(site.uses))
        self.takes_rows = self.uses[0].mixer.takes_rows

    def path(self, device: torch.device, compiled: bool) -> str | None:
        return self.attention.path(device, compiled)

    def new_state(self, batch: int, *, device=None, dtype=None) -> State:
        """attention, mixer: theirs."""
        parts = {"attention": self.attention, "mixer": self.uses[0].mixer}
        return State(**{name: part.new_state(batch, device=device, dtype=dtype) for name, part in parts.items()})

    def forward(self, x_BTD: Tensor, *, state: State | Rows | None = None, doc_ids: Tensor | None = None,
                embedding: Tensor | None = None, use: int = 0):
        own, report = self.uses[use], Report()
        both_BTE = self.norm(torch.cat((x_BTD, x_BTD if embedding is None else embedding.to(x_BTD.dtype)), -1))
        attending = _part(state, "attention")
        if own.qkv is None:
            y_BTD = self.attention(both_BTE, state=attending, doc_ids=doc_ids)
        else:
            added = torch.cat([adapter(both_BTE) for adapter in own.qkv], -1)
            y_BTD = self.attention.also(both_BTE, added, attending, doc_ids)
        y_BTD = self.attended_norm(y_BTD)
        gate_up_BTF = self.gate_up(y_BTD)
        if own.gate_up is not None:
            gate_up_BTF = gate_up_BTF + own.gate_up(y_BTD)
        if self.training or torch.is_grad_enabled():
            y_BTF, said = activated(self.activation, gate_up_BTF, gate=True)
            report.include("activation", said)
        else:
            y_BTF = decoded(self.activation, gate_up_BTF, gate=True)
        told_BTD = own.norm(x_BTD + own.linear(self.down(y_BTF)))
        y_BTD, said = output_and_report(own.mixer(told_BTD, state=_part(state, "mixer"), doc_ids=doc_ids))
        report.include(f"uses.{use}.mixer", said)
        return y_BTD, report


def _part(state: State | Rows | None, name: str) -> State | Rows | None:
    """What one of the two has of the state of both."""
    if isinstance(state, Rows):
        own = [one[name] for one in state]
        return None if own[0] is None else Rows(own)
    return None if state is None else state[name]
