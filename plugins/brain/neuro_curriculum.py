"""A curriculum of stages, as a child's reading grows: short and easy texts first, then longer and harder ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated

from pydantic import Field

from tryplicity import Brain, Positive, Share, Stage, Steps, Weight

DOMAINS = ("text", "code", "math")
CLOSE = 1e-6    # shares written in decimals need not sum to 1 more exactly than this


@dataclass(frozen=True)
class StageConfig:
    name: Annotated[str, Field(min_length=1)]
    """What the stage is called in the log."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Of the pretraining phase's budget; the stages' sum is 1."""
    context: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Length of the sequences, as a share of the spec's context_length, in whole tokens."""
    max_grade: Annotated[float | None, Field(ge=0.1, le=100)] = None
    """Only documents that read no harder than this school grade; none: any, those without a grade too."""
    mixture: dict[str, Share] | None = None
    """Share of the rows by domain (text, code, math), in sum 1; none: as the corpus is."""
    learning_rate_factor: Positive = 1.0
    """Multiplies the schedule's learning rate."""
    tokens_per_step: Steps | None = None
    """Tokens of one optimizer step; none: what the hardware profile gives."""
    factors: dict[str, Weight] = field(default_factory=dict)
    """Multiplies the weight of objectives, by name, such as {hebbian_loss: 0.5}."""


def _stage(name, share, context, max_grade, mixture, learning_rate_factor, hebbian) -> StageConfig:
    return StageConfig(name, share, context, max_grade, dict(zip(DOMAINS, mixture, strict=True)),
                       learning_rate_factor, factors={"hebbian_loss": hebbian})


# Each stage is longer than the one before. Easy text is scarce, and what the model is measured on has the full
# length and any grade, so the stages that hold something back get 3 tenths of the budget and the last the most.
STAGES = (
    _stage("infancy", 0.1, 1 / 8, 6.0, (0.90, 0.10, 0.00), 0.5, 1.0),
    _stage("childhood", 0.2, 1 / 2, 10.0, (0.75, 0.15, 0.10), 1.0, 0.5),
    _stage("adolescence", 0.3, 1.0, None, (0.65, 0.20, 0.15), 1.0, 0.2),
    _stage("mastery", 0.4, 1.0, None, (0.50, 0.25, 0.25), 0.7, 0.1),
)


class NeuroCurriculum(Brain):
    """Stages of pretraining by the share of its budget that is spent (curriculum learning: Bengio et al., "Curriculum
    learning", ICML 2009).

    Each stage says how long the sequences are, how hard the documents may read, how the domains are mixed, and the
    factors of learning rate and objectives. Which stage it is depends on nothing but the budget, so a run that
    resumes goes on in the same one.
    """

    name = "neuro_curriculum"

    @dataclass(frozen=True)
    class Config:
        stages: tuple[StageConfig, ...] = STAGES
        """The stages, in order; by default infancy, childhood, adolescence and mastery."""

    @classmethod
    def check(cls, config, site):
        whole = sum(stage.share for stage in config.stages)
        if not config.stages:
            yield "stages", "there are no stages; name at least one, or leave the option out"
        elif abs(whole - 1) > CLOSE:
            yield "stages", f"the shares of the stages sum to {whole:g}; they must sum to 1"
        names = [stage.name for stage in config.stages]
        for i, stage in enumerate(config.stages):
            if stage.name in names[:i]:
                yield f"stages.{i}.name", f"{stage.name} is a stage already; give this one another name"
            if round(stage.context * site.context_length) < 2:
                yield f"stages.{i}.context", (
                    f"{stage.context:g} of context_length {site.context_length} is not even 2 tokens; "
                    f"{2 / site.context_length:.3g} is")
            yield from _mixture_faults(f"stages.{i}.mixture", stage.mixture)

    def __init__(self, config) -> None:
        self.config = config
        self._ends = list(accumulate(stage.share for stage in config.stages))

    def stage(self, spent: float, context_length: int) -> Stage:
        """A stage begins at exactly the sum of the shares before it; the last one never ends."""
        # shares such as 0.1 + 0.2 are a rounding off what they mean
        number = sum(spent >= end - 1e-9 for end in self._ends[:-1])
        stage = self.config.stages[number]
        return Stage(name=stage.name, context_length=round(stage.context * context_length),
                     learning_rate_factor=stage.learning_rate_factor, tokens_per_step=stage.tokens_per_step,
                     mixture=stage.mixture, max_grade=stage.max_grade, factors=stage.factors)


def _mixture_faults(path: str, mixture: Mapping[str, float] | None):
    if mixture is None:
        return
    unknown = [domain for domain in mixture if domain not in DOMAINS]
    for domain in unknown:
        yield f"{path}.{domain}", f"no domain is called {domain}; there are: {', '.join(DOMAINS)}"
    whole = sum(mixture.values())
    if not unknown and abs(whole - 1) > CLOSE:
        yield path, f"the shares of the domains sum to {whole:g}; they must sum to 1"
