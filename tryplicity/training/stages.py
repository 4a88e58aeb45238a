"""Which stage of a phase comes when, and the rows it delivers."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tryplicity.components import Brain, Stage
from tryplicity.data import Mixture, Prepared
from tryplicity.errors import UserError, did_you_mean
from tryplicity.progress import Progress, no_progress
from tryplicity.promises import check_stage
from tryplicity.registry import Registry
from tryplicity.spec import Spec
from tryplicity.training.phases import PhasePlan

MOMENTS = 1000  # of a phase, at which its stages are looked for
NOTHING_TO_LEARN = ("there is nothing to learn here: no row of the training part has a word that the model is to "
                    "write; give other data")
MANY_TIMES = 4  # going over the same text more often than that is worth a warning


def brains_of(spec: Spec) -> dict[str, Brain]:
    """The modules of the spec's `brain` that act on a run, new."""
    return {part.name: part.build() for part in spec.brain if issubclass(part.component, Brain)}


class Stages:
    """The stages of a spec's phases on their data.

    All are found at once, so that one that cannot be does not end a run after hours. Raises UserError for a stage
    that no text is left for, or that names an objective there is none of.
    """

    def __init__(self, spec: Spec, brains: Mapping[str, Brain], data: Mapping[int, Prepared], registry: Registry,
                 seed: int, progress: Progress = no_progress) -> None:
        self.spec, self.brains, self.data, self.seed = spec, brains, data, seed
        self.plan = PhasePlan(spec.phases)
        #: (phase, stage, its share of the whole budget), in order
        self.found: list[tuple[int, Stage, float]] = []
        self._mixtures: dict[str, Mixture] = {}
        for phase, what in enumerate(spec.phases):
            if what.kind == "sleep":
                continue
            mask_N = data[phase].train.mask_N
            if mask_N is not None and not mask_N.any():
                raise UserError(f"phases[{phase}]: {NOTHING_TO_LEARN}")
            start, share = self.plan.starts[phase], self.plan.ends[phase] - self.plan.starts[phase]
            for moment in range(MOMENTS):
                stage = self.at(phase, start + share * moment / MOMENTS)
                if self.found and self.found[-1][:2] == (phase, stage):
                    self.found[-1] = (phase, stage, self.found[-1][2] + share / MOMENTS)
                    continue
                self.found.append((phase, stage, share / MOMENTS))
                self._check_factors(stage, registry)
                if stage.max_grade is not None:
                    data[phase].grades(progress)
                self.mixture(phase, stage)

    def at(self, phase: int, spent: float) -> Stage:
        """What the curriculum, if there is one, says of this moment of a phase. Of its last stage, a chat keeps the
        factors of objectives."""
        pretraining, context = self.spec.phases[phase].kind == "pretrain", self.spec.context_length
        within = self.plan.within(phase, spent) if pretraining else 1.0
        for brain in self.brains.values():
            if (stage := brain.stage(within, context)) is not None:
                check_stage(brain, stage, context)
                return stage if pretraining else Stage("", context, factors=stage.factors)
        return Stage("", context)

    def mixture(self, phase: int, stage: Stage) -> Mixture:
        """The rows of a stage."""
        key = json.dumps([phase, stage.max_grade, stage.mixture], sort_keys=True)
        if key not in self._mixtures:
            try:
                self._mixtures[key] = Mixture.graded(self.data[phase], self.seed, stage.mixture, stage.max_grade)
            except UserError as error:
                raise UserError(f"stage {stage.name}: {error}") from None
        return self._mixtures[key]

    def warnings(self, tokens: int | None) -> list[str]:
        """What a user should know before it begins. tokens: of the whole budget, where that is known."""
        said = []
        for phase, stage, share in self.found:
            mixture, label = self.mixture(phase, stage), f"stage {stage.name}: " if stage.name else ""
            said += [f"{label}{mixture.warning}"] if mixture.warning else []
            for domain, size in mixture.tokens().items():
                times = (tokens or 0) * share * mixture.shares.get(domain, 1.0) / size
                if stage.name and times > MANY_TIMES:
                    said.append(f"{label}it goes over its {size:,} tokens of {domain} {times:.0f} times")
        return said

    @staticmethod
    def _check_factors(stage: Stage, registry: Registry) -> None:
        objectives = registry.names("objective")
        for name in stage.factors:
            if name not in objectives:
                raise UserError(f"stage {stage.name}: factors: no objective is called {name!r}"
                                f"{did_you_mean(name, objectives)}")


def data_of_phases(spec: Spec, prepared: Prepared, given: Mapping[int, Prepared]) -> dict[int, Prepared]:
    """The data of each training phase by its number: what is given for it, or `prepared`."""
    data = {}
    for index, phase in enumerate(spec.phases):
        if phase.kind == "chat" and index not in given:
            raise UserError(f"phases[{index}]: a chat phase needs conversations; give it `data`")
        if phase.kind != "sleep":
            data[index] = given.get(index, prepared)
    return data
