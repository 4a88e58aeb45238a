"""A run as a folder in transformers' form: what was imported goes out again bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tryplicity.components import Architecture
from tryplicity.data.vocabulary import BOS, CONFIG, END_TOKENS, EOS, PAD, SPECIAL_TOKENS, vocabulary_of
from tryplicity.errors import UserError
from tryplicity.exchange.foreign import INDEX, read_json
from tryplicity.exchange.importing import architecture_of, spec_data
from tryplicity.exchange.mapping import as_theirs, table
from tryplicity.files import whole_folder
from tryplicity.inference.packed import Opened, open_model
from tryplicity.model import Model, assemble
from tryplicity.progress import CountProgress, no_count_progress
from tryplicity.run import Run
from tryplicity.spec import Spec, load_spec
from tryplicity.spec.loader import dump_yaml, parse_yaml
from tryplicity.training.saved import Entry, SavedTensors, open_files, write_entries

#: how a tokenizer of ours writes a conversation (`ChatFormat`), for other programs
CHATML = ("{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
          "+ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
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

    Raises UserError for a run whose spec is none of an architecture that is there, or not that of its origin any more.
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
    """The config.json and generation_config.json of a run: those that it came with, or those of an architecture whose
    model it is. Raises UserError where there is none."""
    path = Run(run_folder).origin
    if not path.is_file():
        return written_anew(opened, run_folder, registry)
    said = read_json(path)
    config, generation = said.get("config"), said.get("generation")
    if not isinstance(config, dict) or not isinstance(generation, dict):
        raise UserError(f"{path}: does not say what was imported; import the model again")
    architecture = architecture_of(config, str(path), registry)
    if not _gives(architecture, config, opened, str(path), registry):
        raise UserError(f"{run_folder}: its spec is not that of the {architecture.name} it came from any more; "
                        "transformers has no model of this kind")
    return config, generation


def _gives(architecture: type[Architecture], config: Mapping[str, Any], opened: Opened, where: str,
           registry: Any) -> bool:
    """Whether the architecture reads the config as the run's model, but for what is there in training alone."""
    data = {"name": opened.spec.name, **spec_data(architecture, config, where)}
    data["context_length"] = opened.spec.context_length
    there = load_spec(parse_yaml(dump_yaml(data), where), registry)
    if not _alike(_served(opened.spec), _served(there)):
        return False
    found, due = (_shapes(model) for model in (opened.model, assemble(there)))
    return found == due


def _served(spec: Spec) -> dict[str, Any]:
    """What the next token's logits come from."""
    return {name: value for name, value in spec.architecture().items() if name not in ("heads", "brain")}


def _alike(here: Any, there: Any) -> bool:
    """Whether options are the same. A size that is left to its default here is what it is there where all shapes are
    alike, which is looked at next."""
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        return here.keys() == there.keys() and all(_alike(value, there[key]) for key, value in here.items())
    if isinstance(here, list | tuple) and isinstance(there, list | tuple):
        return len(here) == len(there) and all(map(_alike, here, there))
    return here == there or (here is None and type(there) is int)


def _shapes(model: Model) -> dict[str, Any]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()
            if not name.startswith(("heads.", "objectives.")) and ".objectives." not in name}


def written_anew(opened: Opened, run_folder: Path, registry: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json of a run that was trained here: of the first architecture that takes its
    spec for its own. Raises UserError where none does."""
    spec, asked = opened.spec.architecture(), []
    for name in registry.names("architecture"):
        architecture = registry.get("architecture", name)
        if architecture.config.__func__ is Architecture.config.__func__:
            continue
        asked.append(name)
        try:
            config = architecture.config(spec)
            if config is None:
                continue
            config = {"model_type": name, **config}
            if not _gives(architecture, config, opened, f"{run_folder} (as a {name})", registry):
                continue
        except (KeyError, TypeError, StopIteration, UserError):  # another kind of model
            continue
        words = vocabulary_of(opened.tokenizer)
        ends = {"bos_token_id": words.bos, "eos_token_id": sorted(words.ends)}
        return {**config, "bos_token_id": words.bos, "eos_token_id": words.eos, "pad_token_id": None,
                "dtype": "float32"}, ends
    raise UserError(f"{run_folder}: its spec is that of no architecture that is written from a spec alone (of "
                    f"{', '.join(asked)}); export it as packed, or serve it")


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
    if not config:  # one of ours
        config = {"pad_token": SPECIAL_TOKENS[PAD], "eos_token": SPECIAL_TOKENS[EOS], "bos_token": SPECIAL_TOKENS[BOS],
                  **({"chat_template": CHATML} if opened.card["chat"] else {})}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer.json").write_text(opened.tokenizer.to_str(), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
