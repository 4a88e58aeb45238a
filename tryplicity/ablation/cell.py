"""The process that trains one cell: `python -m tryplicity.ablation.cell FOLDER`.

The folder is a run folder with a cell.json. It says on stdout how far it is, one JSON object a line; it stops,
saving first, on SIGTERM and when its stdin closes, that is, when whoever started it is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tryplicity.ablation.cells import result
from tryplicity.errors import Refused, UserError
from tryplicity.files import locked
from tryplicity.run import Run
from tryplicity.training.folder import clear

if TYPE_CHECKING:
    from tryplicity.data import HeldOut, Prepared

BUSY = 75  # exit code: another process has the cell


def main() -> int:
    stop_with_parent()
    folder = Path(sys.argv[1])
    with locked(Run(folder).lock) as other:
        if other is not None:
            return BUSY
        if result(folder) is not None:
            return 0
        try:
            clear(Run(folder))
            return run(folder)
        except (UserError, Refused, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2 if isinstance(error, UserError) else 1


def stop_with_parent() -> None:
    """Asks this process to stop when its stdin closes."""

    def wait() -> None:
        while sys.stdin.buffer.raw.read(1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


@dataclass(frozen=True)
class Loaded:
    """What training a cell's run folder needs."""

    build: Any
    prepared: Prepared
    plugins: Any
    settings: dict[str, Any]


def load(folder: Path) -> Loaded:
    """Build a cell's spec and find its data. Raises UserError when the data is no longer the same."""
    from tryplicity.training.process import limit_spinning, tune_malloc

    limit_spinning()
    import torch

    from tryplicity.builder import build
    from tryplicity.data import parse_source, prepare
    from tryplicity.plugins import load_plugins

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tune_malloc()
    run, settings = Run.open(folder), json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    plugins = load_plugins(settings["plugin_files"])
    built = build(str(run.spec), str(run.hardware), plugins.registry)
    prepared = prepare(parse_source(plugins.registry, settings["data"]), built.spec.vocab_size,
                       tokenizer=run.tokenizer)
    if prepared.identity != settings["data_identity"]:
        raise UserError(f"{settings['data']}: the data is not what this cell was begun with; give another --out")
    return Loaded(built, sampled(prepared, settings["rows"]), plugins, settings)


def sampled(prepared: Prepared, rows: int) -> Prepared:
    """The same data, of whose held-out part so many rows are scored, spread evenly; 0: all."""
    from tryplicity.data import HeldOut, Prepared

    class Rows(HeldOut):
        def batches(self, size: int, context_length: int, max_rows: int | None = None) -> Any:
            return super().batches(size, context_length, min(rows, max_rows or rows))

    class Sampled(Prepared):
        def held_out(self, domains: list[str] | None = None) -> HeldOut:
            return Rows(self.heldout, domains)

    return Sampled(**{f.name: getattr(prepared, f.name) for f in fields(prepared)}) if rows else prepared


def run(folder: Path) -> int:
    """Train the cell from where it stands; 130 or 143 when it was stopped."""
    import shutil

    import torch

    begun, loaded = commit(), load(folder)
    from tryplicity.files import write_text
    from tryplicity.training.loop import Budget, train
    from tryplicity.training.metrics import read_lines
    from tryplicity.training.process import exit_code
    from tryplicity.training.watchers import Watcher

    class Telling(Watcher):
        told = 0.0

        def step(self, progress: Any, metrics: dict[str, Any], spent: float, seconds_left: float) -> None:
            if time.monotonic() - self.told > 1:
                self.told = time.monotonic()
                with contextlib.suppress(OSError):  # nobody listens any more: the end is near, but saved first
                    print(json.dumps({"spent": spent, "left": seconds_left, "seconds": progress.seconds}), flush=True)

    settings, cell_run = loaded.settings, Run(folder)
    outcome = train(loaded.build, loaded.prepared, cell_run, Budget(tokens=settings["tokens"]), loaded.plugins,
                    resume=True, watcher=Telling())
    if outcome.signal is not None:
        return exit_code(outcome.signal)
    losses = [line["loss"] for line in read_lines(cell_run.metrics) if line.get("loss") is not None]
    tail = losses[-max(1, len(losses) // 20):]
    write_text(folder / "result.json", json.dumps({
        **{name: settings[name] for name in ("key", "label", "seed", "rows", "data", "data_identity")},
        "held_out_bits_per_byte": outcome.bits_per_byte, "training_loss": sum(tail) / len(tail),
        "steps": outcome.progress.step, "tokens": outcome.progress.tokens, "seconds": outcome.progress.seconds,
        "commit": begun, "torch": torch.__version__, "threads": torch.get_num_threads()}, indent=1))
    shutil.rmtree(cell_run.checkpoints, ignore_errors=True)  # a finished cell keeps its weights and its metrics
    return 0


def commit() -> str | None:
    """The commit of this code, with a + if files differ from it; None without git."""
    import subprocess

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "../run.py")  # it could be installed inside another repository
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
