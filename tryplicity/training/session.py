"""What a training run holds, and the single things it does: a step, a sleep, a score, a save.

Shapes: B rows, T time.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tryplicity.builder import Build
from tryplicity.components import IGNORE, Brain, Night, Stage
from tryplicity.data import Mixture, PackedStream, Prepared
from tryplicity.data.packing import Batch, joined, rows_of
from tryplicity.errors import Refused, UserError
from tryplicity.leftout import LeftOut
from tryplicity.model import Model, assemble
from tryplicity.plugins import Plugins
from tryplicity.promises import check_factor, check_optimizer, check_state
from tryplicity.run import Run
from tryplicity.training import checkpoint
from tryplicity.training import resume as resuming
from tryplicity.training.ahead import Ahead
from tryplicity.training.checkpoint import TrainingProgress
from tryplicity.training.compiling import compile_blocks
from tryplicity.training.evaluate import bits_per_byte
from tryplicity.training.folder import check_free
from tryplicity.training.pace import Pace
from tryplicity.training.process import say
from tryplicity.training.saving import Holder, Job, Saver
from tryplicity.training.stages import NOTHING_TO_LEARN, Stages, brains_of
from tryplicity.training.starting import Start, Taken, take
from tryplicity.training.step import StepResult, decay_groups, on_device, training_step
from tryplicity.world import World


@dataclass(frozen=True)
class Stepped:
    """One optimizer step."""

    result: StepResult
    batch: Batch  # this rank's rows
    stage: Stage
    good: bool  # loss and gradient were finite
    tokens: int
    seconds: float
    left_out: int  # rows that had nothing to learn


class Session:
    """The model, its optimizer, the data of each phase and how far all of it is."""

    def __init__(self, build: Build, data: Mapping[int, Prepared], run: Run, plugins: Plugins, world: World, *,
                 resume: bool, other_data: bool = False, holder: Holder | None = None,
                 start: Start | None = None) -> None:
        world.decided(lambda: check_free(run, resume))
        self.build, self.data, self.run, self.plugins = build, data, run, plugins
        self.spec, self.hardware, self.training = build.spec, build.hardware, build.spec.training
        self.world, self.device = world, world.device
        self.strategy = build.strategy
        self.model: Model = self.strategy.place(assemble(self.spec), world, self.training.seed,
                                                self.hardware.precision)
        said = compile_blocks(self.model, self.training.compile, self.device)
        if said and world.first_rank:
            say(said)
        self.model.activation_checkpointing = self.hardware.activation_checkpointing
        self.optimizer = self.training.optimizer.build().build(*decay_groups(self.model))
        check_optimizer(self.training.optimizer, self.optimizer, dict(self.model.named_parameters()))
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.options = checkpoint.Options.of(self.training.optimizer.name, self.optimizer)
        self.schedules = [(phase.schedule or self.training.schedule).build() for phase in self.spec.phases]
        self.brains = brains_of(self.spec)
        self.stages = Stages(self.spec, self.brains, data, build.registry, self.training.seed)
        self.plan = self.stages.plan
        self.pretraining = next(i for i, phase in enumerate(self.spec.phases) if phase.kind == "pretrain")
        identities = dict.fromkeys(prepared.identity for prepared in data.values())
        self.progress = TrainingProgress(identity=self.spec.identity(), data="+".join(identities),
                                         seed=self.training.seed)
        self.saver = Saver(run.checkpoints, world, self.training.keep_checkpoints, self.training.checkpoint_every,
                           holder)
        self.saved_step = -1
        self.next_rows = Ahead(self._rows_to_learn)
        self.left_out = LeftOut("rows")
        self.told: set[str] = set()  # what is said once
        self.taken: Taken | None = None
        newest = checkpoint.newest(run.checkpoints, world) if resume else None
        if start is not None and newest is None:
            self.taken = take(start, self.model, self.strategy, self.optimizer, world)
            start.weights.let_go()
        if newest is not None:
            data = self.progress.data
            _check_belongs(newest, self.progress, run, build, other_data)
            self.progress = checkpoint.load(newest, self.strategy, self.model, self.optimizer, self.options, world)
            for name, state in self.progress.brain.items():
                # what a module remembers of documents, by their numbers, is of no use with others
                if data == self.progress.data or type(self.brains[name]).observe is Brain.observe:
                    self.brains[name].load_state(state)
            self.progress.data = data
            self.saved_step = self.progress.step
        self.pace = Pace(self.progress.tokens, 0.0)
        self.model.train()

    # --- a step ---

    def step(self, phase: int, spent: float) -> Stepped:
        """One optimizer step of a training phase, when `spent` of the budget is used."""
        progress, started = self.progress, time.perf_counter()
        if progress.phase != phase:
            progress.phase, progress.phase_step = phase, 0
        stage = self.stages.at(phase, spent)
        rows, micro_batch = self._rows(stage)
        key = self.data[phase].identity[:16]  # a phase of the same data goes on where the one before it stopped
        mixture, asked = self.stages.mixture(phase, stage), rows
        batch, rows, positions, left_out = self.next_rows(mixture, progress.positions.get(key, {}), rows,
                                                          stage.context_length)
        if left_out:
            self.left_out.add("without a word to learn", count=left_out)
        tokens = rows * stage.context_length
        schedule = self.schedules[phase]
        factor = (check_factor(schedule, schedule.factor(self.plan.within(phase, spent), progress.phase_step))
                  * self.spec.phases[phase].learning_rate_factor * stage.learning_rate_factor)
        self.model.set_factors(stage.factors)
        result = self._optimize(batch, micro_batch, factor, rows)
        if self.looks_ahead:
            self.next_rows.foresee(mixture, positions, asked, stage.context_length)
        result = result.on_host()
        good = bool(result.finite)
        if good and self.data[phase].identity == self.data[self.pretraining].identity:
            self._observe(batch, result)
        progress.positions[key] = positions
        progress.step += 1
        progress.phase_step += 1
        progress.tokens += tokens
        seconds = time.perf_counter() - started
        return Stepped(result, batch, stage, good, tokens, seconds, left_out)

    @property
    def looks_ahead(self) -> bool:
        """Whether the host has time while the device is at work on a step."""
        return self.device.type != "cpu"

    def _rows_to_learn(self, mixture: Mixture, positions: Mapping[str, int], rows: int, context: int,
                       ) -> tuple[Batch, int, dict[str, int], int]:
        """This rank's of the next rows that have a target, how many they are on all ranks, the positions after them,
        and how many were left out on the way: a row that lies inside a long question teaches nothing. Fewer than `rows`
        where all of the data has no more."""
        own, after = mixture.batch(positions, rows, context, self.world.part(rows))
        if not self.world.any(not bool((own.targets_BT != IGNORE).any(1).all())):
            return own, rows, after, 0
        # where a row is left out others move up, and maybe to another rank: each looks at all of them
        found, missing, passed = [], rows, 0
        most = 2 * rows + sum(mixture.tokens().values()) // context
        while True:
            if passed == 0 and self.world.size == 1:
                batch, positions = own, after
            else:
                batch, positions = mixture.batch(positions, missing, context)
            learnt_B = (batch.targets_BT != IGNORE).any(1)
            if bool(learnt_B.all()):
                found.append(batch)
            elif bool(learnt_B.any()):
                found.append(batch._replace(
                    ids_BT=batch.ids_BT[learnt_B], targets_BT=batch.targets_BT[learnt_B],
                    doc_ids_BT=batch.doc_ids_BT[learnt_B],
                    documents=tuple(d for d, learnt in zip(batch.documents, learnt_B, strict=True) if learnt)))
            passed += missing
            missing -= int(learnt_B.sum())
            if missing == 0 or passed >= most:
                break
        if not found:
            raise UserError(NOTHING_TO_LEARN)
        left_out = passed - rows + missing
        whole = joined(found)
        count = len(whole.ids_BT)
        return rows_of(whole, self.world.part(count)), count, positions, left_out

    def _rows(self, stage: Stage) -> tuple[int, int]:
        """Rows of a step and of one forward pass; the latter holds as many tokens whatever their length."""
        usual = self.hardware.sequences_per_step() * self.spec.context_length
        rows = max(1, round((stage.tokens_per_step or usual) / stage.context_length))
        return rows, max(1, self.hardware.batch * self.spec.context_length // stage.context_length)

    def _optimize(self, batch: Batch, micro_batch: int, factor: float, rows: int) -> StepResult:
        return training_step(self.model, self.optimizer, self.strategy, on_device(batch, self.device),
                             step=self.progress.step, micro_batch=micro_batch, precision=self.hardware.precision,
                             max_norm=self.training.gradient_clip, learning_rate_factor=factor, world=self.world,
                             rows=rows)

    def _observe(self, batch: Batch, result: StepResult) -> None:
        """Tell brain modules which documents were seen, and how hard each was."""
        watching = [brain for brain in self.brains.values() if type(brain).observe is not Brain.observe]
        if watching:
            own = document_losses(batch, result.nll)
            documents, losses = mean_losses(self.world.gathered(own))
            for brain in watching:
                brain.observe(documents, losses, self.training.seed)

    # --- a sleep ---

    def wants_sleep(self, phase: int) -> bool:
        """Whether to sleep before the next step: at a sleep phase, or because a module asks for it."""
        if self.spec.phases[phase].kind == "sleep":
            return True
        step = self.progress.step
        return (self.spec.phases[phase].kind == "pretrain" and step > 0 and self.progress.slept_at != step
                and any(brain.wants_sleep(step) for brain in self.brains.values()))

    def just_slept(self, phase: int) -> bool:
        """Whether a sleep phase begins right after a sleep."""
        return self.spec.phases[phase].kind == "sleep" and self.progress.slept_at == self.progress.step

    def sleep(self, phase: int, spent: float, stopping: Callable[[], bool]) -> dict[str, Any] | None:
        """Let every sleeping module do its work; what they say of it, or None when it was interrupted.

        The checkpoint written before is what an interrupted sleep is resumed from: nothing of it is saved.
        """
        self.model.set_factors(self.stages.at(self.progress.phase, spent).factors)
        progress = self.progress
        self.await_saved()
        saved = progress.step == self.saved_step or (self.save() and self.await_saved())
        interrupted = stopping if saved else lambda: False
        night = Night(model=self.model, optimizer=self.optimizer, strategy=self.strategy, step=progress.step,
                      seed=self.training.seed, checkpoints=self.world.first(self.regular_checkpoints()),
                      interrupted=interrupted, score=self._score_asleep,
                      replay=lambda documents, steps, factor: self._replay(documents, steps, factor, interrupted))
        said: dict[str, Any] = {}
        for brain in self.brains.values():
            if type(brain).sleep is not Brain.sleep:
                said |= brain.sleep(night) or {}
        if interrupted():
            return None
        progress.slept_at = progress.step
        progress.sleeps += self.spec.phases[phase].kind == "sleep"
        return said

    def _replay(self, documents: np.ndarray, steps: int, factor: float, stopping: Callable[[], bool]) -> float:
        """Train on rows packed of these documents; they count as tokens of the budget, not as steps."""
        rows, context = self.hardware.sequences_per_step(), self.spec.context_length
        stream = PackedStream(self.data[self.pretraining].train, self.training.seed + self.progress.step,
                              documents=documents)
        losses = []
        for number in range(steps):
            if stopping():
                break
            batch = stream.batch(number * rows * context, rows, context, self.world.part(rows))
            result = self._optimize(batch, self.hardware.batch, factor, rows)
            losses.append(float(result.loss.value))
            self.progress.tokens += rows * context
        return sum(losses) / max(len(losses), 1)

    # --- scoring and saving ---

    def rows_to_score(self, prepared: Prepared, most: int | None = None) -> int:
        """How many held-out rows are scored where so many are at most; without it, of the last scoring."""
        return min(prepared.held_out().rows(self.spec.context_length), most or self.training.final_validation_rows)

    def score(self, prepared: Prepared, max_rows: int | None = None, stopping: Callable[[], bool] = lambda: False,
              scoring: Callable[[int], None] = lambda rows: None) -> float | None:
        """Held-out bits per byte: of documents, or of the assistant's part of conversations. None, and a line that says
        so, where there is nothing to predict; None too if stopped before the first row.

        scoring: called with the number of rows scored so far.
        """
        heldout, context, rows = prepared.held_out(), self.spec.context_length, self.hardware.batch
        total, done, started = min(max_rows or sys.maxsize, heldout.rows(context)), 0, self.pace.clock()

        def progress(batches: int) -> None:
            nonlocal done
            done = min(batches * rows, total)
            scoring(done)

        value = bits_per_byte(self.model, heldout.batches(rows, context, max_rows), world=self.world,
                              stopping=stopping, precision=self.hardware.precision, progress=progress)
        if done:
            self.pace.scored(done, self.pace.clock() - started)
        if value is None and done == total:
            self._say_once("warning: the held-out part of the data has nothing to "
                           "predict, so that nothing is scored on it; more data has more held out")
        return value

    def _score_asleep(self) -> float:
        value = self.score(self.data[self.pretraining], self.training.validation_rows)
        return math.nan if value is None else value

    def _say_once(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            if self.world.first_rank:
                say(text)

    def regular_checkpoints(self) -> list[Path]:
        """Those at the steps where one is due whatever happens, oldest first: the same after any interruption."""
        due = [step for step in checkpoint.steps(self.run.checkpoints)
               if step % self.training.checkpoint_every == 0 and step <= self.progress.step]
        # of those before there may be one that a killed training did not come to drop, or that is being copied
        return [self.run.checkpoints / f"step-{step}" for step in due[-self.training.keep_checkpoints:]]

    def healthy(self) -> bool:
        """Whether every weight is finite."""
        with self.strategy.whole(self.model):
            return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def save(self, last: bool = False) -> bool:
        """Begin to save a checkpoint, which is written while training goes on; the last one is waited for. A disk that
        is full costs this checkpoint, not the run, unless it is the last one. Whether all is well so far."""
        self.await_saved()
        progress = self.progress
        progress.brain = {name: check_state(brain, brain.state()) for name, brain in self.brains.items()}
        try:
            self.saver.begin(self.strategy, self.model, self.optimizer, self.options, progress)
        except checkpoint.WRITE_ERRORS as error:
            self._not_saved(progress.step, str(error), last)
            return False
        return not last or self.await_saved(last=True)

    def await_saved(self, last: bool = False) -> bool:
        """Wait for the checkpoint that is being written. Whether it is complete; Refused if it is the last and not."""
        job = self.saver.finish()
        if job is None:
            return True
        self._tell(job, last)
        if job.state != "failed":
            self.saved_step = job.step
        return job.state != "failed"

    def hear(self) -> None:
        """Between steps: let it be known when a checkpoint is complete, or cannot be."""
        if self.saver.job is not None and self.saver.job.ended:
            if self.world.size == 1:
                self.await_saved()  # which several do together
            else:
                self._tell(self.saver.job, last=False)

    def _tell(self, job: Job, last: bool) -> None:
        if job.state == "failed" and (last or not job.told):
            self._not_saved(job.step, job.error, last)
        elif self.world.first_rank and not job.told:
            self.plugins.call("tryplicity_checkpoint_saved", run=self.run.folder, step=job.step, checkpoint=job.target)
        job.told = True

    def _not_saved(self, step: int, error: str, last: bool) -> None:
        what = f"step {step}: the checkpoint could not be written ({' '.join(error.split())})"
        older = checkpoint.steps(self.run.checkpoints)
        kept = f"the newest complete one is step {older[-1]}" if older else "there is no older one"
        if last:
            raise Refused(f"{what}; {kept}; free some room on the disk and go on with --resume")
        if self.world.first_rank:
            say(f"warning: {what}; {kept}; training goes on")


def document_losses(batch: Batch, nll: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The numbers of the documents in a batch, in order, and of each the nats of its tokens and how many they are.

    nll: the nats of each next token, [rows, T], part by part.
    """
    if not nll:
        return np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64)
    row_starts = np.cumsum([0, *(len(row) for row in batch.documents[:-1])])
    place_BT = batch.doc_ids_BT.numpy() + row_starts[:, None]
    valid_BT = (batch.targets_BT != IGNORE).numpy()
    numbers, place = np.unique(np.concatenate(batch.documents), return_inverse=True)
    index_N = place[place_BT[valid_BT]]
    nll_BT = torch.cat(nll).cpu().numpy().astype(np.float64)
    return (numbers, np.bincount(index_N, nll_BT[valid_BT], minlength=len(numbers)),
            np.bincount(index_N, minlength=len(numbers)))


def mean_losses(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """What `document_losses` found of the parts of a batch, as the documents' numbers and mean nats a token."""
    every, totals, counts = (np.concatenate(found) for found in zip(*parts, strict=True))
    numbers, place = np.unique(every, return_inverse=True)
    total, count = (np.bincount(place, found, minlength=len(numbers)) for found in (totals, counts))
    return numbers[count > 0], total[count > 0] / count[count > 0]


def _check_belongs(saved: Path, progress: TrainingProgress, run: Run, build: Build, other_data: bool) -> None:
    """Raises UserError when a checkpoint is of another architecture, another seed or, unless that is wanted, other
    data."""
    theirs = checkpoint.read_progress(saved)
    for what, key in (("spec (its layers, sizes or brain modules differ{})", "identity"), ("data set", "data"),
                      ("seed (training.seed)", "seed")):
        if getattr(theirs, key) != getattr(progress, key) and not (key == "data" and other_data):
            before = resuming.spec_before(run, build.registry) if key == "identity" else None
            names = resuming.differences(before.architecture(), build.spec.architecture()) if before else {}
            named = what.format(f": {resuming.in_words(names)}" if names else "")
            anyway = ", or go on with this one all the same: --other-data" if key == "data" else ""
            raise UserError(f"{saved}: belongs to another {named}; give the one it was begun with{anyway}, or another "
                            "--run")
