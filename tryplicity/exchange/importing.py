"""A foreign model becomes a run folder: spec, tokenizer, weights, and where it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tryplicity.components import Architecture
from tryplicity.data.tokenizer import save_tokenizer
from tryplicity.data.vocabulary import attach, size_of
from tryplicity.errors import PluginFault, UserError
from tryplicity.exchange.foreign import Foreign, open_foreign
from tryplicity.exchange.mapping import as_ours
from tryplicity.files import whole_folder
from tryplicity.guard import guarded
from tryplicity.inference.text import token_bytes
from tryplicity.model import assemble
from tryplicity.progress import CountProgress, no_count_progress
from tryplicity.run import Run
from tryplicity.spec import Spec, load_spec
from tryplicity.spec.loader import dump_yaml, parse_yaml
from tryplicity.training.saved import write_entries

MOST_LAYERS = 1_000  # of a spec


@dataclass(frozen=True)
class Imported:
    """What came in."""

    run: Path
    spec: Spec
    model_type: str
    tensors: int
    parameters: int
    bytes: int
    chat: bool  # whether it brought a way to write conversations


def import_model(source: Path, run_folder: Path, registry: Any, *, name: str | None = None,
                 context_length: int | None = None, progress: CountProgress = no_count_progress) -> Imported:
    """Read a model of another program (see `open_foreign`) into a new run folder, tensor by tensor.

    name: by default the source's. context_length: by default what its config says. Raises UserError, and leaves
    nothing, where the source is damaged, of an architecture that no plugin knows, or has a tensor too many, too few or
    of another shape.
    """
    if run_folder.exists() and (not run_folder.is_dir() or any(run_folder.iterdir())):
        raise UserError(f"{run_folder}: is there already; give another --run, or move it away")
    foreign = open_foreign(source)
    architecture = architecture_of(foreign.config, str(source), registry)
    data = {"name": name or source.resolve().name.removesuffix(".gguf"),
            **spec_data(architecture, foreign.config, str(source))}
    data["context_length"] = context_length or data["context_length"]
    spec = load_spec(parse_yaml(dump_yaml(data), f"{source} (as a spec)"), registry)
    tokenizer = _tokenizer(foreign, spec)
    with guarded():
        model = assemble(spec)
    with guarded(architecture):
        entries = as_ours(foreign.weights, architecture, foreign.config, model)
    try:
        with whole_folder(run_folder) as temporary:
            run = Run(temporary)
            write_entries(run.weights, entries, progress)
            save_tokenizer(tokenizer, run.tokenizer)
            run.origin.write_text(json.dumps({"source": str(source), "config": foreign.config,
                                              "generation": foreign.generation}, indent=1), encoding="utf-8")
            run.spec.write_text(spec.as_yaml(), encoding="utf-8")
            size = run.weights.stat().st_size
    except OSError as error:
        raise UserError(f"{run_folder}: cannot be written: {error.strerror or error}") from None
    return Imported(run_folder, spec, architecture.name, len(entries),
                    sum(parameter.numel() for parameter in model.parameters()), size,
                    tokenizer.vocabulary.template is not None)


def architecture_of(config: Mapping[str, Any], where: str, registry: Any) -> type[Architecture]:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{where}: config.json has no model_type; give a model in transformers' form")
    known = registry.names("architecture")
    if model_type not in known:
        raise UserError(f"{where}: models of type {model_type} are not read (those of type {', '.join(known)} are); a "
                        "plugin can bring another architecture")
    return registry.get("architecture", model_type)


def spec_data(architecture: type[Architecture], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the architecture makes of a config.json. Raises UserError where it lacks something or says nonsense."""
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:  # an architecture lists them before anything counts them
        raise UserError(f"{where}: config.json says num_hidden_layers {layers:,}; at most {MOST_LAYERS:,}")
    try:
        with guarded(architecture):
            return architecture.spec(config)
    except PluginFault as fault:
        if isinstance(fault.__cause__, KeyError):
            raise UserError(f"{where}: config.json has no {fault.__cause__.args[0]}, which a model of type "
                            f"{architecture.name} needs") from None
        if isinstance(fault.__cause__, TypeError | ValueError | ArithmeticError | AttributeError):
            raise UserError(f"{where}: config.json is no sound one of a {architecture.name}: "
                            f"{fault.__cause__}") from None
        raise


def _tokenizer(foreign: Foreign, spec: Spec) -> Tokenizer:
    where = f"{foreign.path} (tokenizer)"
    try:
        tokenizer = Tokenizer.from_str(foreign.tokenizer)
    except Exception as error:  # tokenizers raises plain Exception for whatever it cannot read
        raise UserError(f"{where}: none of Hugging Face's tokenizers, or cut short: {error}") from None
    attach(tokenizer, foreign.tokenizer_config, where)
    if (size := size_of(tokenizer)) > spec.vocab_size:
        raise UserError(f"{where}: it has {size:,} tokens and the model {spec.vocab_size:,}; it belongs to another "
                        "model")
    try:
        token_bytes(tokenizer)
    except (KeyError, TypeError):
        raise UserError(f"{where}: neither a byte-level BPE nor one of SentencePiece's, so that nothing says which "
                        "bytes a token stands for") from None
    return tokenizer
