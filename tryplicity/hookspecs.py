"""The hooks of a Tryplicity plugin: the whole contract. Loads no torch.

A plugin is a module with functions of these names, each marked `@tryplicity.hookimpl`. It is found through an
entry point of the group `tryplicity`, or given as `--plugin file.py`. Every argument is optional: take the ones
you need, by these names. Import torch inside the functions, so that `tryplicity --help` stays fast.

    from tryplicity import hookimpl

    @hookimpl
    def tryplicity_layers():
        from my_package.shift import Shift
        return [Shift]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    import click

    from tryplicity.named import NamedModel
    from tryplicity.parts import Component

hookspec = pluggy.HookspecMarker("tryplicity")
hookimpl = pluggy.HookimplMarker("tryplicity")


# --- what a plugin brings: asked once, when plugins are loaded ---

@hookspec
def tryplicity_layers() -> list[type[Component]]:
    """Classes of the families a model is built of: mixer, feed_forward, linear, norm, activation, router,
    residual, head.

        @hookimpl
        def tryplicity_layers():
            return [Shift]
    """


@hookspec
def tryplicity_brain_modules() -> list[type[Component]]:
    """Brain-inspired classes, of the family of the site they act at: activation, router, objective, brain.

        class Quiet(Objective):
            '''Small outputs of every block.'''
            name = "quiet"

            def block_loss(self, x_BTD, y_BTD, doc_ids_BT):
                return Report(losses={"quiet": self.factor * 1e-3 * y_BTD.square().mean((1, 2)).mean()})

        class Short(Brain):
            '''Rows of half the length in the first tenth of pretraining.'''
            name = "short"

            def stage(self, spent, context_length):
                return Stage("short", context_length // 2) if spent < 0.1 else Stage("long", context_length)

        @hookimpl
        def tryplicity_brain_modules():
            return [Quiet, Short]

    and in a spec: `brain: [quiet, short]`.
    """


@hookspec
def tryplicity_parallelism() -> list[type[Component]]:
    """Strategies that lay a model over devices.

        @hookimpl
        def tryplicity_parallelism():
            return [PipelineParallel]
    """


@hookspec
def tryplicity_components() -> list[type[Component]]:
    """Classes of every other family: optimizer, schedule, source, judge, retriever, architecture.

        @hookimpl
        def tryplicity_components():
            return [Lion, GutenbergSource]
    """


@hookspec
def tryplicity_models() -> list[NamedModel]:
    """Models by name, which `generate`, `serve`, `eval` and `export` take for a run: files that `tryplicity import`
    reads, where they are installed.

        @hookimpl
        def tryplicity_models():
            return [NamedModel("mine", "Mine-1B (MIT)", find=find_mine, install="pip install mine")]
    """


@hookspec
def tryplicity_commands() -> list[click.Command]:
    """Further commands of the `tryplicity` command line.

        @hookimpl
        def tryplicity_commands():
            return [my_click_command]
    """


@hookspec
def tryplicity_server_routes(app: object) -> None:
    """Add routes to the Sanic application before it starts.

        @hookimpl
        def tryplicity_server_routes(app):
            app.add_route(my_handler, "/my/page")
    """


# --- the life of a run: called by the training loop; a hook that raises is reported and training goes on ---

@hookspec
def tryplicity_run_started(run: Path, spec: object, model: object) -> None:
    """Training begins or goes on, in the folder `run`.

        @hookimpl
        def tryplicity_run_started(run):
            print("training in", run)
    """


@hookspec
def tryplicity_step_finished(run: Path, step: int, metrics: dict) -> None:
    """An optimizer step is done and logged; `metrics` is the object written to metrics.jsonl.

        @hookimpl
        def tryplicity_step_finished(step, metrics):
            my_dashboard.log(step, metrics["loss"])
    """


@hookspec
def tryplicity_slept(run: Path, step: int, report: dict) -> None:
    """The brain modules that sleep have slept, after `step` steps; `report` is what they said, as in metrics.jsonl.

        @hookimpl
        def tryplicity_slept(report):
            print("better by", report["bits_per_byte_before"] - report["bits_per_byte_after"])
    """


@hookspec
def tryplicity_checkpoint_saved(run: Path, step: int, checkpoint: Path) -> None:
    """A checkpoint is complete on disk.

        @hookimpl
        def tryplicity_checkpoint_saved(checkpoint):
            upload(checkpoint)
    """


@hookspec
def tryplicity_run_finished(run: Path, step: int, reason: str, scores: dict) -> None:
    """Training ended: reason is "budget", "interrupted" or "failed"; `scores` is what the whole held-out part gave,
    as in the last line of metrics.jsonl, and empty unless the budget is spent.

        @hookimpl
        def tryplicity_run_finished(reason):
            notify(reason)
    """


#: hooks that return component classes, and the families each may bring
COMPONENT_HOOKS: dict[str, tuple[str, ...]] = {
    "tryplicity_layers": ("mixer", "feed_forward", "linear", "norm", "activation", "router", "residual", "head"),
    "tryplicity_brain_modules": ("activation", "router", "inhibition", "objective", "brain"),
    "tryplicity_parallelism": ("parallelism",),
    "tryplicity_components": ("optimizer", "schedule", "source", "judge", "retriever", "architecture"),
}
