"""A model that is trained on the way to something else, by code: what `tryplicity train` does on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tryplicity.run import Run
from tryplicity.training.folder import alone

if TYPE_CHECKING:
    from tryplicity.components import Source


def train_reference(spec: str, source: Source, folder: Path, steps: int, settings: Sequence[str] = (),
                    hardware: str = "cpu") -> Run:
    """Train a spec on a source for so many steps into a run folder, unless that is done; one that was cut short is gone
    on with. One thread works on a CPU, so that the same steps give the same weights however often they were cut short.

    spec, hardware: a file or an installed name. settings: `path=value` texts. Raises KeyboardInterrupt when a signal
    stopped it, once all is saved, and UserError where the spec or the data cannot be used.
    """
    from tryplicity.builder import build
    from tryplicity.data import prepare
    from tryplicity.plugins import load_plugins
    from tryplicity.spec import dump_yaml
    from tryplicity.training.loop import Budget, train

    run = Run(folder)
    if run.weights.exists():
        return run
    plugins = load_plugins()
    built = build(spec, hardware, plugins.registry, settings)
    threads = torch.get_num_threads()
    try:
        if built.hardware.torch_device == "cpu":
            torch.set_num_threads(1)
        with alone(run):
            begun = run.exists()
            prepared = prepare(source, built.spec.vocab_size, tokenizer=run.tokenizer if begun else None)
            if not begun:
                run.create(spec=built.spec.as_yaml(), hardware=dump_yaml(asdict(built.hardware)),
                           build=built.plan.as_dict(), tokenizer=prepared.tokenizer_path.read_text(encoding="utf-8"),
                           tokenizer_config=prepared.tokenizer_config,
                           data={"source": source.name, "fingerprint": prepared.identity, "left_out": {}})
            outcome = train(built, prepared, run, Budget(steps=steps), plugins, resume=begun)
    finally:
        torch.set_num_threads(threads)
    if outcome.signal is not None:
        raise KeyboardInterrupt(f"{folder}: interrupted at step {outcome.progress.step} of {steps}; it is saved, and "
                                "gone on with by the same command")
    return run
