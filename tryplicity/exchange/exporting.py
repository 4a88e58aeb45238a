"""A run as a folder in transformers' form: what was imported goes out again bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tryplicity.data.vocabulary import CONFIG, END_TOKENS, vocabulary_of
from tryplicity.errors import UserError
from tryplicity.exchange.foreign import INDEX, read_json
from tryplicity.exchange.importing import architecture_of, spec_data
from tryplicity.exchange.mapping import as_theirs, table
from tryplicity.files import whole_folder
from tryplicity.inference.packed import Opened, open_model
from tryplicity.progress import CountProgress, no_count_progress
from tryplicity.run import Run
from tryplicity.spec import load_spec
from tryplicity.spec.loader import dump_yaml, parse_yaml
from tryplicity.training.saved import Entry, SavedTensors, open_files, write_entries

SHARD = 5_000_000_000  # bytes of a file, where no tensor is larger



@dataclass(frozen=True)
class Exported:
    """What went out."""

    path: Path
    model_type: str
    tensors: int
    bytes: int
    left_out: tuple[str, ...]  # our tensors that have no place there


def export_transformers(run_folder: Path, out: Path, registry: Any, progress: CountProgress = no_count_progress,
                        shard: int = SHARD) -> Exported:
    """Write config.json, safetensors and the tokenizer's files into a new folder.

    Raises UserError for a run that was not imported, or whose spec is not that of its origin any more.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; give another --out, or move it away")
    opened = open_model(run_folder, registry)
    config, generation = origin(opened, run_folder, registry)
    architecture = architecture_of(config, str(run_folder), registry)
    ours = saved(opened)
    entries = as_theirs(ours, architecture, config)
    config = {**config, **_dtype(config, entries)}
    left_out = tuple(sorted(name for name in ours.names - set(table(architecture, config)) if _says(ours[name])))
    try:
        with whole_folder(out) as temporary:
            files = _write_shards(temporary, entries, shard, progress)
            (temporary / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
            (temporary / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
            _write_tokenizer(temporary, opened)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None
    return Exported(out, architecture.name, len(entries), sum((out / name).stat().st_size for name in files), left_out)


def origin(opened: Opened, run_folder: Path, registry: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config.json and generation_config.json that a run came with. Raises UserError without them, and where they
    do not describe what the run is now."""
    path = Run(run_folder).origin
    if not path.is_file():
        raise UserError(f"{run_folder}: this run was not imported, so that nothing says which published architecture "
                        "it is; export it as packed, or serve it")
    said = read_json(path)
    config, generation = said.get("config"), said.get("generation")
    if not isinstance(config, dict) or not isinstance(generation, dict):
        raise UserError(f"{path}: does not say what was imported; import the model again")
    architecture = architecture_of(config, str(path), registry)
    data = {"name": opened.spec.name, **spec_data(architecture, config, str(path))}
    data["context_length"] = opened.spec.context_length
    there = load_spec(parse_yaml(dump_yaml(data), str(path)), registry)
    if there.identity() != opened.spec.identity():
        raise UserError(f"{run_folder}: its spec is not that of the {architecture.name} it came from any more; "
                        "transformers has no model of this kind")
    return config, generation


def saved(opened: Opened) -> SavedTensors:
    """The weights of an opened run, read one by one."""
    return opened.weights if isinstance(opened.weights, SavedTensors) else open_files(opened.path,
                                                                                      [opened.weights.path])


def _says(tensor: Tensor) -> bool:
    """Whether it is more than what a model begins with: zeros or ones throughout."""
    return bool((tensor != 0).any() and (tensor != 1).any())


def _dtype(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, str]:
    """What the config has to say of the weights' dtype, where that changed."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    largest = max(entries.values(), key=lambda entry: entry.shape)
    found = str(largest.dtype).removeprefix("torch.")
    return {key: found} if config.get(key) not in (None, found) else {}


def _write_shards(folder: Path, entries: Mapping[str, Entry], limit: int, progress: CountProgress) -> list[str]:
    """The names of the files written."""
    def size(entry: Entry) -> int:
        count = entry.dtype.itemsize
        for length in entry.shape:
            count *= length
        return count

    shards: list[dict[str, Entry]] = [{}]
    room = limit
    for name, entry in entries.items():
        if size(entry) > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = entry
        room -= size(entry)
    total, before, places, names = sum(map(size, entries.values())), 0, {}, []
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_entries(folder / name, shard, lambda done, _, before=before: progress(before + done, total))
        before += sum(map(size, shard.values()))
        places |= dict.fromkeys(shard, name)
        names.append(name)
    if len(shards) > 1:
        said = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(said, indent=2), encoding="utf-8")
    return names


def _write_tokenizer(folder: Path, opened: Opened) -> None:
    config = {key: value for key, value in vocabulary_of(opened.tokenizer).config.items() if key != END_TOKENS}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer.json").write_text(opened.tokenizer.to_str(), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
