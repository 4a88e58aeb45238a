"""Stacks whose mixers are neither attention alone nor Mamba-2 alone: Falcon-H1, LFM2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tryplicity import CONVOLUTION, Architecture, Piece
from tryplicity_plugins.architectures import pieces
from tryplicity_plugins.architectures.hybrids import mamba_tensors
from tryplicity_plugins.architectures.pieces import Config, unless


class FalconH1(Architecture):
    """Falcon-H1 (arXiv:2507.22448): attention and Mamba-2 side by side in every layer, constant factors everywhere."""

    name = "falcon_h1"

    @classmethod
    def spec(cls, config: Config) -> dict[str, Any]:
        pieces.only(config, projectors_bias=False)
        normed = bool(config.get("mamba_rms_norm"))
        if normed:
            pieces.only(config, mamba_norm_before_gate=False)
        # a factor of the keys is one of the scores
        scale = pieces.head_dim(config) ** -0.5 * config.get("key_multiplier", 1.0)
        bias = bool(config.get("attention_bias"))
        attention = pieces.gqa(config, **pieces.rope(config), scale=scale, **unless(False, bias=bias, out_bias=bias))
        multipliers = [float(one) for one in config.get("ssm_multipliers") or [1.0] * 5]
        mamba = pieces.mamba2(config, **unless(True, norm=normed), **unless([1.0] * 5, multipliers=multipliers))
        sides = [{"mixer": mamba, **cls.factors(config, "ssm_in_multiplier", "ssm_out_multiplier")},
                 {"mixer": attention, **cls.factors(config, "attention_in_multiplier", "attention_out_multiplier")}]
        gate, down = config.get("mlp_multipliers") or (1.0, 1.0)
        feed_forward = {**pieces.mlp(config), **unless(1.0, gate_multiplier=float(gate), down_multiplier=float(down))}
        ends = unless(1.0, embedding_multiplier=float(config.get("embedding_multiplier", 1.0)),
                      logits_multiplier=float(config.get("lm_head_multiplier", 1.0)))
        return {**pieces.sizes(config), **ends, "norm": pieces.rmsnorm(config, default=1e-5),
                "blocks": {"both": {"mixer": {"type": "parallel", "of": sides}, "feed_forward": feed_forward}},
                "layers": pieces.stack(["both"] * config["num_hidden_layers"])}

    @staticmethod
    def factors(config: Config, before: str, after: str) -> dict[str, float]:
        return unless(1.0, input_multiplier=float(config.get(before, 1.0)),
                      output_multiplier=float(config.get(after, 1.0)))

    @classmethod
    def tensors(cls, config: Config) -> Iterator[Piece]:
        yield from pieces.ends(config, norm="final_layernorm")
        bias = bool(config.get("attention_bias"))
        for i in range(config["num_hidden_layers"]):
            theirs, ours = f"model.layers.{i}", f"layers.{i}"
            yield Piece(f"{theirs}.input_layernorm.weight", f"{ours}.mixer.norm.weight")
            yield Piece(f"{theirs}.pre_ff_layernorm.weight", f"{ours}.feed_forward.norm.weight")
            yield from mamba_tensors(config, f"{theirs}.mamba", f"{ours}.mixer.layer.mixers.0",
                                     norm=bool(config.get("mamba_rms_norm")))
            yield from pieces.attention(config, f"{theirs}.self_attn", f"{ours}.mixer.layer.mixers.1", bias=bias,
                                        out_bias=bias)
            yield from pieces.gated_mlp(config["intermediate_size"], f"{theirs}.feed_forward",
                                        f"{ours}.feed_forward.layer", bias=bool(config.get("mlp_bias")))


class LFM2(Architecture):
    """LFM2 (arXiv:2511.23404): gated short convolutions, and attention in some layers."""

    name = "lfm2"

    @classmethod
    def kinds(cls, config: Config) -> list[str]:
        said = config.get("layer_types")
        if said is None:
            attention = config.get("full_attn_idxs")
            count = config["num_hidden_layers"]
            said = ["full_attention" if i in (range(count) if attention is None else attention) else "conv"
                    for i in range(count)]
        return ["attention" if kind == "full_attention" else "conv" for kind in said]

    @classmethod
    def inner(cls, config: Config) -> int:
        size = config.get("block_ff_dim") or config["intermediate_size"]
        if not config.get("block_auto_adjust_ff_dim", True):
            return size
        size = int(2 * size / 3)
        if (factor := config.get("block_ffn_dim_multiplier", 1.0)) is not None:
            step = config.get("block_multiple_of", 256)
            size = -(-int(factor * size) // step) * step
        return size

    @classmethod
    def spec(cls, config: Config) -> dict[str, Any]:
        feed_forward = {"type": "gated_mlp", "inner_size": cls.inner(config)}
        mixers = {"conv": {"type": "short_conv", "conv_width": config["conv_L_cache"],
                           **unless(False, bias=bool(config.get("conv_bias")))},
                  "attention": pieces.gqa(config, **pieces.rope(config, base=1e6), qk_norm=True)}
        names = cls.kinds(config)
        return {**pieces.sizes(config, True), "norm": pieces.rmsnorm(config, "norm_eps", 1e-5),
                "blocks": {name: {"mixer": mixers[name], "feed_forward": feed_forward}
                           for name in dict.fromkeys(names)},
                "layers": pieces.stack(names)}

    @classmethod
    def tensors(cls, config: Config) -> Iterator[Piece]:
        yield from pieces.ends(config, norm="embedding_norm", tied_by_default=True)
        for i, kind in enumerate(cls.kinds(config)):
            theirs, ours = f"model.layers.{i}", f"layers.{i}"
            yield Piece(f"{theirs}.operator_norm.weight", f"{ours}.mixer.norm.weight")
            yield Piece(f"{theirs}.ffn_norm.weight", f"{ours}.feed_forward.norm.weight")
            if kind == "attention":
                yield from pieces.attention(config, f"{theirs}.self_attn", f"{ours}.mixer.layer",
                                            names=("q_proj", "k_proj", "v_proj", "out_proj"),
                                            norms=("q_layernorm", "k_layernorm"))
            else:
                bias = bool(config.get("conv_bias"))
                yield Piece(f"{theirs}.conv.conv.weight", f"{ours}.mixer.layer.conv_weight", ..., CONVOLUTION)
                if bias:
                    yield Piece(f"{theirs}.conv.conv.bias", f"{ours}.mixer.layer.conv_bias")
                for kind in ["weight", "bias"] if bias else ["weight"]:
                    for projection in ("in_proj", "out_proj"):
                        yield Piece(f"{theirs}.conv.{projection}.{kind}", f"{ours}.mixer.layer.{projection}.{kind}")
            yield from pieces.gated_mlp(cls.inner(config), f"{theirs}.feed_forward", f"{ours}.feed_forward.layer",
                                        names=("w1", "w3", "w2"))
