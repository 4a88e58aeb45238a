"""A GGUF file (github.com/ggml-org/ggml/blob/master/docs/gguf.md) as a foreign model in transformers' form.

Llama's architecture; whatever its tensors are quantised to is made floats again, one tensor at a time, by the gguf
package's own reader. F32, F16 and BF16 stay what they are. GGUF keeps the rows of q and k so that neighbouring
dimensions turn together; they are put back into transformers' order, as its own reader does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tryplicity.components import turned
from tryplicity.errors import UserError
from tryplicity.exchange.foreign import Foreign, completed
from tryplicity.training.saved import Entry, SavedTensors
from tryplicity.training.saved import Piece as Stretch

LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IGNORED = {"rope_freqs.weight"}  # computed from the config
#: how a text is cut before the merges, by what the file calls it: the patterns of llama.cpp, in order
DIGITS = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CUTS = {"default": [GPT2], "gpt-2": [GPT2], "smollm": [DIGITS, GPT2], "llama-bpe": [LLAMA3],
        "llama3": [LLAMA3], "llama-v3": [LLAMA3]}
CONTROL, USER_DEFINED = 3, 4  # token types


def open_gguf(path: Path) -> Foreign:
    """Raises UserError for a file that is none, damaged, or of another architecture or tokenizer."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"{path}: reading GGUF needs the package gguf; pip install gguf") from None
    try:
        reader = GGUFReader(path)
        said = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader indexes and parses without checking
        raise UserError(f"{path}: not a GGUF file, or one cut short ({type(error).__name__}: {error}); copy it "
                        "again") from None
    if (kind := said.get("general.architecture")) != "llama":
        raise UserError(f"{path}: a GGUF of architecture {kind!r}; only llama's are read; give the model's folder in "
                        "transformers' form")
    try:
        config = _config(said, {tensor.name for tensor in reader.tensors})
        tokenizer, beside = _tokenizer(said, path)
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing in it; convert the model again") from None
    weights = SavedTensors(path, {name: entry for tensor in reader.tensors if tensor.name not in IGNORED
                                  for name, entry in [_tensor(tensor, config, path)]})
    return Foreign(path, config, weights, tokenizer, completed(beside, tokenizer, config, str(path)), {})


def _config(said: Mapping[str, Any], tensors: set[str]) -> dict[str, Any]:
    """As transformers would have written it."""
    def of(name: str, default: Any = None) -> Any:
        return said[f"llama.{name}"] if default is None else said.get(f"llama.{name}", default)

    heads, hidden = int(of("attention.head_count")), int(of("embedding_length"))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "vocab_size": int(said.get("llama.vocab_size") or len(said["tokenizer.ggml.tokens"])),
        "hidden_size": hidden, "intermediate_size": int(of("feed_forward_length")),
        "num_hidden_layers": int(of("block_count")), "num_attention_heads": heads,
        "num_key_value_heads": int(of("attention.head_count_kv", heads)),
        "head_dim": int(of("attention.key_length", hidden // heads)),
        "max_position_embeddings": int(of("context_length")),
        "rms_norm_eps": float(np.float32(of("attention.layer_norm_rms_epsilon")).astype(str)),
        "rope_theta": float(of("rope.freq_base", 10000.0)), "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors}
    kind = said.get("llama.rope.scaling.type", "none")
    if kind != "none" or "rope_freqs.weight" in tensors:
        raise UserError("this GGUF scales its rotary positions (Llama 3.1 and later), which is not read from GGUF; "
                        "give the model's folder in transformers' form")
    for key in ("bos", "eos"):
        if (number := said.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{key}_token_id"] = int(number)
    return config


def _tensor(tensor: Any, config: Mapping[str, Any], path: Path) -> tuple[str, Entry]:
    """Its name and content in transformers' form."""
    stem, _, kind = tensor.name.rpartition(".")
    block = stem.split(".")
    if len(block) == 3 and block[0] == "blk" and block[2] in LAYER:
        name = f"model.layers.{block[1]}.{LAYER[block[2]]}.{kind}"
    elif stem in ENDS:
        name = f"{ENDS[stem]}.{kind}"
    else:
        raise UserError(f"{path}: {tensor.name} has no place in a llama; only plain ones are read")
    shape = tuple(int(size) for size in reversed(tensor.shape))
    form = turned(config["head_dim"]) if stem.endswith(("attn_q", "attn_k")) else None
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(tensor.tensor_type.name, torch.float32)

    def read() -> Tensor:
        from gguf import dequantize

        if dtype == torch.bfloat16:
            floats = torch.from_numpy(tensor.data.view(np.uint8).reshape(-1).copy()).view(dtype).reshape(shape)
        elif tensor.tensor_type.name in ("F16", "F32"):
            floats = torch.from_numpy(tensor.data.copy()).reshape(shape)
        else:
            floats = torch.from_numpy(np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type))).reshape(shape)
        return floats if form is None else form.theirs(floats)

    return name, Entry(dtype, shape, (Stretch((0,) * len(shape), shape, read),))


def _tokenizer(said: Mapping[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a tokenizer.json, and what stands beside it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    cut = said.get("tokenizer.ggml.pre", "default")
    if said["tokenizer.ggml.model"] != "gpt2" or cut not in CUTS:
        raise UserError(f"{path}: its tokenizer ({said['tokenizer.ggml.model']}, {cut}) is not read; only byte-level "
                        f"BPE ({', '.join(CUTS)}) is; give the model's folder in transformers' form")
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in said["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in CUTS[cut]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, kind in added
                                  if kind == CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in added if kind == USER_DEFINED])
    beside = {f"{key}_token": tokens[number] for key in ("bos", "eos", "unk")
              if (number := said.get(f"tokenizer.ggml.{'unknown' if key == 'unk' else key}_token_id")) is not None}
    if said.get("tokenizer.ggml.add_bos_token") and "bos_token" in beside:
        bos = beside["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    if template := said.get("tokenizer.chat_template"):
        beside["chat_template"] = template
    return tokenizer.to_str(), beside
