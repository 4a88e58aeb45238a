"""The judges of a recipe and their vote."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tryplicity.components import Judge, Verdict
from tryplicity.corpus.recipe import Recipe, Seat
from tryplicity.errors import UserError
from tryplicity.guard import broken, guarded

if TYPE_CHECKING:
    import torch

    from tryplicity.components import Document

BATCH = 64  # documents that a judge is asked about at once


class Vote(NamedTuple):
    """What came of a document."""

    kept: bool
    reason: str  # why not: the judge's name and its reason
    verdicts: dict[str, Verdict]  # of the judges that were asked, by name


@dataclass
class Panel:
    """The judges that could be loaded, the cheapest first."""

    recipe: Recipe
    judges: list[tuple[str, Judge, float | None]] = field(default_factory=list)  # name, judge, least score for a vote
    absent: dict[str, str] = field(default_factory=dict)  # who could not work, and why

    @classmethod
    def seated(cls, recipe: Recipe, device: torch.device, folder: Path | None = None,
               say: Callable[[str], None] = lambda text: None, floors: dict[str, float] | None = None) -> Panel:
        """Load the judges. folder: of the corpus, where `prepare_judges` was. floors: the least scores that `keep_top`
        came to. Raises UserError where fewer than the quorum can work."""
        panel = cls(recipe)
        for name, seat in named_seats(recipe):
            try:
                judge = loaded(name, seat, device, folder)
            except UserError as error:
                panel.absent[name] = str(error)
                continue
            floor = seat.keep_at if seat.keep_top is None else (floors or {}).get(name)
            panel.judges.append((name, judge, floor))
        quorum = recipe.quorum or len(recipe.judges)
        if len(panel.judges) < quorum:
            reasons = "; ".join(f"{name}: {why}" for name, why in panel.absent.items())
            raise UserError(f"{len(panel.judges)} of {len(recipe.judges)} judges can work, {quorum} must: {reasons}; "
                            "mend that, or allow fewer: --set quorum=N")
        for name, why in panel.absent.items():
            say(f"warning: goes on without the judge {name}: {why}")
        panel.judges.sort(key=lambda entry: entry[1].cost)
        return panel

    def vote(self, documents: Sequence[Document]) -> list[Vote]:
        """A vote for each document. A judge is asked about those whose vote is open alone; how many votes are needed
        shrinks in proportion with the judges that have an opinion."""
        verdicts: list[dict[str, Verdict]] = [{} for _ in documents]
        open_ = list(range(len(documents)))
        for place, (name, judge, floor) in enumerate(self.judges):
            for start in range(0, len(open_), BATCH):
                chosen = open_[start:start + BATCH]
                for number, verdict in zip(chosen, asked(judge, [documents[i] for i in chosen]), strict=True):
                    verdicts[number][name] = _with_floor(verdict, floor)
            left = len(self.judges) - place - 1
            open_ = [i for i in open_ if self._outcome(verdicts[i], left) is None]
        return [self._vote(each) for each in verdicts]

    def _outcome(self, verdicts: dict[str, Verdict], left: int) -> bool | None:
        """What the vote comes to; None while the judges that are left can still turn it."""
        said = [verdict.keep for verdict in verdicts.values() if verdict.keep is not None]
        ayes = said.count(True)
        share = self.recipe.needed() / max(1, len(self.recipe.judges))

        def kept(more_ayes: int, more_noes: int) -> bool:
            seats = len(said) + more_ayes + more_noes
            return seats == 0 or ayes + more_ayes >= math.ceil(share * seats - 1e-9)

        # the rest may each say yes, say no, or have no opinion: the outcome stands where no split of them changes it
        outcomes = {kept(y, n) for y in range(left + 1) for n in range(left + 1 - y)}
        return outcomes.pop() if len(outcomes) == 1 else None

    def _vote(self, verdicts: dict[str, Verdict]) -> Vote:
        kept = self._outcome(verdicts, 0)
        if kept is None or kept:
            return Vote(True, "", verdicts)
        name, first = next((n, v) for n, v in verdicts.items() if v.keep is False)
        return Vote(False, f"{name}: {first.reason or 'a low score'}", verdicts)


def named_seats(recipe: Recipe) -> list[tuple[str, Any]]:
    """Each seat with a name of its own: the judge's, numbered where several are of one kind."""
    names = [seat.judge.name for seat in recipe.judges]
    return [(name if names.count(name) == 1 else f"{name}-{names[:i + 1].count(name)}", seat)
            for i, (name, seat) in enumerate(zip(names, recipe.judges, strict=True))]


def prepare_judges(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
    """Let each judge make what it makes once for the corpus in `folder`. One that cannot is told of when it is to be
    loaded, where the quorum counts."""
    for name, seat in named_seats(recipe):
        judge = _built(name, seat, folder)
        try:
            with guarded(type(judge)):
                judge.prepare(lambda text, name=name: say(f"{name}: {text}"))
        except UserError as error:
            say(f"warning: the judge {name} cannot be prepared: {error}")


def loaded(name: str, seat: Seat, device: torch.device, folder: Path | None) -> Judge:
    """A judge that can be asked. Raises UserError where it cannot work."""
    judge = _built(name, seat, folder)
    with guarded(type(judge)):
        judge.load(device)
    return judge


def _built(name: str, seat: Seat, folder: Path | None) -> Judge:
    judge = seat.judge.build()
    judge.folder = folder and folder / "work" / "judges" / name
    return judge


def asked(judge: Judge, documents: Sequence[Document]) -> list[Verdict]:
    """What a judge says. Raises PluginFault naming one that fails, or that does not answer for each."""
    with guarded(type(judge)):
        verdicts = judge.judge(documents)
    if len(verdicts) != len(documents) or not all(isinstance(verdict, Verdict) for verdict in verdicts):
        raise broken(judge, f"judge gave {len(verdicts)} answers for {len(documents)} documents; a Verdict for each is "
                            "wanted")
    return list(verdicts)


def _with_floor(verdict: Verdict, floor: float | None) -> Verdict:
    if floor is None or math.isnan(verdict.score):
        return verdict
    return verdict._replace(keep=verdict.score >= floor, reason="" if verdict.score >= floor else
                            verdict.reason or f"a score under {floor:.4g}")
