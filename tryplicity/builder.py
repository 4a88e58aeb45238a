"""spec + hardware -> Build: validate, assemble on meta, plan, choose a strategy. Nothing is bought or trained yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tryplicity.components import Source
from tryplicity.configs import Problem
from tryplicity.errors import UserError
from tryplicity.guard import guarded
from tryplicity.hardware import Hardware, load_hardware
from tryplicity.model import Model, assemble
from tryplicity.parts import Part
from tryplicity.planner import Plan, plan
from tryplicity.promises import check_promises
from tryplicity.registry import Registry
from tryplicity.spec import Spec, find_file, load_spec, source_value

MOST_TOKENS = 2**24  # in one forward pass: far beyond any device


@dataclass(frozen=True)
class Build:
    """A spec on a machine, checked and planned."""

    spec: Spec
    hardware: Hardware
    model: Model  # on the meta device
    plan: Plan
    registry: Registry
    data: dict[int, Part] = field(default_factory=dict)  # the source of each phase that names one, by its number

    @property
    def strategy(self) -> Any:
        """The chosen strategy, ready to place a model; only when the plan fits."""
        return self.registry.part("parallelism", self.hardware.options_of(self.plan.chosen.name)).build()


def build(spec: str, hardware: str, registry: Registry, settings: Sequence[str] = ()) -> Build:
    """Read and check both files, assemble the model without memory, and plan it.

    spec, hardware: paths, or names of the installed ones. settings: `path=value` for the spec, or
    `hardware.path=value` for the profile. Raises UserError with every problem found.
    """
    own = [s for s in settings if not s.startswith("hardware.")]
    profile = load_hardware(hardware, registry, [s.removeprefix("hardware.") for s in settings if s not in own])
    loaded = load_spec(str(find_file(spec, "spec")), registry, own)
    if (tokens := profile.batch * loaded.context_length) > MOST_TOKENS:
        raise UserError(f"batch {profile.batch:,} x context_length {loaded.context_length:,}: {tokens:,} tokens in one "
                        f"forward pass of a device; at most {MOST_TOKENS:,}: lower one of them, and raise accumulation")
    data = sources_of_phases(loaded, registry)
    with guarded():
        model = assemble(loaded)
        planned = plan(model, profile, registry)
        check_promises(model, loaded)
    check_expectations(loaded, planned)
    return Build(loaded, profile, model, planned, registry, data)


def sources_of_phases(spec: Spec, registry: Registry) -> dict[int, Part]:
    """What each phase learns from, where it says so. Paths count from the spec's file; they stand absolute in it from
    now on, so that its copy in a run folder means the same. Raises UserError for data that nobody reads."""
    found, problems = {}, []
    for i, phase in enumerate(spec.phases):
        if phase.data is None:
            continue
        here = ("phases", i, "data")
        try:
            value = source_value(registry, phase.data, "", spec.source.folder)
        except UserError as error:
            problems.append(Problem(here, str(error).strip()))
            continue
        part = registry.resolve_part("source", value, here, problems)
        if part is None:
            continue
        found[i], spec.source.data["phases"][i]["data"] = part, value
        if phase.kind == "chat" and part.component.conversations is Source.conversations:
            problems.append(Problem(here, f"{part.name} holds documents, not conversations; a chat phase learns from "
                                          "conversations"))
    if problems:
        raise spec.source.error(problems)
    return found


def check_expectations(spec: Spec, planned: Plan) -> None:
    """Raises UserError when the model did not come out as the spec's `expect` says."""
    if spec.expect is None:
        return
    problems = []
    for key, actual in (("total_parameters", planned.counts.total), ("active_parameters", planned.counts.active)):
        wanted = getattr(spec.expect, key)
        if wanted is not None and abs(actual - wanted) > spec.expect.within * wanted:
            problems.append(Problem(("expect", key), (
                f"the model has {actual:,.0f} {key.replace('_', ' ')}, {actual / wanted - 1:+.1%} from the expected "
                f"{wanted:,.0f} and more than the allowed {spec.expect.within:.0%}; mend one of them")))
    if problems:
        raise spec.source.error(problems)
