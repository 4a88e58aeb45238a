"""Tokens per second and money, from measured FLOPs and a profile's figures. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tryplicity.hardware import Hardware
    from tryplicity.planner.memory import MemoryPlan


@dataclass(frozen=True)
class Speed:
    flops_per_token: float
    """Of one training token: forward, backward and recomputation."""
    tokens_per_second: float
    """Of all machines together."""
    basis: str
    """What the estimate assumes, in a sentence."""


def estimate_speed(flops_per_token: float, tokens_per_micro_batch: int, memory: MemoryPlan,
                   hardware: Hardware) -> Speed:
    """A step takes the longer of its products, at the expected share of the peak, and of what is sent to other
    devices, and between machines, meanwhile; then the optimizer reads and writes all it holds.
    """
    tokens = tokens_per_micro_batch * hardware.accumulation
    compute = flops_per_token * tokens / (hardware.tflops * 1e12 * hardware.utilisation)
    sent = memory.sent_per_step / (hardware.link_bandwidth_gbs * 1e9) if hardware.count > 1 else 0.0
    if hardware.nodes > 1:
        between = memory.sent_per_step if memory.sent_between_nodes is None else memory.sent_between_nodes
        sent = max(sent, between / (hardware.interconnect_bandwidth_gbs * 1e9))
    # weights and state are read and written, gradients read
    touched = 2 * memory.parts["weights"] + 2 * memory.parts["optimizer"] + memory.parts["gradients"]
    update = touched / (hardware.memory_bandwidth_gbs * 1e9)
    step = max(compute, sent) + update
    bound = "communication" if sent > compute else "compute"
    basis = (f"assumes {hardware.utilisation:.0%} of {hardware.devices} x {hardware.tflops:g} TFLOP/s "
             f"({hardware.precision}), the profile's utilisation; per step {compute:.2f} s of products, {sent:.2f} s "
             f"of communication meanwhile, {update:.2f} s of optimizer; {bound}-bound")
    return Speed(flops_per_token, tokens * hardware.devices / step, basis)


@dataclass(frozen=True)
class Money:
    per_hour: float
    per_billion_tokens: float


def estimate_cost(speed: Speed, hardware: Hardware) -> Money:
    """US dollars for all machines together."""
    per_hour = hardware.machine_price_per_hour
    return Money(per_hour, per_hour / 3600 / speed.tokens_per_second * 1e9)
