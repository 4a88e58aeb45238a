"""Faults of the wiring that once went unnoticed, all at once, through 2,819 green tests. `python -m tests.mutation
planted` plants them again; `tests/test_planted.py` holds that each still fits the code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """`before` stands once in the file, and is exchanged for `after`."""

    name: str
    file: str
    before: str
    after: str

    def plant(self, source: str) -> str:
        assert source.count(self.before) == 1, f"{self.name}: {self.file} no longer reads {self.before!r} once"
        return source.replace(self.before, self.after)

    def lines(self, root: Path) -> tuple[int, int]:
        source = (root / self.file).read_text(encoding="utf-8")
        first = source[:source.index(self.before)].count("\n") + 1
        return first, first + self.before.count("\n")


STEP, SESSION = "tryplicity/training/step.py", "tryplicity/training/session.py"
ADAMW, WSD = "plugins/optimization/adamw.py", "plugins/optimization/wsd.py"

PLANTED = [
    Fault("after_step is never called", STEP, "model.after_step(step, result.stats)", "pass"),
    Fault("the heads' weights are all one", "tryplicity/model.py",
          "{name: head.weight for name, head in self.heads.items()}", "{name: 1.0 for name in self.heads}"),
    Fault("activation checkpointing is never switched on", SESSION,
          "self.model.activation_checkpointing = self.hardware.activation_checkpointing",
          "self.model.activation_checkpointing = False"),
    Fault("precision is always fp32", SESSION, "micro_batch=micro_batch, precision=self.hardware.precision",
          "micro_batch=micro_batch, precision='fp32'"),
    Fault("autocast is never entered", STEP, "with autocast(batch.ids_BT.device.type, precision):",
          "with nullcontext():"),
    Fault("AdamW's betas are exchanged", ADAMW, "betas=(c.beta1, c.beta2)", "betas=(c.beta2, c.beta1)"),
    Fault("nothing is decayed", ADAMW, '"params": decayed, "weight_decay": c.weight_decay',
          '"params": decayed, "weight_decay": 0.0'),
    Fault("everything is decayed", ADAMW, '"params": undecayed, "weight_decay": 0.0',
          '"params": undecayed, "weight_decay": c.weight_decay'),
    Fault("the schedule never falls", WSD, "if c.decay == 0 or progress <= start:", "if True:"),
    Fault("the schedule falls linearly", WSD, "fallen**0.5", "fallen"),
    Fault("micro-batches are of the wrong size", SESSION,
          "max(1, self.hardware.batch * self.spec.context_length // stage.context_length)", "rows"),
    Fault("--chat-data is ignored", "tryplicity/commands/train.py", "named(chat_data, plugins, \"chat\")",
          "named(None, plugins, \"chat\")"),
    Fault("the time left has the wrong sign", "tryplicity/training/pace.py", "max(0.0, 1.0 - last.spent)",
          "max(0.0, last.spent)"),
    Fault("the gate's mean is constant", "tryplicity/server/limits.py",
          "self.mean_seconds += 0.2 * (time.monotonic() - start - self.mean_seconds)", "pass"),
    Fault("Retry-After is constant", "tryplicity/server/service.py",
          "max(1, min(60, math.ceil(self.gate.mean_seconds * (waiting + 1) / slots)))", "1"),
    Fault("the gate's Retry-After is constant", "tryplicity/server/limits.py",
          "max(1, min(60, round(self.mean_seconds)))", "1"),
    Fault("the histogram's borders are others", "tryplicity/server/metrics.py", "0.25, 0.5, 1.0, 2.5",
          "0.3, 0.6, 1.2, 2.4"),
    Fault("the plan forgets the batch's buffers", "tryplicity/planner/__init__.py",
          "counts.buffer_bytes + bytes_of_a_row(model) * hardware.batch * hardware.accumulation",
          "counts.buffer_bytes"),
    Fault("the plan forgets a layer's extra FLOPs", "tryplicity/planner/stages.py",
          "sum(m.extra_flops(given.doc_ids_BT.numel()) for m in block.modules() if isinstance(m, Layer))", "0"),
    Fault("gradients are not clipped", STEP, "strategy.clip_gradients(model, max_norm)",
          "strategy.clip_gradients(model, 1e9)"),
    Fault("what writes into the residual begins as large as all else", "tryplicity/components/module.py",
          "0.02 / (2 * self.layers) ** 0.5 if writes_residual else 0.02", "0.02"),
    Fault("a passage's first paragraph counts as the rest", "tryplicity/search/index.py", "_LEAD = 2.0", "_LEAD = 0.0"),
    Fault("Python's own pages do not come first", "tryplicity/search/index.py", "_HOME = 2.0", "_HOME = 1.0"),
    Fault("one shared word bears out a citation", "tryplicity/search/citations.py", "_FEWEST_SHARED = 2",
          "_FEWEST_SHARED = 1"),
]
