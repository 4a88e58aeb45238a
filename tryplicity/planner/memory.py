"""The peak memory of one device in a training step, in closed form from measured stages. Loads no torch.

A step walks the stages (embedding, blocks, losses) forward and back. Whatever is alive when one of them works
is a sum of a few parts; the largest such sum is the plan. Strategies (family parallelism) differ in what they
hold beside the stages: all weights, or a shard and the blocks gathered from the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tryplicity.hardware import Hardware
    from tryplicity.planner.measure import Cost

GB = 1e9

#: what a device holds, in the order of pages and JSON
PARTS = ("weights", "gradients", "optimizer", "activations", "workspace", "gathered", "buckets", "buffers",
         "overhead")


@dataclass(frozen=True)
class MemoryPlan:
    """The peak of one device, in bytes, and what it is made of at that moment."""

    parts: dict[str, int]
    """weights; gradients; optimizer (its state, and temporaries while it steps); activations (what stages keep
    from forward to backward); workspace (the stage at work); gathered (weights of other devices' shards);
    buckets (gradients under way to other devices); buffers (the model's and the batch); overhead (see there)."""
    moment: str
    """When the peak is reached."""
    sent_per_step: int = 0
    """Bytes one device sends to others in one optimizer step."""
    sent_between_nodes: int | None = None
    """Bytes that one machine sends to others in one optimizer step, where there are several. None: as many as a device
    sends, since in a ring through all devices one of a machine sends to the next machine."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", {name: int(self.parts.get(name, 0)) for name in PARTS}
                           | {name: int(size) for name, size in self.parts.items() if name not in PARTS})

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def counted(self) -> int:
        """Bytes of tensors: all but the overhead."""
        return self.total - self.parts["overhead"]

    def fits(self, capacity: int) -> bool:
        return self.total <= capacity


@dataclass(frozen=True)
class ModelStage:
    """The embedding, one block, or the end of the model (norm, losses)."""

    name: str
    parameters: int
    """Its own: a shared block's count once, at the first of its layers."""
    at_work: int | None = None
    """Those that work there, where they are others: those of a shared block, at each of its layers."""

    @property
    def works_with(self) -> int:
        return self.parameters if self.at_work is None else self.at_work


@dataclass(frozen=True)
class Facts:
    """What a strategy may know of a model, one micro-batch of it, and its optimizer."""

    stages: Sequence[ModelStage]
    """In the order of the forward pass. A tied table counts once, with the embedding."""
    buffer_bytes: int
    """The model's buffers, and a step's tokens, documents, targets and losses."""
    tokens: int
    """Of one micro-batch on one device."""
    optimizer_state_bytes: int
    """Per parameter."""
    optimizer_step_bytes: int
    """Temporaries per parameter while the optimizer steps."""
    measured: Callable[[str, bool], Sequence[Cost]] = field(repr=False)
    """The cost of each stage. `measured(weights, gradients_exist)`: weights is "fp32" (products in the
    profile's precision) or "bf16" (the stage sees bf16 weights, as a mixed-precision shard gives it);
    gradients_exist, whether a backward pass adds to gradients or makes them."""

    @property
    def parameters(self) -> int:
        return sum(stage.parameters for stage in self.stages)

    @property
    def largest_block(self) -> int:
        """Parameters of the largest stage between embedding and end."""
        return max((s.works_with for s in self.stages[1:-1]), default=0)

    @property
    def root_parameters(self) -> int:
        """Parameters outside the blocks."""
        return self.stages[0].parameters + self.stages[-1].parameters


@dataclass(frozen=True)
class Moment:
    """One point of a step at which memory may peak."""

    name: str
    activations: int
    workspace: int
    gradients: int
    """Bytes of the gradients this micro-batch has made so far, where it makes them."""
    finished: int
    """Parameters of the stages whose backward pass has begun."""
    backward: bool
    stage: int = 0
    """Which of the stages is at work."""
    made: int = 0
    """Bytes of the gradients that are of this stage alone, of `gradients`."""


def moments(stages: Sequence[ModelStage], costs: Sequence[Cost]) -> Iterator[Moment]:
    """The work of each stage of one micro-batch, forward then backward."""
    kept = gradients = finished = left = 0
    pairs = list(enumerate(zip(stages, costs, strict=True)))
    for i, (stage, cost) in pairs:
        yield Moment(f"forward of {stage.name}", kept, cost.forward, 0, 0, False, i)
        kept += cost.kept
    for i, (stage, cost) in reversed(pairs):
        kept -= cost.kept
        finished += stage.parameters
        made = gradients + cost.made_at_peak
        yield Moment(f"backward of {stage.name}", kept, cost.backward + left, made, finished, True, i,
                     cost.made_at_peak)
        gradients += cost.made
        left += cost.left


def overhead(hardware: Hardware, moving: int, kept: int = 0) -> int:
    """What the device holds that no tensor of the step accounts for.

    moving: bytes of tensors that come and go within a step; kept: of what a checkpoint holds. On a GPU: 1 GB of
    context, kernels and library workspaces, 1 GB of communication buffers where there are several devices, and
    allocator waste, 4% of what moves with expandable segments and 10% without (weights, gradients and optimizer state
    are allocated once and waste nothing). On a CPU: 0.5 GB of interpreter and libraries, the copy that is written as a
    checkpoint while training goes on, which elsewhere lies in the machine's memory, and 10% of it and of what moves.
    Margins, not measurements.
    """
    if hardware.device == "cpu":
        return int(0.5 * GB + kept + 0.1 * (kept + moving))
    waste = 0.04 if hardware.expandable_segments else 0.10
    return int(GB + (GB if hardware.devices > 1 else 0) + waste * moving)


@dataclass(frozen=True)
class Saving:
    """What checkpoints take."""

    checkpoint: int
    """Bytes of one on the disk: weights, buffers and optimizer state; and of the machines' memory, all of them
    together, while it is written."""
    most: int
    """How many are there at once, with the one that is being written; after an interruption its own, too."""
    weights: int
    """Bytes of the file of weights that the end leaves."""

    @property
    def disk(self) -> int:
        """Bytes of all that is there at once, in a run that is not interrupted."""
        return self.checkpoint * self.most + self.weights


def with_overhead(hardware: Hardware, moment: str, parts: dict[str, int], sent_per_step: int = 0,
                  sent_between_nodes: int | None = None) -> MemoryPlan:
    """A plan of tensors' bytes, and what the device holds beside them."""
    moving = sum(parts.get(name, 0) for name in ("activations", "workspace", "gathered", "buckets"))
    kept = parts.get("weights", 0) + parts.get("optimizer", 0)
    return MemoryPlan({**parts, "overhead": overhead(hardware, moving, kept)}, moment, sent_per_step,
                      sent_between_nodes)


def finish_plan(hardware: Hardware, candidates: Iterable[tuple[str, dict[str, int]]],
                sent_per_step: int = 0, sent_between_nodes: int | None = None) -> MemoryPlan:
    """The largest of (moment, parts) with its overhead."""
    return max((with_overhead(hardware, *c, sent_per_step, sent_between_nodes) for c in candidates),
               key=lambda plan: plan.total)
