"""What `tryplicity eval` says: a model's bits per byte by domain, beside what needs no model, as JSON and as a page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tryplicity.data import bigram, yardsticks
from tryplicity.data.documents import unit_hash
from tryplicity.data.tokenizer import load_tokenizer
from tryplicity.errors import UserError
from tryplicity.evaluation.heldout import Measured, Training, other, own, run_of, training_of
from tryplicity.evaluation.score import Score, by_domain
from tryplicity.inference.packed import Info, load_model, open_model
from tryplicity.progress import Progress


def evaluate(what: Path, registry: Any, data: str | None, share: float, device: str, progress: Progress,
             warn: Any) -> dict[str, Any]:
    """The whole report of a run folder, a checkpoint or an exported file. warn: called with a line for the user."""
    opened = open_model(what, registry)
    if opened.tokenizer is None:
        raise UserError(f"{what}: this model came without a tokenizer, and cannot read text; export it again with "
                        "--tokenizer FILE")
    run = run_of(what)
    if run is not None and load_tokenizer(run.tokenizer).to_str() != opened.tokenizer.to_str():
        run = None  # a file of another run, written here
    if run is None and data is None:
        raise UserError(f"{what}: lies in no run folder, so that nothing says what was held out; give --data SOURCE")
    training = None
    try:
        if run is not None:
            training = training_of(run, opened.spec.vocab_size, registry, progress)
    except UserError as error:
        if data is None:
            raise
        warn(f"warning: overlap with the training text is not known: {error}")
    if training is not None and not training.same:
        warn(f"warning: {training.source} no longer gives the documents that the run was trained on; what the run held "
             "out of those that are still there is held out now")
    model, _, tokenizer, info = load_model(opened, registry, device, ternary=False)
    if data is None:
        assert training is not None
        return _report(model, info, own(training), training, progress)
    with other(data, share, tokenizer, registry, progress) as measured:
        return _report(model, info, measured, training, progress)


def _report(model: Any, info: Info, measured: Measured, training: Training | None,
            progress: Progress) -> dict[str, Any]:
    scores = by_domain(model, measured.tokens, lambda done, total: progress("scoring", done, total))
    whole = sum(scores.values(), Score(0.0, 0, 0, 0))
    if whole.bits_per_byte is None:
        raise UserError(f"{measured.source}: the held-out part has nothing to predict; give more text")
    progress("measuring the yardsticks", 0, None)
    domains = {domain: {**_figures(score), "xz": yardsticks.xz_bits_per_byte(_sample(measured, domain))}
               for domain, score in scores.items()}
    return {
        "model": {"name": info.name, "path": str(info.path), "format": info.format, "weights": info.weights_hash},
        "held_out": {"source": measured.source, "identity": measured.identity(), "own": measured.share is None,
                     "share": measured.share},
        **_figures(whole), "domains": domains,
        "training_data": None if training is None else {"source": training.source, "unchanged": training.same},
        "yardsticks": _yardsticks(measured, training, progress),
    }


def _figures(score: Score) -> dict[str, Any]:
    return {"bits_per_byte": score.bits_per_byte, "documents": score.documents, "bytes": score.bytes,
            "tokens": score.tokens}


def _sample(measured: Measured, domain: str | None = None) -> bytes:
    """Held-out text for the compressors: all, or an even choice of documents of about so many bytes."""
    size = sum(len(text.encode()) for text in measured.texts(domain))
    chosen = (text for text in measured.texts(domain)
              if size <= yardsticks.SCORED or unit_hash(text, "yardsticks") < yardsticks.SCORED / size)
    return "".join(chosen).encode()


def _yardsticks(measured: Measured, training: Training | None, progress: Progress) -> dict[str, Any]:
    """As a training's, see `tryplicity.data.yardsticks`; what the training text is needed for is None where it is not
    known."""
    if training is not None and measured.share is None:
        return asdict(training.prepared.yardsticks(progress))
    scored = _sample(measured)
    found = dict.fromkeys(yardsticks.Yardsticks.__dataclass_fields__)
    found |= {"xz": yardsticks.xz_bits_per_byte(scored), "scored_bytes": len(scored)}
    if training is None:
        return found
    prepared = training.prepared
    size = sum(part["bytes"] for part in prepared.manifest["parts"]["train"]["domains"].values())
    primed = "".join(prepared.sample(False, yardsticks.PRIMED, size)).encode()
    compared = 0

    def told(text: str) -> None:
        nonlocal compared
        compared += len(text.encode())

    held_in = prepared.collection.documents
    return found | {
        "bigram": bigram.bits_per_byte((d.text.encode() for d in held_in(False)),
                                       (text.encode() for text in measured.texts())),
        "xz_primed": yardsticks.xz_bits_per_byte(scored, primed), "ppm": yardsticks.ppm_bits_per_byte(scored, primed),
        "primed_bytes": len(primed), "train_bytes": size,
        "overlap": yardsticks.overlap(measured.texts(), prepared.sample(False, yardsticks.COMPARED, size), told),
        "compared_bytes": compared}


def sentences(said: dict[str, Any]) -> list[str]:
    """What a person reads below the table."""
    held, found = said["held_out"], said["yardsticks"]
    of = "the run's own held-out documents of" if held["own"] else (
        "all of" if held["share"] >= 1 else f"the documents below {held['share']:g} by hash of")
    lines = [f"{of} {held['source']}, identity {held['identity'][:16]}: figures of the same identity can be compared"]
    if found["ppm"] is None:
        return [*lines, f"the same text without any model: xz {found['xz']:.3f} bits per byte",
                "overlap with the training text: not known"]
    return [*lines, f"a byte bigram model of the training text: {found['bigram']:.3f} bits per byte",
            *yardsticks.Yardsticks(**found).sentences()]
