"""The training loop: prepare, step, log, validate, save, and stop cleanly whatever happens."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tryplicity.builder import Build
from tryplicity.data import Prepared
from tryplicity.errors import Refused, UserError
from tryplicity.model import NEXT_TOKEN, Model, assemble
from tryplicity.plugins import Plugins
from tryplicity.run import Run
from tryplicity.training import checkpoint
from tryplicity.training.checkpoint import Progress
from tryplicity.training.evaluate import bits_per_byte
from tryplicity.training.metrics import MetricsFile
from tryplicity.training.process import StopSignals
from tryplicity.training.step import StepResult, decay_groups, is_finite, on_device, training_step


@dataclass(frozen=True)
class Budget:
    """When training ends; exactly one is given."""

    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None

    def spent(self, progress: Progress) -> float:
        """The share of the budget that is spent, 0 to 1 and beyond."""
        if self.steps is not None:
            return progress.step / self.steps
        if self.tokens is not None:
            return progress.tokens / self.tokens
        return progress.seconds / (60 * self.minutes)

    def seconds_left(self, progress: Progress, seconds_per_step: float, tokens_per_step: int) -> float:
        if self.steps is not None:
            return (self.steps - progress.step) * seconds_per_step
        if self.tokens is not None:
            return (self.tokens - progress.tokens) / tokens_per_step * seconds_per_step
        return 60 * self.minutes - progress.seconds


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    reason: str  # "budget" or "interrupted"
    progress: Progress
    bits_per_byte: float | None  # held-out, at the end
    signal: int | None = None


class Watcher:
    """Is told how a training goes on; this one keeps it to itself."""

    def step(self, progress: Progress, metrics: dict[str, Any], spent: float, seconds_left: float) -> None:
        """A step is done; spent: the share of the budget."""

    def scoring(self, share: float) -> None:
        """At the end, so much of the held-out part is scored."""


def train(build: Build, prepared: Prepared, run: Run, budget: Budget, plugins: Plugins, *, resume: bool = False,
          watcher: Watcher | None = None) -> Outcome:
    """Train a built spec on prepared data into a run folder.

    Raises UserError when the folder's checkpoints belong to another spec or other data, and Refused when the loss
    is not a number for several steps, or the last checkpoint cannot be written.
    """
    watcher = watcher or Watcher()
    spec, hardware, training = build.spec, build.hardware, build.spec.training
    device = torch.device(hardware.torch_device)
    strategy, schedule = build.strategy, training.schedule.build()
    rows, context = hardware.sequences_per_step(), spec.context_length

    model: Model = strategy.place(assemble(spec), device, training.seed)
    model.activation_checkpointing = hardware.activation_checkpointing
    optimizer = training.optimizer.build().build(*decay_groups(model))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]

    progress = Progress(identity=spec.identity(), data=prepared.identity, seed=training.seed)
    if resume:
        newest = checkpoint.newest(run.checkpoints)
        if newest is not None:
            _check_belongs(newest, progress)
            progress = checkpoint.load(newest, model, optimizer)

    metrics_file = MetricsFile(run.metrics, progress.step)
    plugins.call("tryplicity_run_started", run=run.folder, spec=spec, model=model)
    stream, heldout = prepared.stream(training.seed), _HeldOut(model, prepared, hardware, context)
    bad_steps, saved_step = 0, progress.step
    model.train()

    with StopSignals() as signals:
        while budget.spent(progress) < 1 and signals.received is None:
            started = time.perf_counter()
            batch = on_device(stream.batch(progress.position, rows, context), device)
            factor = schedule.factor(budget.spent(progress), progress.step)
            result = training_step(model, optimizer, strategy, batch, step=progress.step, micro_batch=hardware.batch,
                                   precision=hardware.precision, max_norm=training.gradient_clip,
                                   learning_rate_factor=factor)
            position, good = progress.position, is_finite(result)
            seconds = time.perf_counter() - started
            progress.step += 1
            progress.tokens += rows * context
            progress.position += rows * context
            progress.seconds += seconds

            metrics = _metrics(model, result, progress, optimizer, seconds, rows * context)
            if budget.spent(progress) < 1 and progress.step % training.validate_every == 0:
                metrics["validation_bits_per_byte"] = heldout.score(training.validation_rows, signals.requested)
            metrics_file.write(metrics)
            plugins.call("tryplicity_step_finished", run=run.folder, step=progress.step, metrics=metrics)
            left = budget.seconds_left(progress, progress.seconds / progress.step, rows * context)
            watcher.step(progress, metrics, min(1.0, budget.spent(progress)), max(0.0, left))

            bad_steps = 0 if good else bad_steps + 1
            if not good:
                print(f"warning: step {progress.step}: the loss is not a number; it changed nothing "
                      f"(tokens {position} to {progress.position - 1})", file=sys.stderr)
            if bad_steps >= training.bad_steps:
                metrics_file.close()
                plugins.call("tryplicity_run_finished", run=run.folder, step=progress.step, reason="failed")
                raise Refused(_bad_loss(bad_steps, stream, position, rows, context, run, saved_step))
            if good and progress.step % training.checkpoint_every == 0:
                saved_step = _save(run, model, optimizer, progress, training.keep_checkpoints, plugins) or saved_step

        # still inside: a second SIGTERM, or a Ctrl-C just now, must not cut this short
        healthy = bad_steps == 0 or all(bool(p.isfinite().all()) for p in model.parameters())
        if (healthy and progress.step > saved_step) or not checkpoint.steps(run.checkpoints):
            _save(run, model, optimizer, progress, training.keep_checkpoints, plugins, last=True)
        interrupted = signals.received is not None

    score = None
    if not interrupted:
        try:
            checkpoint.save_weights(model, run.weights)
        except checkpoint.WRITE_ERRORS as error:
            raise Refused(f"{run.weights}: could not be written: {error}; the checkpoint is complete: free some "
                          "room and run the same command with --resume") from None
        score = heldout.score(scoring=watcher.scoring)
        metrics_file.write({"step": progress.step, "tokens": progress.tokens, "validation_bits_per_byte": score})
    metrics_file.close()
    reason = "interrupted" if interrupted else "budget"
    plugins.call("tryplicity_run_finished", run=run.folder, step=progress.step, reason=reason)
    return Outcome(reason, progress, score, signals.received)


class _HeldOut:
    """Scores the model on the held-out part."""

    def __init__(self, model: Model, prepared: Prepared, hardware: Any, context: int) -> None:
        self.model, self.part, self.hardware, self.context = model, prepared.held_out(), hardware, context

    def score(self, max_rows: int | None = None, stopping: Callable[[], bool] = lambda: False,
              scoring: Callable[[float], None] = lambda share: None) -> float:
        batches = self.part.batches(self.hardware.batch, self.context, max_rows)
        total = -(-min(max_rows or sys.maxsize, self.part.rows(self.context)) // self.hardware.batch)
        return bits_per_byte(self.model, batches, precision=self.hardware.precision, stopping=stopping,
                             progress=lambda done: scoring(done / total))


def _metrics(model: Model, result: StepResult, progress: Progress, optimizer: Any, seconds: float,
             tokens: int) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    objectives = {name: float(mean.value) for name, mean in result.objectives.items()}
    auxiliary = {f"{name}_loss": float(value) for name, value in result.auxiliary.items()}
    weights = model.weights()
    total = sum(weights[name] * value for name, value in objectives.items()) + sum(auxiliary.values())
    return {"step": progress.step, "tokens": progress.tokens, "loss": objectives[NEXT_TOKEN], "total_loss": total,
            **{name: value for name, value in objectives.items() if name != NEXT_TOKEN}, **auxiliary,
            "learning_rate": optimizer.param_groups[0]["lr"], "gradient_norm": float(result.gradient_norm),
            "tokens_per_second": tokens / seconds, "seconds": progress.seconds, **model.metrics(result.stats)}


def _save(run: Run, model: Model, optimizer: Any, progress: Progress, keep: int, plugins: Plugins,
          last: bool = False) -> int | None:
    """Save a checkpoint. A disk that is full costs this checkpoint, not the run, unless it is the last one."""
    try:
        saved = checkpoint.save(run.checkpoints, model, optimizer, progress, keep)
    except checkpoint.WRITE_ERRORS as error:
        what = f"step {progress.step}: the checkpoint could not be written ({' '.join(str(error).split())})"
        older = checkpoint.steps(run.checkpoints)
        kept = f"the newest complete one is step {older[-1]}" if older else "there is no older one"
        if last:
            raise Refused(f"{what}; {kept}; free some room on the disk and go on with --resume") from None
        print(f"warning: {what}; {kept}; training goes on", file=sys.stderr)
        return None
    plugins.call("tryplicity_checkpoint_saved", run=run.folder, step=progress.step, checkpoint=saved)
    return progress.step


def _check_belongs(saved: Path, progress: Progress) -> None:
    """Raises UserError when a checkpoint is of another architecture, other data or another seed."""
    theirs = checkpoint.read_progress(saved)
    for what, key in (("spec (its layers or sizes differ)", "identity"), ("data set", "data"), ("seed", "seed")):
        if getattr(theirs, key) != getattr(progress, key):
            raise UserError(f"{saved}: belongs to another {what}; give the one it was begun with, or another --run")


def _bad_loss(bad: int, stream: Any, position: int, rows: int, context: int, run: Run, saved: int) -> str:
    kept = f"the last good checkpoint is step {saved}" if checkpoint.steps(run.checkpoints) else "nothing was saved yet"
    return (f"the loss was not a number {bad} steps in a row, lastly on tokens {position} to "
            f"{position + rows * context - 1} ({stream.describe(position, rows, context)}); training stopped; {kept}. "
            "Lower training.optimizer.learning_rate, or look at that text")
