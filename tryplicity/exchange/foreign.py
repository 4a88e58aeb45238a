"""A model as other programs keep it: a folder in transformers' form. What is read is not trusted.

    config.json  model.safetensors  (or shards and model.safetensors.index.json)
    tokenizer.json  tokenizer_config.json  chat_template.jinja  generation_config.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tryplicity.data.vocabulary import END_TOKENS
from tryplicity.errors import UserError
from tryplicity.training.saved import SavedTensors, open_files

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Foreign:
    """A foreign model: its config in transformers' form, its tensors by their names there (not read before they are
    used), the texts of tokenizer.json and the content of tokenizer_config.json."""

    path: Path
    config: Mapping[str, Any]
    weights: SavedTensors
    tokenizer: str
    tokenizer_config: Mapping[str, Any]
    generation: Mapping[str, Any]  # generation_config.json, or nothing


def open_foreign(path: Path) -> Foreign:
    """A folder, or a GGUF file. Raises UserError for what is none, damaged or incomplete."""
    if path.is_file():
        from tryplicity.exchange.gguf_file import open_gguf

        return open_gguf(path)
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder or file; give a model's folder with its config.json, or a "
                        "GGUF file")
    config = read_json(path / "config.json")
    weights = _weights(path)
    return Foreign(path, config, weights, *_tokenizer(path, config))


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: is missing; give the whole folder of the model")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(said, dict):
        raise UserError(f"{path}: not a mapping of names")
    return said


def _weights(folder: Path) -> SavedTensors:
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.is_file():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) and Path(name).name == name
                                                   for name in places.values()):
            raise UserError(f"{index}: weight_map does not say which file of the folder has which tensor")
        shards = sorted(set(places.values()))
        if missing := [name for name in shards if not (folder / name).is_file()]:
            raise UserError(f"{folder}: {missing[0]} is missing, which {INDEX} names ({len(missing)} of {len(shards)} "
                            "files); copy it there")
        weights = open_files(folder, [folder / name for name in shards])
        if lost := sorted(set(places) - weights.names):
            raise UserError(f"{folder}: {lost[0]} is not in {places[lost[0]]}, where {INDEX} has it; the file belongs "
                            "to another model")
        return weights
    if single.is_file():
        return open_files(folder, [single])
    if other := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        raise UserError(f"{folder}: {other[0].name} is a pickle, which can run any code and is not read; save the "
                        "model as safetensors")
    raise UserError(f"{folder}: there is no model.safetensors and no {INDEX}")


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The text of tokenizer.json, what stands beside it, and generation_config.json."""
    path, template = folder / "tokenizer.json", folder / "chat_template.jinja"
    if not path.is_file():
        raise UserError(f"{folder}: there is no tokenizer.json; save the tokenizer there in that form (transformers' "
                        "AutoTokenizer does with save_pretrained)")
    text = _read(path)
    beside, generation = folder / "tokenizer_config.json", folder / "generation_config.json"
    said = read_json(beside) if beside.is_file() else {}
    generation_config = read_json(generation) if generation.is_file() else {}
    if template.is_file():
        said["chat_template"] = _read(template)
    return text, completed(said, text, {**config, **generation_config}, str(folder)), generation_config


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def completed(said: Mapping[str, Any], tokenizer: str, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A tokenizer_config.json in which the end-of-text token and the tokens that end an answer are named, which
    transformers may have as numbers in other files."""
    try:
        parsed = json.loads(tokenizer)
        names = {token["id"]: token["content"] for token in parsed["added_tokens"]}
        names |= {number: token for token, number in _vocabulary(parsed["model"]["vocab"])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{where}: tokenizer.json is none of Hugging Face's tokenizers, or cut short") from None
    found = dict(said)
    ends = config.get("eos_token_id")
    ends = [names[id] for id in (ends if isinstance(ends, list) else [ends]) if id in names]
    if found.get("eos_token") is None and ends:
        found["eos_token"] = ends[0]
    if found.get("eos_token") is None:
        raise UserError(f"{where}: nothing says which token ends a text; give eos_token in tokenizer_config.json, or "
                        "eos_token_id in config.json")
    if found.get("bos_token") is None and config.get("bos_token_id") in names:
        found["bos_token"] = names[config["bos_token_id"]]
    return {**found, END_TOKENS: ends}


def _vocabulary(vocabulary: Any) -> list[tuple[str, int]]:
    """Tokens and numbers: a mapping (BPE), or a list of pairs with scores (Unigram)."""
    if isinstance(vocabulary, dict):
        return list(vocabulary.items())
    return [(pair[0], number) for number, pair in enumerate(vocabulary)]
