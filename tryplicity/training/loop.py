"""The training loop: step, sleep, log, validate, save, and stop cleanly whatever happens."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tryplicity.builder import Build
from tryplicity.data import Prepared
from tryplicity.errors import Refused
from tryplicity.guard import guarded
from tryplicity.leftout import LeftOut
from tryplicity.model import NEXT_TOKEN
from tryplicity.plugins import Plugins
from tryplicity.run import Run
from tryplicity.training import checkpoint, measured
from tryplicity.training import resume as resuming
from tryplicity.training.checkpoint import TrainingProgress
from tryplicity.training.copying import Copier
from tryplicity.training.metrics import MetricsFile
from tryplicity.training.pace import Pace
from tryplicity.training.process import STOPPING, Stopped, StopSignals, say
from tryplicity.training.session import Session, Stepped
from tryplicity.training.stages import data_of_phases
from tryplicity.training.starting import Start, keep, scored_before
from tryplicity.training.threads import Threads
from tryplicity.training.watchers import Heard, Unheard, Watcher
from tryplicity.world import World


@dataclass(frozen=True)
class Budget:
    """When training ends; exactly one of the first four is given."""

    steps: int | None = None
    tokens: int | None = None
    minutes: float | None = None  # of training: steps, sleeps, scoring and checkpoints on the way
    dollars: float | None = None  # the same at `dollars_per_hour`
    dollars_per_hour: float = 0.0  # of all machines

    def spent(self, progress: TrainingProgress) -> float:
        """The share of the budget that is spent, 0 to 1 and beyond."""
        if self.steps is not None:
            return progress.step / self.steps
        if self.tokens is not None:
            return progress.tokens / self.tokens
        if self.minutes is not None:
            return progress.seconds / (60 * self.minutes)
        return self.cost(progress) / self.dollars

    def cost(self, progress: TrainingProgress) -> float:
        """Dollars spent on training so far."""
        return progress.seconds / 3600 * self.dollars_per_hour


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    reason: str  # "budget" or "interrupted"
    progress: TrainingProgress
    bits_per_byte: float | None  # held-out, at the end; None where there is nothing to predict
    signal: int | None = None
    chat_bits_per_byte: float | None = None  # of the assistant's part of held-out conversations, if there was a chat
    left_out: LeftOut = field(default_factory=lambda: LeftOut("rows"))
    cut_short: bool = False  # stopped in the middle of a step, before which all was saved
    dollars: float = 0.0


class Together:
    """What all ranks must see alike between steps: whether to stop, and how long the training has taken."""

    def __init__(self, world: World, signals: StopSignals, progress: TrainingProgress) -> None:
        self.world, self.signals, self.progress = world, signals, progress
        self.begun = time.perf_counter() - progress.seconds
        self.signal: int | None = None  # that one of them received

    def stopping(self) -> bool:
        """Whether a rank was told to stop; called by all ranks alike. Rank 0's clock becomes everyone's."""
        seconds, own = time.perf_counter() - self.begun, self.signals.received or 0
        if self.world.size > 1:
            told = torch.tensor([seconds if self.world.first_rank else 0.0, float(own > 0)], dtype=torch.float64)
            seconds, any_told = self.world.total([told.to(self.world.device)])[0].tolist()
            if any_told and self.signal is None:
                own = max(self.world.gathered(own))
        self.progress.seconds = max(seconds, self.progress.seconds)
        self.signal = self.signal or own or None
        return self.signal is not None


@guarded()
def train(build: Build, prepared: Prepared, run: Run, budget: Budget, plugins: Plugins, *,
          phase_data: Mapping[int, Prepared] | None = None, resume: bool = False,
          other_data: bool = False, watcher: Watcher | None = None, world: World | None = None,
          copy_to: str | None = None, start: Start | None = None) -> Outcome:
    """Train a built spec on prepared data into a run folder, which the caller has for itself: see `folder.alone`.

    phase_data: the data of phases, by their number, that have data of their own; a chat phase needs conversations.
    world: the ranks that train together; this process alone, if not given. Called on each of them alike.
    other_data: a run that is resumed may go on with other data than it was begun with.
    start: trained weights to begin from; of no account where a checkpoint is gone on from.
    copy_to: a URL that every complete checkpoint is copied to; see `copying`.
    Raises UserError when the folder's checkpoints belong to another spec or other data, or none of them is whole, and
    Refused when the loss is not a number for several steps, or the last checkpoint cannot be written.
    """
    training = build.spec.training
    world = world or World(device=torch.device(build.hardware.torch_device))
    watcher = Heard(watcher if watcher and world.first_rank else Watcher())
    plugins = plugins if world.first_rank else Unheard()
    measured.begin(world.device)
    data = data_of_phases(build.spec, prepared, phase_data or {})
    copier = Copier(copy_to, run, training.keep_checkpoints, training.checkpoint_every) if (
        copy_to and world.first_rank) else None
    session = Session(build, data, run, plugins, world, resume=resume, other_data=other_data, holder=copier,
                      start=start)
    if copier is not None and session.saved_step >= 0:
        copier.add(run.checkpoints / f"step-{session.saved_step}")  # if it did not come to that
    progress = session.progress
    metrics_file = MetricsFile(run.metrics, progress.step, progress.slept_at) if world.first_rank else Unheard()
    if resume and (changed := resuming.changes(run, build)):
        world.decided(lambda: resuming.write_in_force(run, build))
        metrics_file.write({"step": progress.step, "tokens": progress.tokens, "resumed": changed})
        watcher.note(f"from step {progress.step} on with {resuming.in_words(changed)}")
    plugins.call("tryplicity_run_started", run=run.folder, spec=build.spec, model=session.model)
    to_score = {kind: max(i for i, p in enumerate(build.spec.phases) if p.kind == kind)
                for kind in dict.fromkeys(p.kind for p in build.spec.phases if p.kind != "sleep")}
    rows = {kind: session.rows_to_score(data[phase]) for kind, phase in to_score.items()}
    bad_steps, announced, scores, gained = 0, None, {}, {}
    session.pace = Pace(progress.tokens, budget.spent(progress))

    with (StopSignals(STOPPING if world.first_rank else "") as signals, _saying_what_is_lost(session, copier),
          Threads(progress.threads, fixed=session.device.type != "cpu", ranks=world.local_size) as threads):
        if session.device.type == "cpu":
            watcher.note(threads.chosen)
        together, undone, cut_short = Together(world, signals, progress), False, False
        if session.taken is not None:
            _tell_of_the_start(session, to_score, metrics_file, watcher, together.stopping)
        while not together.stopping():
            phase = session.plan.at(budget.spent(progress), progress.sleeps)
            if phase is None:
                break
            if session.just_slept(phase):
                progress.sleeps += 1  # the phase's sleep is the one that was due at this step anyway
                continue
            if session.wants_sleep(phase):
                said = session.sleep(phase, budget.spent(progress), together.stopping)
                undone = said is None
                if said is not None:
                    metrics_file.write({"step": progress.step, "tokens": progress.tokens, "sleep": said})
                    plugins.call("tryplicity_slept", run=run.folder, step=progress.step, report=said)
                    watcher.note(_in_words("slept", said))
                continue

            if said := threads.between_steps():
                watcher.note(said)
            progress.threads = threads.number
            try:
                with signals.nothing_to_lose(progress.step == max(session.saved_step, 0)):
                    stepped = session.step(phase, budget.spent(progress))
            except Stopped:
                cut_short = True
                break
            together.stopping()
            session.pace.step(progress.tokens, budget.spent(progress))
            here = (build.spec.phases[phase].kind, stepped.stage.name)
            if here != announced and (len(build.spec.phases) > 1 or stepped.stage.name):
                watcher.note(f"{' '.join(filter(None, here))}: {stepped.stage.context_length} tokens a row")
            announced = here
            metrics = _metrics(session, stepped, here[0])
            if budget.dollars_per_hour:
                metrics["dollars"] = budget.cost(progress)
            due = progress.step % training.validate_every == 0 or (here[0] == "chat" and progress.phase_step == 1)
            if budget.spent(progress) < 1 and due:
                score = session.score(session.data[phase], training.validation_rows, together.stopping)
                metrics |= {} if score is None else {_score_name(here[0]): score}
            metrics_file.write(metrics)
            plugins.call("tryplicity_step_finished", run=run.folder, step=progress.step, metrics=metrics)
            watcher.step(progress, metrics, min(1.0, budget.spent(progress)),
                         session.pace.seconds_left(sum(rows.values()), build.spec.context_length))

            bad_steps = 0 if stepped.good else bad_steps + 1
            if not stepped.good and world.first_rank:
                say(f"warning: step {progress.step}: the loss is not a number; it changed nothing "
                    f"(tokens {progress.tokens - stepped.tokens} to {progress.tokens - 1})")
            if bad_steps >= training.bad_steps:
                session.await_saved()
                metrics_file.close()
                plugins.call("tryplicity_run_finished", run=run.folder, step=progress.step, reason="failed", scores={})
                raise Refused(_bad_loss(bad_steps, session, stepped, phase))
            session.hear()
            if stepped.good and progress.step % training.checkpoint_every == 0:
                session.save()

        # still inside: a second SIGTERM, or a Ctrl-C just now, must not cut this short
        done = together.signal is None and not cut_short
        if cut_short and world.size > 1:
            session.saver.join(ENOUGH)  # the others may be in the middle of a step
        else:
            session.await_saved()
        # a sleep is slept again by a run that resumes before it; at the end of the budget it is part of the result
        unsaved = progress.step > session.saved_step or (done and progress.slept_at == progress.step)
        if unsaved and not undone and not cut_short and (bad_steps == 0 or session.healthy()):
            session.save(last=True)
        if done:
            try:
                weights = session.strategy.weights(session.model)
                if world.first_rank:
                    checkpoint.save_weights(session.model, run.weights, weights)
            except checkpoint.WRITE_ERRORS as error:
                raise Refused(f"{run.weights}: could not be written: {error}; the checkpoint is complete: free some "
                              "room and run the same command with --resume") from None
            scores = _score_all(session, to_score, rows, watcher, together.stopping)
            gained = _tell_what_it_gained(session, to_score, scores, watcher, together.stopping)
    interrupted = together.signal is not None or cut_short
    if not interrupted:
        metrics_file.write({"step": progress.step, "tokens": progress.tokens, **scores, **gained})
    metrics_file.close()
    if world.first_rank:
        measured.note(run, build, world.device)
    if copier is not None:
        with StopSignals(f"waiting for the copy to {copy_to}; Ctrl-C again ends without it"):
            copier.finish(None if interrupted else run.weights)
    if world.first_rank:
        session.saver.drop_old(progress.step)  # what was being copied when its time came
    reason = "interrupted" if interrupted else "budget"
    plugins.call("tryplicity_run_finished", run=run.folder, step=progress.step, reason=reason, scores=scores)
    return Outcome(reason, progress, scores.get(_score_name("pretrain")), together.signal or signals.received,
                   scores.get(_score_name("chat")), session.left_out, cut_short, budget.cost(progress))


def _tell_of_the_start(session: Session, phases: Mapping[str, int], metrics_file: MetricsFile | Unheard,
                       watcher: Watcher, stopping: Callable[[], bool]) -> None:
    """What was taken of trained weights, kept in the run too, and how good they are before the first step."""
    run, rows = session.run, session.training.validation_rows
    session.world.decided(lambda: keep(run, session.taken))
    for sentence in session.taken.sentences():
        watcher.note(sentence)
    scores = _score_rows(session, phases, rows, stopping)
    if scores:
        session.world.decided(lambda: keep(run, session.taken, rows, scores))
        metrics_file.write({"step": 0, "tokens": 0, **scores})
        for kind in phases:
            if (name := _score_name(kind)) in scores:
                watcher.note(f"{HELD_OUT[kind]} before the first step: {scores[name]:.3f}")


def _tell_what_it_gained(session: Session, phases: Mapping[str, int], scores: Mapping[str, float], watcher: Watcher,
                         stopping: Callable[[], bool]) -> dict[str, float]:
    """Of a run that was begun from trained weights: bits per byte of the same held-out rows before the first step and
    after the last one. scores: of the last scoring."""
    rows, before = session.world.first(scored_before(session.run))
    if not scores or not before:
        return {}
    same = all(session.rows_to_score(data, rows) == session.rows_to_score(data)
               for data in (session.data[phase] for phase in phases.values()))
    after = scores if same else _score_rows(session, phases, rows, stopping)
    gained = {}
    for kind in phases:
        name = _score_name(kind)
        if name in before and name in after:
            gained |= {f"{name}_before": before[name], f"{name}_after": after[name]}
            watcher.note(f"{HELD_OUT[kind]}: {before[name]:.3f} before the first step, {after[name]:.3f} after the "
                         "last one, of the same rows")
    return gained


def _score_rows(session: Session, phases: Mapping[str, int], rows: int, stopping: Callable[[], bool],
                ) -> dict[str, float]:
    """The first held-out rows of each kind of phase; nothing when stopped on the way."""
    found = {_score_name(kind): session.score(session.data[phase], rows, stopping) for kind, phase in phases.items()}
    return {} if stopping() else {name: score for name, score in found.items() if score is not None}


HELD_OUT = {"pretrain": "held-out bits per byte", "chat": "held-out bits per byte of answers"}
ENOUGH = 5.0  # seconds that a checkpoint which is nearly written gets when all ends at once


@contextmanager
def _saying_what_is_lost(session: Session, copier: Copier | None) -> Iterator[None]:
    """Of a KeyboardInterrupt: the steps that no checkpoint holds."""
    try:
        yield
    except KeyboardInterrupt:
        session.saver.join(ENOUGH)
        saved, step = checkpoint.steps(session.run.checkpoints), session.progress.step
        lost = step - (saved[-1] if saved else 0)
        if not lost:
            raise KeyboardInterrupt(f"ended at once; nothing is lost: step {step} is saved") from None
        kept = f"the checkpoint of step {saved[-1]} is kept" if saved else "there is no checkpoint yet"
        raise KeyboardInterrupt(f"ended at once, without saving: {lost} step{'s' if lost > 1 else ''} lost; "
                                f"{kept}") from None
    except BaseException:
        session.saver.join(60)
        if copier is not None:
            copier.finish()
        raise


def _score_all(session: Session, phases: Mapping[str, int], rows: Mapping[str, int], watcher: Watcher,
               stopping: Callable[[], bool]) -> dict[str, float]:
    """The last scoring, of so many held-out rows of each kind of phase; nothing when stopped on the way."""
    scores, done, whole, clock = {}, 0, sum(rows.values()), session.pace.clock
    started = clock()
    for kind, phase in phases.items():
        if rows[kind] < (there := session.rows_to_score(session.data[phase], sys.maxsize)):
            watcher.note(f"{HELD_OUT[kind]}: of {rows[kind]:,} of {there:,} rows, spread evenly "
                         "(training.final_validation_rows)")

        def scoring(own: int, before: int = done) -> None:
            scored = before + own
            watcher.scoring(scored / whole, (clock() - started) / scored * (whole - scored))

        score = session.score(session.data[phase], rows[kind], stopping, scoring)
        if score is not None:
            scores[_score_name(kind)] = score
        done += rows[kind]
    return {} if stopping() else scores


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
    objectives = {name: float(mean.value) for name, mean in result.objectives.items()
                  if name == NEXT_TOKEN or mean.count > 0}
    auxiliary = {f"{name}_loss": float(value) for name, value in result.auxiliary.items()}
    weights = model.weights()
    total = sum(weights[name] * value for name, value in objectives.items()) + sum(auxiliary.values())
    weighted = objectives.pop(NEXT_TOKEN)
    metrics = {"step": progress.step, "tokens": progress.tokens, "loss": float(result.loss.value), "total_loss": total,
               **objectives, **auxiliary, "learning_rate": session.optimizer.param_groups[0]["lr"],
               "gradient_norm": float(result.gradient_norm), "tokens_per_second": session.pace.tokens_per_second(),
               "seconds": progress.seconds, "phase": phase, "context_length": stepped.stage.context_length,
               **model.metrics(result.stats)}
    if model.objectives:
        metrics["weighted_loss"] = weighted
    if stepped.stage.name:
        metrics["stage"] = stepped.stage.name
    if stepped.left_out:
        metrics["rows_left_out"] = stepped.left_out
    return metrics


def _bad_loss(bad: int, session: Session, stepped: Stepped, phase: int) -> str:
    steps = checkpoint.steps(session.run.checkpoints)
    kept = f"the last good checkpoint is step {session.saved_step}" if steps else "nothing was saved yet"
    end, world = session.progress.tokens, session.world
    finite = all(bool(nll.isfinite().all()) for nll in stepped.result.nll)
    found = world.gathered((finite, session.data[phase].train.describe(stepped.batch.documents)))
    bad_ranks = [rank for rank, (good, _) in enumerate(found) if not good] or range(world.size)
    where = "; ".join(f"rank {rank}: {found[rank][1]}" if world.size > 1 else found[rank][1] for rank in bad_ranks)
    return (f"the loss was not a number {bad} steps in a row, lastly on tokens {end - stepped.tokens} to {end - 1} "
            f"({where}); training stopped; {kept}. "
            "Lower the rate (the same command with --resume --set training.optimizer.learning_rate=...), or look at "
            "that text")
