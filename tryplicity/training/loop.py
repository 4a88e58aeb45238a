"""The training loop: step, sleep, log, validate, save, and stop cleanly whatever happens."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tryplicity.builder import Build
from tryplicity.data import Prepared
from tryplicity.errors import Refused
from tryplicity.guard import guarded
from tryplicity.model import NEXT_TOKEN
from tryplicity.plugins import Plugins
from tryplicity.run import Run
from tryplicity.training import checkpoint
from tryplicity.training.checkpoint import Progress
from tryplicity.training.metrics import MetricsFile
from tryplicity.training.process import StopSignals
from tryplicity.training.session import Session, Stepped
from tryplicity.training.stages import data_of_phases


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
    chat_bits_per_byte: float | None = None  # of the assistant's part of held-out conversations, if there was a chat


class Watcher:
    """Is told how a training goes on; this one keeps it to itself."""

    def step(self, progress: Progress, metrics: dict[str, Any], spent: float, seconds_left: float) -> None:
        """A step is done; spent: the share of the budget."""

    def note(self, text: str) -> None:
        """Something of interest happened: another stage, a sleep."""

    def scoring(self, share: float) -> None:
        """At the end, so much of the held-out part is scored."""


@guarded()
def train(build: Build, prepared: Prepared, run: Run, budget: Budget, plugins: Plugins, *,
          phase_data: Mapping[int, Prepared] | None = None, resume: bool = False,
          other_data: bool = False, watcher: Watcher | None = None) -> Outcome:
    """Train a built spec on prepared data into a run folder.

    phase_data: the data of phases, by their number, that have data of their own; a chat phase needs conversations.
    other_data: a run that is resumed may go on with other data than it was begun with.
    Raises UserError when the folder's checkpoints belong to another spec or other data, and Refused when the loss
    is not a number for several steps, or the last checkpoint cannot be written.
    """
    watcher, training = watcher or Watcher(), build.spec.training
    data = data_of_phases(build.spec, prepared, phase_data or {})
    session = Session(build, data, run, plugins, resume=resume, other_data=other_data)
    progress = session.progress
    metrics_file = MetricsFile(run.metrics, progress.step, progress.slept_at)
    plugins.call("tryplicity_run_started", run=run.folder, spec=build.spec, model=session.model)
    bad_steps, announced, half_asleep = 0, None, False

    with StopSignals() as signals:
        while signals.received is None:
            phase = session.plan.at(budget.spent(progress), progress.sleeps)
            if phase is None:
                break
            if session.just_slept(phase):
                progress.sleeps += 1  # the phase's sleep is the one that was due at this step anyway
                continue
            if session.wants_sleep(phase):
                said = session.sleep(phase, budget.spent(progress), signals.requested)
                half_asleep = said is None
                if said is not None:
                    metrics_file.write({"step": progress.step, "tokens": progress.tokens, "sleep": said})
                    plugins.call("tryplicity_slept", run=run.folder, step=progress.step, report=said)
                    watcher.note(_in_words("slept", said))
                continue

            stepped = session.step(phase, budget.spent(progress))
            here = (build.spec.phases[phase].kind, stepped.stage.name)
            if here != announced and (len(build.spec.phases) > 1 or stepped.stage.name):
                watcher.note(f"{' '.join(filter(None, here))}: {stepped.stage.context_length} tokens a row")
            announced = here
            metrics = _metrics(session, stepped, here[0])
            due = progress.step % training.validate_every == 0 or (here[0] == "chat" and progress.phase_step == 1)
            if budget.spent(progress) < 1 and due:
                metrics[_score_name(here[0])] = session.score(session.data[phase], training.validation_rows,
                                                              signals.requested)
            metrics_file.write(metrics)
            plugins.call("tryplicity_step_finished", run=run.folder, step=progress.step, metrics=metrics)
            left = budget.seconds_left(progress, progress.seconds / progress.step, stepped.tokens)
            watcher.step(progress, metrics, min(1.0, budget.spent(progress)), max(0.0, left))

            bad_steps = 0 if stepped.good else bad_steps + 1
            if not stepped.good:
                print(f"warning: step {progress.step}: the loss is not a number; it changed nothing "
                      f"(tokens {progress.tokens - stepped.tokens} to {progress.tokens - 1})", file=sys.stderr)
            if bad_steps >= training.bad_steps:
                metrics_file.close()
                plugins.call("tryplicity_run_finished", run=run.folder, step=progress.step, reason="failed")
                raise Refused(_bad_loss(bad_steps, session, stepped, phase))
            if stepped.good and progress.step % training.checkpoint_every == 0:
                session.save()

        # still inside: a second SIGTERM, or a Ctrl-C just now, must not cut this short
        interrupted = signals.received is not None
        # a sleep is slept again by a run that resumes before it; at the end of the budget it is part of the result
        unsaved = progress.step > session.saved_step or (not interrupted and progress.slept_at == progress.step)
        if unsaved and not half_asleep and (bad_steps == 0 or session.healthy()):
            session.save(last=True)

    scores: dict[str, float] = {}
    if not interrupted:
        try:
            checkpoint.save_weights(session.model, run.weights)
        except checkpoint.WRITE_ERRORS as error:
            raise Refused(f"{run.weights}: could not be written: {error}; the checkpoint is complete: free some "
                          "room and run the same command with --resume") from None
        for kind in dict.fromkeys(p.kind for p in build.spec.phases if p.kind != "sleep"):
            last = max(i for i, p in enumerate(build.spec.phases) if p.kind == kind)
            scores[_score_name(kind)] = session.score(session.data[last], scoring=watcher.scoring)
        metrics_file.write({"step": progress.step, "tokens": progress.tokens, **scores})
    metrics_file.close()
    reason = "interrupted" if interrupted else "budget"
    plugins.call("tryplicity_run_finished", run=run.folder, step=progress.step, reason=reason)
    return Outcome(reason, progress, scores.get(_score_name("pretrain")), signals.received,
                   scores.get(_score_name("chat")))


def _score_name(kind: str) -> str:
    return "validation_bits_per_byte" if kind == "pretrain" else f"{kind}_validation_bits_per_byte"


def _in_words(what: str, numbers: Mapping[str, Any]) -> str:
    """What was said of the whole model; what was said of single layers is in the metrics."""
    return f"{what}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else
                                   f"{name.replace('_', ' ')} {value}" for name, value in numbers.items()
                                   if "." not in name)


def _metrics(session: Session, stepped: Stepped, phase: str) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    progress, model, result = session.progress, session.model, stepped.result
    objectives = {name: float(mean.value) for name, mean in result.objectives.items()}
    auxiliary = {f"{name}_loss": float(value) for name, value in result.auxiliary.items()}
    weights = model.weights()
    total = sum(weights[name] * value for name, value in objectives.items()) + sum(auxiliary.values())
    weighted = objectives.pop(NEXT_TOKEN)
    metrics = {"step": progress.step, "tokens": progress.tokens, "loss": float(result.loss.value), "total_loss": total,
               **objectives, **auxiliary, "learning_rate": session.optimizer.param_groups[0]["lr"],
               "gradient_norm": float(result.gradient_norm), "tokens_per_second": stepped.tokens / stepped.seconds,
               "seconds": progress.seconds, "phase": phase, "context_length": stepped.stage.context_length,
               **model.metrics(result.stats)}
    if model.objectives:
        metrics["weighted_loss"] = weighted
    if stepped.stage.name:
        metrics["stage"] = stepped.stage.name
    return metrics


def _bad_loss(bad: int, session: Session, stepped: Stepped, phase: int) -> str:
    steps = checkpoint.steps(session.run.checkpoints)
    kept = f"the last good checkpoint is step {session.saved_step}" if steps else "nothing was saved yet"
    end = session.progress.tokens
    return (f"the loss was not a number {bad} steps in a row, lastly on tokens {end - stepped.tokens} to {end - 1} "
            f"({session.data[phase].train.describe(stepped.batch.documents)}); training stopped; {kept}. "
            "Lower training.optimizer.learning_rate, or look at that text")
