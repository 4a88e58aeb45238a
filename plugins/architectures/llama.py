"""Llama and what is built like it: attention and a gated feed-forward in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tryplicity import Architecture, Piece
from tryplicity_plugins.architectures import pieces
from tryplicity_plugins.architectures.pieces import Config


class Llama(Architecture):
    """Llama 1 to 3 and SmolLM2 (https://huggingface.co/docs/transformers/model_doc/llama)."""

    name = "llama"
    ignored = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    tied = False  # what tie_word_embeddings is where the config does not say

    @classmethod
    def attention(cls, config: Config) -> dict[str, Any]:
        """The mixer."""
        return {"type": "gqa", "heads": config["num_attention_heads"], "kv_heads": pieces.kv_heads(config),
                "head_dim": pieces.head_dim(config), **pieces.rope(config)}

    @classmethod
    def feed_forward(cls, config: Config) -> dict[str, Any]:
        return {"type": "gated_mlp", "inner_size": config["intermediate_size"],
                "activation": pieces.activation(config.get("hidden_act", "silu"))}

    @classmethod
    def spec(cls, config: Config) -> dict[str, Any]:
        return {**pieces.sizes(config, cls.tied), "norm": {"type": "rmsnorm", "eps": config.get("rms_norm_eps", 1e-6)},
                "blocks": {"layer": {"mixer": cls.attention(config), "feed_forward": cls.feed_forward(config)}},
                "layers": pieces.stack(["layer"] * config["num_hidden_layers"])}

    @classmethod
    def tensors(cls, config: Config) -> Iterator[Piece]:
        yield from pieces.ends(config, tied=cls.tied)
        for i in range(config["num_hidden_layers"]):
            yield from cls.layer(config, f"model.layers.{i}", f"layers.{i}")

    @classmethod
    def layer(cls, config: Config, theirs: str, ours: str) -> Iterator[Piece]:
        yield Piece(f"{theirs}.input_layernorm.weight", f"{ours}.mixer.norm.weight")
        yield from pieces.attention(config, f"{theirs}.self_attn", f"{ours}.mixer.layer")
        yield Piece(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_forward.norm.weight")
        yield from pieces.gated_mlp(config["intermediate_size"], f"{theirs}.mlp", f"{ours}.feed_forward.layer")
