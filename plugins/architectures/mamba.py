"""The first Mamba, alone and in Jamba."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tryplicity import CONVOLUTION, Architecture, Piece
from tryplicity_plugins.architectures import pieces
from tryplicity_plugins.architectures.pieces import Config, unless

INNER = {"dt_layernorm": "dt_norm", "b_layernorm": "B_norm", "c_layernorm": "C_norm"}


def mamba1_tensors(theirs: str, ours: str, *, bias: bool, conv_bias: bool, norms: bool = False) -> Iterator[Piece]:
    """Rows of x and z, and of the time steps, B and C, are in one order there and here."""
    for kind in ["weight", "bias"] if bias else ["weight"]:
        for projection in ("in_proj", "out_proj"):
            yield Piece(f"{theirs}.{projection}.{kind}", f"{ours}.{projection}.{kind}")
    yield Piece(f"{theirs}.x_proj.weight", f"{ours}.x_proj.weight")
    yield Piece(f"{theirs}.dt_proj.weight", f"{ours}.dt_weight")
    yield Piece(f"{theirs}.dt_proj.bias", f"{ours}.dt_bias")
    yield Piece(f"{theirs}.conv1d.weight", f"{ours}.conv_weight", ..., CONVOLUTION)
    if conv_bias:
        yield Piece(f"{theirs}.conv1d.bias", f"{ours}.conv_bias")
    for name in ("A_log", "D"):
        yield Piece(f"{theirs}.{name}", f"{ours}.{name}")
    for name, own in INNER.items() if norms else ():
        yield Piece(f"{theirs}.{name}.weight", f"{ours}.{own}")


class Mamba(Architecture):
    """Mamba (arXiv:2312.00752)."""

    name = "mamba"

    @classmethod
    def spec(cls, config: Config) -> dict[str, Any]:
        mixer = {"type": "mamba1", "state_size": config["state_size"], "expand": config.get("expand", 2),
                 "conv_width": config["conv_kernel"], "dt_rank": config["time_step_rank"],
                 **unless(False, bias=bool(config.get("use_bias"))),
                 **unless(True, conv_bias=bool(config.get("use_conv_bias", True)))}
        sizes = pieces.sizes({"max_position_embeddings": 2048, **config}, True)  # it has no limit of its own
        return {**sizes, "norm": pieces.rmsnorm(config, "layer_norm_epsilon", 1e-5),
                "blocks": {"mamba": {"mixer": mixer}}, "layers": pieces.stack(["mamba"] * config["num_hidden_layers"])}

    @classmethod
    def tensors(cls, config: Config) -> Iterator[Piece]:
        yield from pieces.ends(config, root="backbone", embedding="embeddings", norm="norm_f", tied_by_default=True)
        for i in range(config["num_hidden_layers"]):
            yield Piece(f"backbone.layers.{i}.norm.weight", f"layers.{i}.mixer.norm.weight")
            yield from mamba1_tensors(f"backbone.layers.{i}.mixer", f"layers.{i}.mixer.layer",
                                      bias=bool(config.get("use_bias")), conv_bias=config.get("use_conv_bias", True))


class Jamba(Architecture):
    """Jamba (arXiv:2403.19887): Mamba with norms inside, attention without positions now and then, experts in some
    layers."""

    name = "jamba"

    @classmethod
    def kinds(cls, config: Config) -> list[tuple[str, str]]:
        """The mixer and the feed-forward of each layer."""
        def every(what: str, period: int, offset: int, i: int) -> bool:
            step, first = config.get(f"{what}_layer_period", period), config.get(f"{what}_layer_offset", offset)
            return i % step == first % step

        several = config.get("num_experts", 16) > 1
        return [("attention" if every("attn", 8, 4, i) else "mamba",
                 "moe" if several and every("expert", 2, 1, i) else "dense")
                for i in range(config["num_hidden_layers"])]

    @classmethod
    def spec(cls, config: Config) -> dict[str, Any]:
        mixers = {"attention": pieces.gqa(config, rope_base=None),
                  "mamba": {"type": "mamba1", "state_size": config["mamba_d_state"], "expand": config["mamba_expand"],
                            "conv_width": config["mamba_d_conv"], "dt_rank": cls.rank(config), "inner_norms": True,
                            "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
                            **unless(False, bias=bool(config.get("mamba_proj_bias"))),
                            **unless(True, conv_bias=bool(config.get("mamba_conv_bias", True)))}}
        feed_forwards = {"dense": pieces.mlp(config),
                         "moe": {"type": "moe", "experts": config.get("num_experts", 16),
                                 "top_k": config.get("num_experts_per_tok", 2),
                                 "inner_size": config["intermediate_size"], "shared_experts": 0,
                                 "activation": pieces.activation(config.get("hidden_act") or "silu"),
                                 "router": pieces.softmax_router(config, False)}}
        kinds = cls.kinds(config)
        blocks = {f"{mixer}_{inner}": {"mixer": mixers[mixer], "feed_forward": feed_forwards[inner]}
                  for mixer, inner in dict.fromkeys(kinds)}
        return {**pieces.sizes(config), "norm": pieces.rmsnorm(config), "blocks": blocks,
                "layers": pieces.stack(["_".join(kind) for kind in kinds])}

    @staticmethod
    def rank(config: Config) -> int:
        said = config.get("mamba_dt_rank", "auto")
        return -(-config["hidden_size"] // 16) if said == "auto" else said

    @classmethod
    def tensors(cls, config: Config) -> Iterator[Piece]:
        yield from pieces.ends(config, norm="final_layernorm")
        for i, (mixer, inner) in enumerate(cls.kinds(config)):
            theirs, ours = f"model.layers.{i}", f"layers.{i}"
            yield Piece(f"{theirs}.input_layernorm.weight", f"{ours}.mixer.norm.weight")
            yield Piece(f"{theirs}.pre_ff_layernorm.weight", f"{ours}.feed_forward.norm.weight")
            if mixer == "attention":
                yield from pieces.attention(config, f"{theirs}.self_attn", f"{ours}.mixer.layer", turn=0)
            else:
                yield from mamba1_tensors(f"{theirs}.mamba", f"{ours}.mixer.layer",
                                          bias=bool(config.get("mamba_proj_bias")),
                                          conv_bias=config.get("mamba_conv_bias", True), norms=True)
            theirs, ours = f"{theirs}.feed_forward", f"{ours}.feed_forward.layer"
            if inner == "moe":
                yield from pieces.experts(config.get("num_experts", 16), config["intermediate_size"], theirs, ours,
                                          router="router")
            else:
                yield from pieces.gated_mlp(config["intermediate_size"], theirs, ours)
