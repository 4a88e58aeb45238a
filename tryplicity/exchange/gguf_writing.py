"""A run of Llama's architecture as a GGUF file, for llama.cpp and its kin: by the gguf package's own writer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tryplicity.components import turned
from tryplicity.data.vocabulary import vocabulary_of
from tryplicity.errors import UserError
from tryplicity.exchange.exporting import Exported, origin, saved
from tryplicity.exchange.gguf_file import CONTROL, CUTS, ENDS, LAYER, USER_DEFINED
from tryplicity.exchange.importing import architecture_of
from tryplicity.exchange.mapping import as_theirs
from tryplicity.files import may_be_written, whole_file
from tryplicity.inference.packed import Opened, open_model
from tryplicity.inference.text import token_bytes
from tryplicity.progress import CountProgress, no_count_progress

NORMAL, UNUSED = 1, 5  # token types


def export_gguf(run_folder: Path, out: Path, registry: Any, progress: CountProgress = no_count_progress) -> Exported:
    """Write a run that was imported as a llama into one GGUF file, its matrices in their own dtype, its norms in fp32.

    Raises UserError for another architecture, or a tokenizer that GGUF has no name for.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("--format gguf needs the package gguf; pip install gguf") from None
    may_be_written(out, "a GGUF file", is_gguf, [run_folder])
    opened = open_model(run_folder, registry)
    config, _ = origin(opened, run_folder, registry)
    scaled = {"rope_type": "default", **(config.get("rope_parameters") or config.get("rope_scaling") or {})}
    plain = not (config.get("attention_bias") or config.get("mlp_bias"))
    if config["model_type"] != "llama" or not plain or scaled["rope_type"] != "default":
        raise UserError(f"{run_folder}: only plain Llamas (without biases and with positions that are not scaled) are "
                        "written as GGUF; export it as transformers")
    entries = as_theirs(saved(opened), architecture_of(config, str(run_folder), registry), config)
    theirs = {f"model.layers.{i}.{own}.weight": f"blk.{i}.{name}.weight"
              for i in range(config["num_hidden_layers"]) for name, own in LAYER.items()}
    theirs |= {f"{own}.weight": f"{name}.weight" for name, own in ENDS.items()}
    total, done = len(entries), 0
    try:
        with whole_file(out) as temporary:
            writer = gguf.GGUFWriter(temporary, "llama", use_temp_file=False)
            _say_config(writer, config, opened)
            _say_tokenizer(writer, opened, str(run_folder))
            form = turned(_head_dim(config))
            kinds = {}
            for name, entry in entries.items():
                kind = _kind(gguf, entry.dtype, len(entry.shape))
                kinds[name] = kind
                size = torch.Size(entry.shape).numel() * (4 if kind == gguf.GGMLQuantizationType.F32 else 2)
                writer.add_tensor_info(theirs[name], entry.shape, _numpy(kind.name), size, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, entry in entries.items():
                tensor = entry.whole()
                if theirs[name].endswith(("attn_q.weight", "attn_k.weight")):
                    tensor = form.ours(tensor).contiguous()
                writer.write_tensor_data(_raw(tensor, kinds[name].name))
                done += 1
                progress(done, total)
            writer.close()
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from None
    return Exported(out, "llama", len(entries), out.stat().st_size, ())


def is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _kind(gguf: Any, dtype: torch.dtype, axes: int) -> Any:
    """Vectors and fp32 as F32."""
    kinds = {torch.bfloat16: gguf.GGMLQuantizationType.BF16, torch.float16: gguf.GGMLQuantizationType.F16}
    return kinds.get(dtype, gguf.GGMLQuantizationType.F32) if axes > 1 else gguf.GGMLQuantizationType.F32


def _numpy(kind: str) -> Any:
    import numpy as np

    return np.dtype(np.float32) if kind == "F32" else np.dtype(np.float16)


def _raw(tensor: Tensor, kind: str) -> Any:
    if kind == "F32":
        return tensor.float().numpy()
    return tensor.view(torch.int16).numpy() if kind == "BF16" else tensor.numpy()


def _say_config(writer: Any, config: Mapping[str, Any], opened: Opened) -> None:
    writer.add_name(opened.spec.name)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(opened.spec.context_length)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    said = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(said.get("rope_theta") or config.get("rope_theta") or 10000.0))


def _say_tokenizer(writer: Any, opened: Opened, where: str) -> None:
    tokenizer, vocabulary, size = opened.tokenizer, vocabulary_of(opened.tokenizer), opened.spec.vocab_size
    model = json.loads(tokenizer.to_str())
    cut = cut_of(model)
    if model["model"]["type"] != "BPE" or cut is None:
        raise UserError(f"{where}: GGUF has no name for how its tokenizer cuts a text; export it as transformers")
    token_bytes(tokenizer)
    added = {token["id"]: token for token in model["added_tokens"]}
    words = [tokenizer.id_to_token(number) for number in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list([f"[PAD{number}]" if word is None else word for number, word in enumerate(words)])
    writer.add_token_types([UNUSED if word is None else NORMAL if number not in added else
                            CONTROL if added[number]["special"] else USER_DEFINED
                            for number, word in enumerate(words)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge)
                             for merge in model["model"]["merges"]])
    writer.add_eos_token_id(vocabulary.eos)
    writer.add_add_bos_token(bool(vocabulary.begin))
    if vocabulary.begin:
        writer.add_bos_token_id(vocabulary.bos)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


def cut_of(tokenizer: Mapping[str, Any]) -> str | None:
    """What GGUF calls the way in which a tokenizer.json cuts a text before its merges; None where it has no name."""
    said = tokenizer["pre_tokenizer"] or {}
    steps = said["pretokenizers"] if said.get("type") == "Sequence" else [said]
    patterns = []
    for step in steps:
        if step.get("type") == "Split" and step.get("behavior") == "Isolated":
            patterns.append(step["pattern"].get("Regex"))
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            patterns.append(CUTS["smollm"][0])
        elif step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += CUTS["gpt-2"] if step.get("use_regex") else []
        else:
            return None
    return next((name for name, own in CUTS.items() if own == patterns and name != "default"), None)
