"""Stacks of attention whose feed-forwards are experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tryplicity import Form, Piece
from tryplicity_plugins.architectures import pieces
from tryplicity_plugins.architectures.llama import Llama, Qwen2, Qwen3
from tryplicity_plugins.architectures.pieces import Config

ROW = Form(lambda tensor: tensor.squeeze(0), lambda tensor: tensor.unsqueeze(0))  # a vector here


def count(config: Config) -> int:
    """Of experts, as transformers 4 or 5 writes it."""
    return config["num_experts"] if "num_experts" in config else config["num_local_experts"]


def _moe(config: Config, normalize: bool, **options: Any) -> dict[str, Any]:
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    return {"type": "moe", "experts": count(config), "top_k": config["num_experts_per_tok"], "inner_size": inner,
            "activation": pieces.activation(config.get("hidden_act") or "silu"), "shared_experts": 0,
            "router": pieces.softmax_router(config, normalize), **options}


def _config_of_moe(first: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"num_experts": first["experts"], "num_experts_per_tok": first["top_k"],
            "norm_topk_prob": first["router"]["normalize"],
            "hidden_act": pieces.config_of_activation(first["activation"]), **options}


class Mixtral(Llama):
    """Mixtral 8x7B (arXiv:2401.04088)."""

    name = "mixtral"
    norm_eps = 1e-5
    rope_base = 1e6

    @classmethod
    def window(cls, config: Config) -> int | None:
        return config.get("sliding_window")

    @classmethod
    def feed_forward(cls, config: Config, layer: int) -> dict[str, Any]:
        return _moe(config, True)

    @classmethod
    def config_of_feed_forwards(cls, spec: dict[str, Any]) -> dict[str, Any]:
        first = spec["layers"][0]["feed_forward"]
        found = _config_of_moe(first, intermediate_size=first["inner_size"])
        return {**found, "num_local_experts": found.pop("num_experts")}

    @classmethod
    def feed_forward_tensors(cls, config: Config, layer: int, theirs: str, ours: str) -> Iterator[Piece]:
        yield from pieces.experts(count(config), config["intermediate_size"],
                                  theirs.replace(".mlp", ".block_sparse_moe"), ours, names=("w1", "w3", "w2"))


class Qwen3MoE(Qwen3):
    """Qwen3-30B-A3B and its kin (arXiv:2505.09388)."""

    name = "qwen3_moe"

    @classmethod
    def dense(cls, config: Config, layer: int) -> bool:
        """Whether a layer's feed-forward is a single one."""
        step = config.get("decoder_sparse_step", 1)
        return layer in config.get("mlp_only_layers", ()) or (layer + 1) % step != 0

    @classmethod
    def feed_forward(cls, config: Config, layer: int) -> dict[str, Any]:
        if cls.dense(config, layer):
            return pieces.mlp(config)
        return _moe(config, bool(config.get("norm_topk_prob", False)))

    @classmethod
    def config_of_feed_forwards(cls, spec: dict[str, Any]) -> dict[str, Any]:
        feed_forwards = [layer["feed_forward"] for layer in spec["layers"]]
        dense = [i for i, one in enumerate(feed_forwards) if one["type"] == "gated_mlp"]
        first = next(one for one in feed_forwards if one["type"] == "moe")
        inner = pieces.inner_size(spec, feed_forwards[dense[0]]) if dense else first["inner_size"]
        return _config_of_moe(first, moe_intermediate_size=first["inner_size"], intermediate_size=inner,
                              mlp_only_layers=dense, decoder_sparse_step=1)

    @classmethod
    def feed_forward_tensors(cls, config: Config, layer: int, theirs: str, ours: str) -> Iterator[Piece]:
        if cls.dense(config, layer):
            yield from pieces.gated_mlp(config["intermediate_size"], theirs, ours)
        else:
            yield from pieces.experts(count(config), config["moe_intermediate_size"], theirs, ours)


class Qwen2MoE(Qwen2):
    """Qwen1.5-MoE-A2.7B and Qwen2-57B-A14B (arXiv:2407.10671): a shared expert behind a gate of its own."""

    name = "qwen2_moe"
    dense = Qwen3MoE.dense

    @classmethod
    def feed_forward(cls, config: Config, layer: int) -> dict[str, Any]:
        if cls.dense(config, layer):
            return pieces.mlp(config)
        return _moe(config, bool(config.get("norm_topk_prob", False)), shared_experts=1, shared_gate=True,
                    shared_inner_size=config["shared_expert_intermediate_size"])

    @classmethod
    def feed_forward_tensors(cls, config: Config, layer: int, theirs: str, ours: str) -> Iterator[Piece]:
        if cls.dense(config, layer):
            yield from pieces.gated_mlp(config["intermediate_size"], theirs, ours)
            return
        yield from pieces.experts(count(config), config["moe_intermediate_size"], theirs, ours)
        yield from pieces.gated_mlp(config["shared_expert_intermediate_size"], f"{theirs}.shared_expert", ours,
                                    prefix="shared_")
        yield Piece(f"{theirs}.shared_expert_gate.weight", f"{ours}.shared_gate", ..., ROW)


class OLMoE(Llama):
    """OLMoE-1B-7B (arXiv:2409.02060): 64 small experts, norms of the whole query and key."""

    name = "olmoe"
    norm_eps = 1e-5
    qk_norms = ("q_norm", "k_norm")

    @classmethod
    def attention(cls, config: Config) -> dict[str, Any]:
        pieces.only(config, clip_qkv=None)
        return {**super().attention(config), "qk_norm_over": "width"}

    @classmethod
    def feed_forward(cls, config: Config, layer: int) -> dict[str, Any]:
        return _moe(config, bool(config.get("norm_topk_prob", False)))

    @classmethod
    def config_of_feed_forwards(cls, spec: dict[str, Any]) -> dict[str, Any]:
        first = spec["layers"][0]["feed_forward"]
        return _config_of_moe(first, intermediate_size=first["inner_size"])

    @classmethod
    def feed_forward_tensors(cls, config: Config, layer: int, theirs: str, ours: str) -> Iterator[Piece]:
        yield from pieces.experts(count(config), config["intermediate_size"], theirs, ours)
