"""What each module costs in step time: the same spec with it and without it, in turn, as a Markdown table.

    python -m tests.benchmarks.brain_cost [MODULE ...] [--spec tiny | 5090-block] [--pairs N] [--steps N]

Both sides live in one process and train on the same rows, a burst of steps each in turn, so that a drift in the
machine's speed meets both alike; who goes first changes with every pair. A step is the training loop's own, with all
that a module does in it: losses, statistics, what a sleeping module remembers of each document, the curriculum's
question which stage it is (asked at the last stage, whose sequences are as long as without a curriculum). Sleeping
itself and what a stage changes in the work are not a cost of the step. A module that the spec has not is added with its
defaults first. 5090-block is one memory and one attention block of the 5090 spec, with a small vocabulary and short
sequences: what happens once per model (the heads) or once per step (the optimizer, the rounding of weights) has a
larger share there than in training.

The first row is the spec against itself: what is less than its spread is not known.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import tempfile
from pathlib import Path
from typing import Any

MODULES = ("spike", "dynamic_sparsity", "lateral_inhibition", "hebbian_loss", "predictive_coding",
           "sleep_consolidation", "neuro_curriculum", "hyper_connections", "multi_token_prediction", "bitlinear")
#: spec, what is changed in it, the profile's batch, the steps of a burst and the pairs of bursts
SPECS: dict[str, tuple[str, dict[str, Any], int, int, int]] = {
    "tiny": ("tiny", {}, 4, 5, 12),
    "5090-block": ("5090", {"layers": ["memory", "attention"], "vocab_size": 4096, "context_length": 256}, 4, 1, 6),
}
WARM = 2  # bursts of each side that are not counted
SPENT = 0.99  # of the budget: the last stage of a curriculum


def spec_data(name: str) -> dict[str, Any]:
    """The YAML data of a spec of the table above, its only phase pretraining."""
    from tryplicity.spec import find_file
    from tryplicity.spec.loader import read_yaml

    source, changes, *_ = SPECS[name]
    data = read_yaml(find_file(source, "spec")).data | changes
    return {key: value for key, value in data.items() if key not in ("phases", "expect")}


def added(data: dict[str, Any], module: str, registry: Any) -> dict[str, Any]:
    """The data with a module that it has not: an activation or router in every mixture of experts, or an entry of
    `brain`."""
    data = copy.deepcopy(data)
    family = next(c.family for c in registry.components() if c.name == module)
    if family in ("objective", "brain"):
        data["brain"] = [*data.get("brain", []), {"type": module}]
        return data
    for block in data["blocks"].values():
        k = block["feed_forward"].get("top_k", 2)
        options = {"dynamic_sparsity": {"min_experts": max(k // 2, 1), "max_experts": k + k // 2, "mean_experts": k}}
        block["feed_forward"][family] = {"type": module, **options.get(module, {})}
    return data


def sides(name: str, module: str | None, registry: Any) -> list[dict[str, Any]]:
    """The data with the module and without it; for None, the same twice."""
    from tryplicity.ablation.modules import component_names, types_in, without

    data, named = spec_data(name), component_names(registry)
    if module is None:
        return [data, data]
    if module not in set(types_in(data, named)):
        data = added(data, module, registry)
    return [data, without(data, [module], named)]


class Side:
    """A spec in training."""

    def __init__(self, data: dict[str, Any], batch: int, folder: Path, prepared: Any, plugins: Any) -> None:
        from tryplicity.builder import build
        from tryplicity.run import Run
        from tryplicity.spec.loader import dump_yaml
        from tryplicity.training.session import Session

        path = folder / "spec.yaml"
        path.write_text(dump_yaml(data))
        built = build(str(path), "cpu", plugins.registry, [f"hardware.batch={batch}", "hardware.memory_gb=512"])
        self.session = Session(built, {0: prepared}, Run(folder), plugins, resume=False)

    def burst(self, steps: int) -> float:
        """Seconds per thousand tokens over so many steps."""
        stepped = [self.session.step(0, SPENT) for _ in range(steps)]
        assert all(s.good for s in stepped), "the loss is not a number"
        return 1e3 * sum(s.seconds for s in stepped) / sum(s.tokens for s in stepped)


def compare(name: str, module: str | None, pairs: int, steps: int, prepared: Any, plugins: Any) -> tuple[list, list]:
    """Seconds per thousand tokens with and without, pair by pair."""
    with tempfile.TemporaryDirectory() as folder:
        both = [Side(data, SPECS[name][2], Path(folder), prepared, plugins)
                for data in sides(name, module, plugins.registry)]
        for _ in range(WARM):
            for side in both:
                side.burst(1)
        times: tuple[list[float], list[float]] = ([], [])
        for pair in range(pairs):
            for which in (0, 1) if pair % 2 == 0 else (1, 0):
                times[which].append(both[which].burst(steps))
    return times


def row(module: str, with_it: list[float], without_it: list[float]) -> str:
    ratios = sorted(a / b - 1 for a, b in zip(with_it, without_it, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return (f"| {module} | {1e3 / statistics.median(with_it):,.0f} | {1e3 / statistics.median(without_it):,.0f} "
            f"| {middle:+.1%} | {low:+.1%} to {high:+.1%} | {sum(with_it) / sum(without_it) - 1:+.1%} |")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What each module costs in step time.")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of: {', '.join(MODULES)}")
    parser.add_argument("--spec", choices=list(SPECS), default="tiny")
    parser.add_argument("--pairs", type=int, help="bursts of each side (12 on tiny, 6 on 5090-block)")
    parser.add_argument("--steps", type=int, help="steps of a burst (5 on tiny, 1 on 5090-block)")
    given = parser.parse_args(arguments)
    if unknown := set(given.modules) - set(MODULES):
        parser.error(f"no such module: {', '.join(sorted(unknown))}")

    from tryplicity.training.process import polite_threads, tune_malloc

    polite_threads()
    tune_malloc()
    from tryplicity import load_plugins
    from tryplicity.data import parse_source, prepare

    plugins, (_, _, batch, steps, pairs) = load_plugins(), SPECS[given.spec]
    steps, pairs = given.steps or steps, given.pairs or pairs
    data = spec_data(given.spec)
    prepared = prepare(parse_source(plugins.registry, "python-docs"), data["vocab_size"])
    print(f"{given.spec}: {pairs} pairs of bursts of {steps} step{'s' * (steps > 1)}, "
          f"{batch} x {data['context_length']} tokens a step\n")
    print("| module | tokens/s with | without | step time: median | middle half of the pairs | of all together |")
    print("|---|---|---|---|---|---|", flush=True)
    for module in (None, *(given.modules or MODULES)):
        times = compare(given.spec, module, pairs, steps, prepared, plugins)
        print(row(module or "(the spec twice)", *times), flush=True)
        gc.collect()
    print(flush=True)


if __name__ == "__main__":
    main()
