"""What a training run holds, and the single things it does: a step, a sleep, a score, a save.

Shapes: B rows, T time.
"""

from __future__ import annotations

import functools
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
from tryplicity.data.packing import Batch
from tryplicity.errors import Refused, UserError, did_you_mean
from tryplicity.model import Model, assemble
from tryplicity.plugins import Plugins
from tryplicity.run import Run
from tryplicity.training import checkpoint
from tryplicity.training.checkpoint import Progress
from tryplicity.training.evaluate import bits_per_byte
from tryplicity.training.phases import PhasePlan
from tryplicity.training.step import StepResult, decay_groups, is_finite, on_device, training_step

MOMENTS = 1000  # of a phase, at which its stages are looked for


@dataclass(frozen=True)
class Stepped:
    """One optimizer step."""

    result: StepResult
    batch: Batch
    stage: Stage
    good: bool  # loss and gradient were finite
    tokens: int
    seconds: float


class Session:
    """The model, its optimizer, the data of each phase and how far all of it is."""

    def __init__(self, build: Build, data: Mapping[int, Prepared], run: Run, plugins: Plugins, *, resume: bool) -> None:
        self.build, self.data, self.run, self.plugins = build, data, run, plugins
        self.spec, self.hardware, self.training = build.spec, build.hardware, build.spec.training
        self.device = torch.device(self.hardware.torch_device)
        self.plan = PhasePlan(self.spec.phases)
        self.strategy = build.strategy
        self.model: Model = self.strategy.place(assemble(self.spec), self.device, self.training.seed)
        self.model.activation_checkpointing = self.hardware.activation_checkpointing
        self.optimizer = self.training.optimizer.build().build(*decay_groups(self.model))
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.schedules = [(phase.schedule or self.training.schedule).build() for phase in self.spec.phases]
        self.brains: dict[str, Brain] = {part.name: part.build() for part in self.spec.brain
                                         if issubclass(part.component, Brain)}
        identities = dict.fromkeys(prepared.identity for prepared in data.values())
        self.progress = Progress(identity=self.spec.identity(), data="+".join(identities), seed=self.training.seed)
        if resume and (newest := checkpoint.newest(run.checkpoints)) is not None:
            _check_belongs(newest, self.progress)
            self.progress = checkpoint.load(newest, self.model, self.optimizer)
            for name, state in self.progress.brain.items():
                self.brains[name].load_state(state)
        self.saved_step = self.progress.step
        self._mixtures: dict[tuple[int, str], Mixture] = {}
        self._check_stages()
        self.model.train()

    # --- the data ---

    def stage(self, phase: int, spent: float) -> Stage:
        """What the curriculum, if there is one, says of this moment of a phase. Of its last stage, a chat keeps the
        factors of objectives."""
        pretraining, context = self.spec.phases[phase].kind == "pretrain", self.spec.context_length
        within = self.plan.within(phase, spent) if pretraining else 1.0
        for brain in self.brains.values():
            if (stage := brain.stage(within, context)) is not None:
                return stage if pretraining else Stage("", context, factors=stage.factors)
        return Stage("", context)

    def _check_stages(self) -> None:
        """Find the rows of every stage now: a stage to come that has none must not end the run after hours."""
        for phase, what in enumerate(self.spec.phases):
            if what.kind == "sleep":
                continue
            start, end = self.plan.starts[phase], self.plan.ends[phase]
            moments = (start + (end - start) * i / MOMENTS for i in range(MOMENTS))
            for stage in {stage.name: stage for stage in map(functools.partial(self.stage, phase), moments)}.values():
                objectives = self.build.registry.names("objective")
                for name in stage.factors:
                    if name not in objectives:
                        hint = did_you_mean(name, objectives)
                        raise UserError(f"stage {stage.name}: factors: no objective is called {name!r}{hint}")
                self._mixture(phase, stage)

    def _mixture(self, phase: int, stage: Stage) -> Mixture:
        """The rows of a stage; `progress.positions` knows how many of a phase's were delivered."""
        key = (phase, stage.name)
        if key not in self._mixtures:
            try:
                made = Mixture.graded(self.data[phase], self.training.seed, stage.mixture, stage.max_grade)
            except UserError as error:
                raise UserError(f"stage {stage.name}: {error}") from None
            if made.warning:
                print(f"warning: stage {stage.name}: {made.warning}", file=sys.stderr)
            self._mixtures[key] = made
        return self._mixtures[key]

    # --- a step ---

    def step(self, phase: int, spent: float) -> Stepped:
        """One optimizer step of a training phase, when `spent` of the budget is used."""
        progress, started = self.progress, time.perf_counter()
        if progress.phase != phase:
            progress.phase, progress.phase_step = phase, 0
        stage = self.stage(phase, spent)
        rows, micro_batch = self._rows(stage)
        batch, positions = self._mixture(phase, stage).batch(progress.positions.get(str(phase), {}), rows,
                                                             stage.context_length)
        factor = (self.schedules[phase].factor(self.plan.within(phase, spent), progress.phase_step)
                  * self.spec.phases[phase].learning_rate_factor * stage.learning_rate_factor)
        self.model.set_factors(stage.factors)
        result = self._optimize(batch, micro_batch, factor)
        good, tokens = is_finite(result), rows * stage.context_length
        if good and self.spec.phases[phase].kind == "pretrain":
            self._observe(batch, result)
        progress.positions[str(phase)] = positions
        progress.step += 1
        progress.phase_step += 1
        progress.tokens += tokens
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        return Stepped(result, batch, stage, good, tokens, seconds)

    def _rows(self, stage: Stage) -> tuple[int, int]:
        """Rows of a step and of one forward pass; the latter holds as many tokens whatever their length."""
        usual = self.hardware.sequences_per_step() * self.spec.context_length
        rows = max(1, round((stage.tokens_per_step or usual) / stage.context_length))
        return rows, max(1, self.hardware.batch * self.spec.context_length // stage.context_length)

    def _optimize(self, batch: Batch, micro_batch: int, factor: float) -> StepResult:
        return training_step(self.model, self.optimizer, self.strategy, on_device(batch, self.device),
                             step=self.progress.step, micro_batch=micro_batch, precision=self.hardware.precision,
                             max_norm=self.training.gradient_clip, learning_rate_factor=factor)

    def _observe(self, batch: Batch, result: StepResult) -> None:
        """Tell brain modules which documents were seen, and how hard each was."""
        watching = [brain for brain in self.brains.values() if type(brain).observe is not Brain.observe]
        if watching:
            documents, losses = document_losses(batch, torch.cat(result.nll).cpu())
            for brain in watching:
                brain.observe(documents, losses, self.training.seed)

    # --- a sleep ---

    def wants_sleep(self, phase: int) -> bool:
        """Whether to sleep before the next step: at a sleep phase, or because a module asks for it."""
        if self.spec.phases[phase].kind == "sleep":
            return True
        return (self.spec.phases[phase].kind == "pretrain" and self.progress.slept_at != self.progress.step
                and any(brain.wants_sleep(self.progress.step) for brain in self.brains.values()))

    def just_slept(self, phase: int) -> bool:
        """Whether a sleep phase begins right after a sleep."""
        return self.spec.phases[phase].kind == "sleep" and self.progress.slept_at == self.progress.step

    def sleep(self, phase: int, stopping: Callable[[], bool]) -> dict[str, Any] | None:
        """Let every sleeping module do its work; what they say of it, or None when it was interrupted.

        The checkpoint written before is what an interrupted sleep is resumed from: nothing of it is saved.
        """
        progress, started = self.progress, time.perf_counter()
        saved = progress.step == self.saved_step or self.save()
        pretraining = next(i for i, p in enumerate(self.spec.phases) if p.kind == "pretrain")
        interrupted = stopping if saved else lambda: False
        night = Night(model=self.model, optimizer=self.optimizer, step=progress.step, seed=self.training.seed,
                      checkpoints=self.regular_checkpoints(), interrupted=interrupted,
                      score=lambda: self.score(self.data[pretraining], self.training.validation_rows),
                      replay=lambda documents, steps, factor: self._replay(pretraining, documents, steps, factor,
                                                                           interrupted))
        said: dict[str, Any] = {}
        for brain in self.brains.values():
            if type(brain).sleep is not Brain.sleep:
                said |= brain.sleep(night)
        if interrupted():
            return None
        progress.slept_at = progress.step
        progress.sleeps += self.spec.phases[phase].kind == "sleep"
        progress.seconds += time.perf_counter() - started
        return said

    def _replay(self, phase: int, documents: np.ndarray, steps: int, factor: float,
                stopping: Callable[[], bool]) -> float:
        """Train on rows packed of these documents; they count as tokens of the budget, not as steps."""
        rows, context = self.hardware.sequences_per_step(), self.spec.context_length
        stream = PackedStream(self.data[phase].train, self.training.seed + self.progress.step, documents=documents)
        losses = []
        for number in range(steps):
            if stopping():
                break
            result = self._optimize(stream.batch(number * rows * context, rows, context), self.hardware.batch, factor)
            losses.append(float(result.loss.value))
            self.progress.tokens += rows * context
        return sum(losses) / max(len(losses), 1)

    # --- scoring and saving ---

    def score(self, prepared: Prepared, max_rows: int | None = None, stopping: Callable[[], bool] = lambda: False,
              scoring: Callable[[float], None] = lambda share: None) -> float:
        """Held-out bits per byte: of documents, or of the assistant's part of conversations."""
        heldout, context, rows = prepared.held_out(), self.spec.context_length, self.hardware.batch
        total = -(-min(max_rows or sys.maxsize, heldout.rows(context)) // rows)
        return bits_per_byte(self.model, heldout.batches(rows, context, max_rows), stopping=stopping,
                             precision=self.hardware.precision, progress=lambda done: scoring(done / total))

    def regular_checkpoints(self) -> list[Path]:
        """Those at the steps where one is due whatever happens, oldest first: the same after any interruption."""
        return [self.run.checkpoints / f"step-{step}" for step in checkpoint.steps(self.run.checkpoints)
                if step % self.training.checkpoint_every == 0 and step <= self.progress.step]

    def healthy(self) -> bool:
        return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def save(self, last: bool = False) -> bool:
        """Save a checkpoint. A disk that is full costs this checkpoint, not the run, unless it is the last one."""
        progress = self.progress
        progress.brain = {name: brain.state() for name, brain in self.brains.items()}
        try:
            saved = checkpoint.save(self.run.checkpoints, self.model, self.optimizer, progress,
                                    self.training.keep_checkpoints, self.training.checkpoint_every)
        except checkpoint.WRITE_ERRORS as error:
            what = f"step {progress.step}: the checkpoint could not be written ({' '.join(str(error).split())})"
            older = checkpoint.steps(self.run.checkpoints)
            kept = f"the newest complete one is step {older[-1]}" if older else "there is no older one"
            if last:
                raise Refused(f"{what}; {kept}; free some room on the disk and go on with --resume") from None
            print(f"warning: {what}; {kept}; training goes on", file=sys.stderr)
            return False
        self.saved_step = progress.step
        self.plugins.call("tryplicity_checkpoint_saved", run=self.run.folder, step=progress.step, checkpoint=saved)
        return True


def document_losses(batch: Batch, nll_BT: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the documents in a batch and the mean nats a token of each, in order of number."""
    row_starts = np.cumsum([0, *(len(row) for row in batch.documents[:-1])])
    place_BT = batch.doc_ids_BT.numpy() + row_starts[:, None]
    valid_BT = (batch.targets_BT != IGNORE).numpy()
    numbers, place = np.unique(np.concatenate(batch.documents), return_inverse=True)
    index_N = place[place_BT[valid_BT]]
    total = np.bincount(index_N, nll_BT.numpy()[valid_BT].astype(np.float64), minlength=len(numbers))
    count = np.bincount(index_N, minlength=len(numbers))
    return numbers[count > 0], total[count > 0] / count[count > 0]




def _check_belongs(saved: Path, progress: Progress) -> None:
    """Raises UserError when a checkpoint is of another architecture, other data or another seed."""
    theirs = checkpoint.read_progress(saved)
    for what, key in (("spec (its layers or sizes differ)", "identity"), ("data set", "data"), ("seed", "seed")):
        if getattr(theirs, key) != getattr(progress, key):
            raise UserError(f"{saved}: belongs to another {what}; give the one it was begun with, or another --run")
