"""The conformance kit: a component is asked for everything that its family owes, and what is broken is said in a line.

    from tryplicity.testing import check

    def test_it_keeps_its_promises():
        assert check(Shift, {"share": 0.3}) == []

pytest finds the fixture `conforms` by itself (`tryplicity.testing.fixtures`); `tryplicity plugins check` asks from
outside. Loads no torch before it is used. What each promise means: docs/plugins.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tryplicity.parts import Component

if TYPE_CHECKING:
    from tryplicity.testing.promises import Finding


def findings(component: type[Component], options: Mapping[str, Any] | None = None, *, plugins: Sequence[str] = (),
             ranks: bool = True) -> Iterator[Finding]:
    """What became of each promise of a component's family, with these options (small ones: the kit's hidden_size is
    32), or with each of its `trials`.

    plugins: files to load beside the installed plugins. ranks: also those promises for which several processes are
    started, which take seconds. Raises UserError for options that cannot be.
    """
    from tryplicity.testing import families, layers, model, training  # noqa: F401 - each adds its own
    from tryplicity.testing.promises import PROMISES, tried
    from tryplicity.testing.trial import Trial

    asked = [p for p in PROMISES if component.family in p.families and (ranks or not p.several_ranks)]
    for given in component.trials if options is None else [options]:
        trial = Trial(component, given, tuple(plugins))
        trial.spec, trial.part  # noqa: B018 - what is wrong with the options is no promise's fault
        yield from tried(trial, asked)


def check(component: type[Component], options: Mapping[str, Any] | None = None, *, plugins: Sequence[str] = (),
          ranks: bool = False) -> list[str]:
    """A line for each promise that the component breaks; as `findings`, by default in this process alone."""
    return [str(finding) for finding in findings(component, options, plugins=plugins, ranks=ranks)
            if finding.verdict == "broken"]


def check_layer(build: Any, hidden_size: int) -> list[str]:
    """The same of a mixer or feed-forward that a function makes, wherever it stands."""
    from tryplicity.testing import layers, training
    from tryplicity.testing.promises import PROMISES, tried
    from tryplicity.testing.trial import LayerTrial

    trial = LayerTrial(type("Layer", (Component,), {"family": "mixer", "name": "layer"}), {}, make=build,
                       size=hidden_size)
    asked = [p for p in PROMISES if p.trying.__module__ in (layers.__name__, training.__name__)
             and "mixer" in p.families and p.read not in ("packing", "compiling")]
    return [str(finding) for finding in tried(trial, asked) if finding.verdict == "broken"]


def together(size: int, work: Any, *arguments: Any, **more: Any) -> list[Any]:
    """What `work(world, *arguments)` gives on each of so many ranks on this machine: `tryplicity.testing.ranks`."""
    from tryplicity.testing.ranks import together

    return together(size, work, *arguments, **more)
