"""What `tests.benchmarks.card` measures of a spec's training and decoding, each part in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCUMENTS = 6  # in a row
WARM, STEPS = 2, 5


class Place:
    """Where and on what a part works."""

    def __init__(self, spec: str, device: str, rows: int) -> None:
        self.spec, self.device, self.rows = spec, device, rows
        self.precision = "bf16" if device == "cuda" else "fp32"


class Trainer:
    """The project's own training step on random tokens."""

    def __init__(self, place: Place, compile_: str, checkpointing: bool = False, context: int | None = None) -> None:
        import torch

        from tryplicity import load_plugins
        from tryplicity.model import assemble
        from tryplicity.spec import load_spec
        from tryplicity.training.compiling import compile_blocks
        from tryplicity.training.step import decay_groups
        from tryplicity.world import World

        self.registry, self.place, self.said = load_plugins().registry, place, []
        self.spec = load_spec(place.spec, self.registry)
        self.strategy = self.registry.part("parallelism", "single").build()
        device = torch.device(place.device)
        self.model = self.strategy.place(assemble(self.spec), World(device=device), 0).train()
        compile_blocks(self.model, compile_, device, self.said.append)
        self.model.activation_checkpointing = checkpointing
        self.optimizer = self.spec.training.optimizer.build().build(*decay_groups(self.model))
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.steps = 0
        self.batch = self.rows_of(context or self.spec.context_length)

    def rows_of(self, context: int) -> Any:
        import torch

        from tryplicity.data import Batch

        place = self.place
        ids_BT = torch.randint(6, self.spec.vocab_size, (place.rows, context + 1), device=place.device)
        docs_BT = (torch.arange(context, device=place.device) * DOCUMENTS // context).to(torch.int32)
        return Batch(ids_BT[:, :-1], ids_BT[:, 1:].contiguous(), docs_BT.expand(place.rows, -1).contiguous(), 0)

    def step(self, batch: Any = None) -> Any:
        from tryplicity.training.step import training_step

        self.steps += 1
        return training_step(self.model, self.optimizer, self.strategy, batch or self.batch, step=self.steps,
                             micro_batch=self.place.rows, precision=self.place.precision, max_norm=1.0,
                             learning_rate_factor=0.1)

    def wait(self) -> None:
        import torch

        if self.place.device == "cuda":
            torch.cuda.synchronize()


def right(place: Place) -> dict[str, Any]:
    """What `tryplicity doctor` says, with compiled blocks."""
    done = subprocess.run([sys.executable, "-m", "tryplicity.cli", "doctor", place.spec, "--json", "--set",
                           f"training.compile={'on' if place.device == 'cuda' else 'off'}"],
                          capture_output=True, text=True, cwd=ROOT)
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr.strip())
    found = json.loads(done.stdout)
    wrong = [f"{trial['what']} (layers {trial['layers']}): {trial['said']}"
             for trial in found["trials"] if not trial["ok"]]
    return {"result": "; ".join(wrong) or f"all {len(found['trials'])} trials good", "ok": not wrong, "doctor": found}


def speed(place: Place, compile_: str, checkpointing: bool = False) -> dict[str, Any]:
    """Tokens per second of whole training steps, and the peak of memory beside the plan."""
    import torch

    trainer, started = Trainer(place, compile_, checkpointing), time.perf_counter()
    for _ in range(WARM):
        trainer.step()
    trainer.wait()
    ready, seconds = time.perf_counter() - started, []
    for _ in range(STEPS):
        started = time.perf_counter()
        trainer.step()
        trainer.wait()
        seconds.append(time.perf_counter() - started)
    tokens = trainer.batch.ids_BT.numel()
    found = {"tokens_per_second": tokens / statistics.median(seconds), "seconds_until_warm": ready,
             "fell_back": trainer.said}
    said = f"{found['tokens_per_second']:,.0f} tokens/s, warm after {ready:.0f} s"
    if place.device == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        said += f", peak {found['peak_gb']:.2f} GB"
    return {"result": said + "".join(f"; {line}" for line in trainer.said), "ok": not trainer.said, **found}


def compiled(place: Place) -> dict[str, Any]:
    return speed(place, "on")


def compiled_again(place: Place) -> dict[str, Any]:
    """In a second process: how long it takes with the code kept from the first."""
    return speed(place, "on", checkpointing=True)


def eager(place: Place) -> dict[str, Any]:
    return speed(place, "off")


def once(place: Place) -> dict[str, Any]:
    """Ten steps of two lengths, in which compiling anything twice is an error."""
    import torch._dynamo

    with torch._dynamo.config.patch(error_on_recompile=True):
        trainer = Trainer(place, "on" if place.device == "cuda" else "off")
        short = trainer.rows_of(max(8, trainer.spec.context_length // 8))
        for number in range(10):
            trainer.step(short if number < 5 else trainer.batch)
    return {"result": "; ".join(trainer.said) or "nothing was compiled twice", "ok": not trainer.said}


def waits(place: Place) -> dict[str, Any]:
    """Where the host waits for the device within a step, from the batch in its memory to the optimizer."""
    import warnings

    import torch

    from tryplicity.training.step import on_device

    trainer = Trainer(place, "on" if place.device == "cuda" else "off")
    trainer.step()
    batch = on_device(trainer.batch, torch.device("cpu"))
    trainer.wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if place.device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        trainer.step(on_device(batch, torch.device(place.device)))
        if place.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    where = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)})
    return {"result": ", ".join(where) or "nowhere", "ok": not where, "waits": where}


def profile(place: Place) -> dict[str, Any]:
    """Where the time of three steps goes."""
    import torch
    from torch.profiler import ProfilerActivity

    trainer = Trainer(place, "on" if place.device == "cuda" else "off")
    for _ in range(WARM):
        trainer.step()
    on_card = place.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            trainer.step()
        trainer.wait()
    rows = [(event.key, (event.self_device_time_total if on_card else event.self_cpu_time_total) / 3000, event.count)
            for event in profiler.key_averages()]
    rows.sort(key=lambda row: -row[1])
    busy = sum(ms for _, ms, _ in rows)
    return {"result": f"{busy:,.0f} ms a step busy; most: " + ", ".join(f"{name[:40]} {ms:.1f}" for name, ms, _ in
                                                                        rows[:4]),
            "ok": True, "milliseconds": [{"what": name, "ms": ms, "count": count} for name, ms, count in rows[:40]]}


def decoding(place: Place) -> dict[str, Any]:
    """Tokens per second of one text."""
    import torch

    trainer = Trainer(place, "off")
    model, tokens = trainer.model.eval(), 16
    state, ids = model.new_state(1), torch.randint(6, 200, (1, 64), device=place.device)
    with torch.no_grad():
        model(ids, state=state, last_only=True)
        for _ in range(2):
            trainer.wait()
            started = time.perf_counter()
            for _ in range(tokens):
                ids = model(ids[:, -1:], state=state, last_only=True).argmax(-1)
            trainer.wait()
    per_second = tokens / (time.perf_counter() - started)
    return {"result": f"{per_second:.1f} tokens/s in fp32, one text", "ok": True, "tokens_per_second": per_second}
