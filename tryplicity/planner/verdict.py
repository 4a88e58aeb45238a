"""What `build --simulate` says: the step that was asked for, simulated, and the fastest of its neighbours that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tryplicity.planner.memory import GB, MemoryPlan
from tryplicity.planner.neighbours import Neighbour, neighbours
from tryplicity.planner.simulate import Question, Simulated, Simulation

if TYPE_CHECKING:
    from tryplicity.model import Model
    from tryplicity.planner import Plan
    from tryplicity.registry import Registry

TRIED = 3  # neighbours that are simulated on the way to one that fits


@dataclass(frozen=True)
class Verdict:
    planned: MemoryPlan
    simulated: Simulated
    asked: Neighbour
    fastest: Neighbour | None
    """Of those that fit, as far as they were simulated; None where none does."""
    tried: list[tuple[Neighbour, Simulated]]
    """Neighbours that were simulated, the asked-for first."""
    others: list[Neighbour]
    """The rest, the fastest that fit first, by the closed form alone."""

    @property
    def fits(self) -> bool:
        return self.simulated.memory.fits(self.asked.hardware.memory_bytes)

    def as_dict(self) -> dict[str, Any]:
        """Further keys of the object that `build --json` prints."""
        budget = self.asked.hardware.memory_bytes
        tried = [{**n.as_dict(), "simulated_gb": s.memory.total / GB, "fits": s.memory.fits(budget)}
                 for n, s in self.tried]
        return {"fits": self.fits, "simulated": self.simulated.as_dict(self.planned),
                "neighbours": [*tried, *({**n.as_dict(), "simulated_gb": None} for n in self.others)],
                "fastest": None if self.fastest is None else self.fastest.settings()}


def judge(model: Model, planned: Plan, registry: Registry, question: Question) -> Verdict:
    """Simulates what was planned, and beside it, from the fastest on, its neighbours until one fits.

    question: as the user asked; its strategy is the plan's.
    """
    simulation = Simulation(question, planned.hardware)
    try:
        around = neighbours(model, planned, registry)
        asked = next(n for n in around if (n.hardware, n.strategy) == (planned.hardware, planned.nearest.name))
        faster = around[:around.index(asked)] if asked.fits else [n for n in around if n.fits]
        found: dict[int, Simulated] = {}
        fastest = None
        for n in [n for n in faster if n.fits][:TRIED]:
            found[id(n)] = simulated = Simulation(_instead(question, n), n.hardware).answer()
            if simulated.memory.fits(n.hardware.memory_bytes):
                fastest = n
                break
        simulated = simulation.answer()
    finally:
        simulation.stop()
    if fastest is None and simulated.memory.fits(planned.hardware.memory_bytes):
        fastest = asked
    found[id(asked)] = simulated
    tried = [(n, found[id(n)]) for n in (asked, *faster) if id(n) in found]
    return Verdict(planned.nearest.memory, simulated, asked, fastest, tried,
                   [n for n in around if id(n) not in found])


def _instead(question: Question, n: Neighbour) -> Question:
    settings = [f"hardware.{name}={str(value).lower()}" for name, value in n.settings().items()]
    return replace(question, settings=(*question.settings, *settings), strategy=n.strategy)


def question_of(spec: str, hardware: str, settings: Sequence[str], plugins: Sequence[str], planned: Plan) -> Question:
    return Question(spec, hardware, tuple(settings), tuple(plugins), planned.nearest.name)
