"""Sleep: between two steps the model repairs itself, dreams of what it found hard, and averages its recent selves."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from tryplicity import Brain, Night, Some, Steps, saved_weights

KEENNESS = 2.0  # a document a nat harder than usual is e^2 times as likely to be kept
SMOOTHING = 0.05  # weight of the latest step in the usual loss


class Reservoir:
    """A bounded sample of the documents seen, those with a high loss preferred.

    Weighted sampling by exponential keys (Efraimidis and Spirakis, "Weighted random sampling with a reservoir",
    Inf. Proc. Letters 97, 2006, algorithm A-Res): the documents with the largest u^(1 / weight). u is a hash of
    the seed, the night and the document, so the sample depends on nothing but what was seen. The weight grows with
    how much harder than usual a document was when it was last seen; against the usual loss of that time, or the
    reservoir would hold what a young model saw. Keys are kept as logarithms.
    """

    def __init__(self, size: int) -> None:
        self.size, self.nights = size, 0
        self.usual: float | None = None
        self.held: dict[int, tuple[float, float]] = {}  # document -> its key, its latest loss

    def observe(self, documents: np.ndarray, losses: np.ndarray, seed: int) -> None:
        seen: dict[int, list[float]] = {}
        for document, loss in zip(documents.tolist(), losses.tolist(), strict=True):
            if math.isfinite(loss):
                seen.setdefault(document, []).append(loss)
        if not seen:
            return
        latest = {document: math.fsum(several) / len(several) for document, several in seen.items()}
        now = math.fsum(latest.values()) / len(latest)  # exact sums: the order of a batch must not matter
        self.usual = now if self.usual is None else self.usual + SMOOTHING * (now - self.usual)
        for document, loss in latest.items():
            weight = math.exp(min(max(KEENNESS * (loss - self.usual), -50.0), 50.0))
            self.held[document] = (math.log(self._uniform(document, seed)) / weight, loss)
        if len(self.held) > self.size:
            ranked = sorted(self.held.items(), key=lambda item: (-item[1][0], item[0]))
            self.held = dict(ranked[:self.size])

    def _uniform(self, document: int, seed: int) -> float:
        """Between 0 and 1, and never either."""
        digest = hashlib.blake2b(f"{seed} {self.nights} {document}".encode(), digest_size=8).digest()
        return ((int.from_bytes(digest, "little") >> 12) + 0.5) / 2.0**52

    def documents(self) -> np.ndarray:
        return np.array(sorted(self.held), dtype=np.int64)

    def mean_loss(self) -> float:
        return math.fsum(loss for _, loss in self.held.values()) / len(self.held)

    def begin_anew(self) -> None:
        """What was replayed is done with; the next night is about the next day."""
        self.nights, self.held = self.nights + 1, {}

    def state(self) -> dict[str, Any]:
        held = sorted(self.held.items())
        return {"nights": self.nights, "usual_loss": self.usual, "documents": [document for document, _ in held],
                "keys": [key for _, (key, _) in held], "losses": [loss for _, (_, loss) in held]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.nights, self.usual = state["nights"], state["usual_loss"]
        kept = zip(state["documents"], state["keys"], state["losses"], strict=True)
        self.held = {document: (key, loss) for document, key, loss in kept}


class SleepConsolidation(Brain):
    """Repair, replay, average: at a `sleep` phase, and every `every` steps of pretraining.

    First every module repairs itself: unused experts are drawn anew, strayed spike thresholds re-centred. Then the
    documents that were hardest since the last sleep are trained on again, slowly. Last, the weights are averaged
    with those of the latest checkpoints (as in stochastic weight averaging, arXiv:1803.05407), and the average is
    kept only if the model then predicts held-out text better.
    """

    name = "sleep_consolidation"

    @dataclass(frozen=True)
    class Config:
        every: Steps | None = None
        """Pretraining steps between two sleeps; by default the model sleeps only at the spec's sleep phases."""
        replay_steps: Some = 20
        """Optimizer steps on the documents held in the reservoir."""
        replay_learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
        """Their learning rate, as a share of the optimizer's own."""
        reservoir: Steps = 256
        """The most documents held for replay."""
        min_use: Annotated[float, Field(ge=0, lt=1)] = 0.1
        """An expert chosen less than so many times its even share is drawn anew; 0: never."""
        average: Some = 2
        """Of how many of the latest checkpoints the weights are averaged with the current ones (as many as are on
        the disk: see training.keep_checkpoints); 0: none."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.reservoir = Reservoir(config.reservoir)

    def observe(self, documents: np.ndarray, losses: np.ndarray, seed: int) -> None:
        self.reservoir.observe(documents, losses, seed)

    def wants_sleep(self, step: int) -> bool:
        return self.config.every is not None and step > 0 and step % self.config.every == 0

    def state(self) -> dict[str, Any]:
        return self.reservoir.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.reservoir.load_state(state)

    def sleep(self, night: Night) -> dict[str, float]:
        """`bits_per_byte_before`, `_replayed` (after repair and replay), `_averaged` (of the average, kept or not)
        and `_after`; `averaging_kept` 1 or 0, `averaged_checkpoints`; `replayed_documents`, `replay_loss`, and
        `remembered_loss` of the same documents when they were last seen; and what each module said of its repair."""
        said: dict[str, float] = {"bits_per_byte_before": night.score()}
        redrawn, repairs = self._repair(night)
        said |= repairs
        if night.interrupted():
            return said
        documents = self.reservoir.documents()
        if self.config.replay_steps and len(documents):
            said["replayed_documents"] = float(len(documents))
            said["remembered_loss"] = self.reservoir.mean_loss()
            said["replay_loss"] = night.replay(documents, self.config.replay_steps, self.config.replay_learning_rate)
            if night.interrupted():
                return said
        said["bits_per_byte_replayed"] = said["bits_per_byte_after"] = night.score()
        if self.config.average and night.checkpoints and not night.interrupted():
            said |= self._average(night, redrawn, said["bits_per_byte_after"])
        if not night.interrupted():
            self.reservoir.begin_anew()
        return said

    def _repair(self, night: Night) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Let every module repair itself, and let the optimizer forget what it knew of the rows drawn anew: by
        parameter, a mask of them. The repairs' choices follow from what is the same on all ranks."""
        generator = torch.Generator().manual_seed((night.seed * 1_000_003 + night.step) % 2**63)
        redrawn: dict[str, Tensor] = {}
        said: dict[str, float] = {}
        for path, part in _parts(night.model):
            if any(hasattr(module, "consolidate") for module in part.modules()):
                with night.strategy.whole(part, write=True):
                    self._repair_part(path, part, generator, redrawn, said)
        for name, parameter in night.model.named_parameters():
            if name in redrawn:
                night.strategy.forget(night.optimizer, parameter, redrawn[name])
        return redrawn, said

    def _repair_part(self, path: str, part: nn.Module, generator: torch.Generator, redrawn: dict[str, Tensor],
                     said: dict[str, float]) -> None:
        for where, module in part.named_modules(prefix=path):
            repair = module.consolidate(self.config.min_use, generator) if hasattr(module, "consolidate") else None
            if repair is None:
                continue
            place = [step for step in where.split(".") if step != "layer"]  # as in metrics
            said |= {".".join([*place, name]): value for name, value in repair.stats.items()}
            for name, mask in repair.reset.items():
                redrawn[f"{where}.{name}"] = mask

    @torch.no_grad()
    def _average(self, night: Night, redrawn: dict[str, Tensor], score: float) -> dict[str, float]:
        """The mean of the weights and those of the latest checkpoints, one tensor of them in memory at a time; put
        back as they were unless the mean scores better. Buffers, and rows drawn anew this night, are not averaged."""
        paths = night.checkpoints[-self.config.average:]
        before = {name: _own(parameter).to("cpu", copy=True) for name, parameter in night.model.named_parameters()}
        saved = [saved_weights(path) for path in paths]
        for path, part in _parts(night.model):
            with night.strategy.whole(part, write=True):
                for name, parameter in part.named_parameters(path):
                    if parameter.is_floating_point():
                        _average_in(parameter, [weights[name] for weights in saved], redrawn.get(name))
        averaged = night.score()
        kept = averaged < score
        if not kept:
            for name, parameter in night.model.named_parameters():
                _own(parameter).copy_(before[name])
        return {"averaged_checkpoints": float(len(paths)), "bits_per_byte_averaged": averaged,
                "averaging_kept": float(kept), "bits_per_byte_after": averaged if kept else score}


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What is looked at in one piece: each block, and each of what stands around them."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{i}", block) for i, block in child.named_children())
        else:
            yield name, child


def _average_in(parameter: Tensor, others: list[Tensor], redrawn: Tensor | None) -> None:
    """The mean of a parameter and others, but for rows drawn anew."""
    mean = parameter.detach().float()
    for other in others:
        mean = mean + other.to(parameter.device, torch.float32)
    mean = mean / (len(others) + 1)
    if redrawn is not None:
        mask = redrawn.to(parameter.device)
        mean[mask] = parameter.detach()[mask].float()
    parameter.copy_(mean)


def _own(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter."""
    parameter = parameter.detach()
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
