"""Mamba-2 alone, and beside attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tryplicity import Architecture, Piece, UserError
from tryplicity_plugins.architectures import pieces
from tryplicity_plugins.architectures.pieces import Config, unless

#: what layers are called, in transformers 4 and 5
KINDS = {"mamba": "mamba", "linear_attention": "mamba", "attention": "attention", "full_attention": "attention",
         "M": "mamba", "*": "attention", "-": "mlp", "mlp": "mlp", "E": "moe", "moe": "moe"}


def kinds(said: Sequence[str]) -> list[str]:
    """Raises UserError for a kind of layer that there is not."""
    if unknown := [kind for kind in said if kind not in KINDS]:
        raise UserError(f"layers of kind {unknown[0]} cannot be said in a spec")
    return [KINDS[kind] for kind in said]


class Mamba2(Architecture):
    """Mamba-2 (arXiv:2405.21060)."""

    name = "mamba2"

    @classmethod
    def spec(cls, config: Config) -> dict[str, Any]:
        mixer = pieces.mamba2(config, heads="num_heads", head_dim="head_dim", state="state_size", groups="n_groups",
                              width="conv_kernel", eps="layer_norm_epsilon", bias="use_bias",
                              conv_bias="use_conv_bias")
        sizes = pieces.sizes({"max_position_embeddings": 8192, **config})  # it has no limit of its own
        return {**sizes, "norm": pieces.rmsnorm(config, "layer_norm_epsilon", 1e-5),
                "blocks": {"mamba": {"mixer": mixer}}, "layers": pieces.stack(["mamba"] * config["num_hidden_layers"])}

    @classmethod
    def tensors(cls, config: Config) -> Iterator[Piece]:
        yield from pieces.ends(config, root="backbone", embedding="embeddings", norm="norm_f")
        for i in range(config["num_hidden_layers"]):
            yield Piece(f"backbone.layers.{i}.norm.weight", f"layers.{i}.mixer.norm.weight")
            yield from pieces.mamba2_tensors(f"backbone.layers.{i}.mixer", f"layers.{i}.mixer.layer",
                                             bias=bool(config.get("use_bias")),
                                             conv_bias=config.get("use_conv_bias", True))


class Bamba(Architecture):
    """Bamba-9B (https://huggingface.co/blog/bamba): Mamba-2 with a few layers of attention that turn half of each
    head."""

    name = "bamba"

    @classmethod
    def kinds(cls, config: Config) -> list[str]:
        attention = config.get("attn_layer_indices") or ()
        return ["attention" if i in attention else "mamba" for i in range(config["num_hidden_layers"])]

    @classmethod
    def spec(cls, config: Config) -> dict[str, Any]:
        bias = bool(config.get("attention_bias"))
        mixers = {"mamba": pieces.mamba2(config),
                  "attention": pieces.gqa(config, **pieces.rope(config, fraction=0.5),
                                          **unless(False, bias=bias, out_bias=bias))}
        names = cls.kinds(config)
        blocks = {name: {"mixer": mixers[name], "feed_forward": pieces.mlp(config)} for name in dict.fromkeys(names)}
        return {**pieces.sizes(config), "norm": pieces.rmsnorm(config, default=1e-5), "blocks": blocks,
                "layers": pieces.stack(names)}

    @classmethod
    def tensors(cls, config: Config) -> Iterator[Piece]:
        yield from pieces.ends(config, norm="final_layernorm")
        bias = bool(config.get("attention_bias"))
        for i, kind in enumerate(cls.kinds(config)):
            theirs, ours = f"model.layers.{i}", f"layers.{i}"
            yield Piece(f"{theirs}.input_layernorm.weight", f"{ours}.mixer.norm.weight")
            yield Piece(f"{theirs}.pre_ff_layernorm.weight", f"{ours}.feed_forward.norm.weight")
            if kind == "mamba":
                yield from mamba_tensors(config, f"{theirs}.mamba", f"{ours}.mixer.layer")
            else:
                yield from pieces.attention(config, f"{theirs}.self_attn", f"{ours}.mixer.layer", bias=bias,
                                            out_bias=bias, turn=pieces.rotary_dims(config, 0.5))
            yield from pieces.gated_mlp(config["intermediate_size"], f"{theirs}.feed_forward",
                                        f"{ours}.feed_forward.layer", bias=bool(config.get("mlp_bias")))


def mamba_tensors(config: Config, theirs: str, ours: str, norm: bool = True) -> Iterator[Piece]:
    return pieces.mamba2_tensors(theirs, ours, norm=norm, bias=bool(config.get("mamba_proj_bias")),
                                 conv_bias=config.get("mamba_conv_bias", True))


class GraniteMoEHybrid(Architecture):
    """Granite 4.0 (https://huggingface.co/ibm-granite/granite-4.0-h-tiny): Mamba-2, a few layers of attention without
    positions, experts beside a feed-forward for all, and constant factors at every seam."""

    name = "granitemoehybrid"

    @classmethod
    def kinds(cls, config: Config) -> list[str]:
        return kinds(config.get("layer_types") or config.get("layers_block_type")
                     or ["mamba"] * config["num_hidden_layers"])

    @classmethod
    def feed_forward(cls, config: Config) -> dict[str, Any]:
        shared = {**config, "intermediate_size": config["shared_intermediate_size"]}
        if not config["num_local_experts"]:
            return pieces.mlp(shared)
        return {"type": "moe", "experts": config["num_local_experts"], "top_k": config["num_experts_per_tok"],
                "inner_size": config["intermediate_size"], "shared_experts": 1,
                "shared_inner_size": config["shared_intermediate_size"],
                "activation": pieces.activation(config.get("hidden_act") or "silu"),
                "router": pieces.softmax_router(config, True)}

    @classmethod
    def spec(cls, config: Config) -> dict[str, Any]:
        bias = bool(config.get("attention_bias"))
        positions = pieces.rope(config) if config.get("position_embedding_type") == "rope" else {"rope_base": None}
        size = pieces.head_dim(config)
        scale = unless(size ** -0.5, scale=float(config.get("attention_multiplier", 1.0)))
        names, mixers = cls.kinds(config), {}
        if "mamba" in names:
            mixers["mamba"] = pieces.mamba2(config)
        if "attention" in names:
            mixers["attention"] = pieces.gqa(config, **positions, **scale, **unless(False, bias=bias, out_bias=bias))
        blocks = {name: {"mixer": mixers[name], "feed_forward": cls.feed_forward(config)}
                  for name in dict.fromkeys(names)}
        factors = {"embedding_multiplier": float(config.get("embedding_multiplier", 1.0)),
                   "logits_multiplier": 1.0 / config.get("logits_scaling", 1.0)}
        residual = unless(1.0, multiplier=float(config.get("residual_multiplier", 1.0)))
        return {**pieces.sizes(config), **unless(1.0, **factors), "norm": pieces.rmsnorm(config),
                "residual": {"type": "add", **residual}, "blocks": blocks, "layers": pieces.stack(names)}

    @classmethod
    def tensors(cls, config: Config) -> Iterator[Piece]:
        yield from pieces.ends(config)
        bias = bool(config.get("attention_bias"))
        turn = None if config.get("position_embedding_type") == "rope" else 0
        for i, kind in enumerate(cls.kinds(config)):
            theirs, ours = f"model.layers.{i}", f"layers.{i}"
            yield Piece(f"{theirs}.input_layernorm.weight", f"{ours}.mixer.norm.weight")
            yield Piece(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_forward.norm.weight")
            if kind == "mamba":
                yield from mamba_tensors(config, f"{theirs}.mamba", f"{ours}.mixer.layer")
            else:
                yield from pieces.attention(config, f"{theirs}.self_attn", f"{ours}.mixer.layer", bias=bias,
                                            out_bias=bias, turn=turn)
            ours, shared = f"{ours}.feed_forward.layer", ""
            if config["num_local_experts"]:
                shared, experts = "shared_", f"{theirs}.block_sparse_moe"
                yield Piece(f"{experts}.router.layer.weight", f"{ours}.router.weight")
                yield Piece(f"{experts}.input_linear.weight", f"{ours}.gate_up.weight")
                yield Piece(f"{experts}.output_linear.weight", f"{ours}.down.weight")
            yield Piece(f"{theirs}.shared_mlp.input_linear.weight", f"{ours}.{shared}gate_up.weight")
            yield Piece(f"{theirs}.shared_mlp.output_linear.weight", f"{ours}.{shared}down.weight")


class NemotronH(Architecture):
    """Nemotron-H and Nemotron Nano 2 and 3 (arXiv:2504.03624, arXiv:2508.14444): every layer is a Mamba-2, an attention
    without positions, a feed-forward without a gate, or experts without one."""

    name = "nemotron_h"

    @classmethod
    def kinds(cls, config: Config) -> list[str]:
        return kinds(config.get("layers_block_type") or config["hybrid_override_pattern"])

    @classmethod
    def block(cls, config: Config, kind: str) -> dict[str, Any]:
        act = {"activation": pieces.activation(config.get("mlp_hidden_act", "relu2"))}
        bias = unless(False, bias=bool(config.get("mlp_bias")))
        if kind == "mamba":
            least = config.get("time_step_min", 0.001)  # transformers raises every step to it
            return {"mixer": pieces.mamba2({**config, "time_step_limit": (least, None)}, heads="mamba_num_heads",
                                           head_dim="mamba_head_dim", state="ssm_state_size", groups="n_groups",
                                           width="conv_kernel", eps="layer_norm_epsilon",
                                           conv_bias="use_conv_bias")}
        if kind == "attention":
            pieces.only(config, attention_bias=False, sliding_window=None)
            return {"mixer": pieces.gqa(config, rope_base=None)}
        if kind == "mlp":
            return {"feed_forward": {"type": "mlp", "inner_size": config["intermediate_size"], **act, **bias}}
        pieces.only(config, moe_latent_size=None, mlp_bias=False)
        groups = {"groups": config.get("n_group", 1), "groups_kept": config.get("topk_group", 1)}
        router = {"type": "top_k", "score": "sigmoid", "normalize": config.get("norm_topk_prob", True),
                  **unless(1.0, scale=float(config.get("routed_scaling_factor", 1.0))), **unless(1, **groups)}
        return {"feed_forward": {"type": "moe", "gated": False, "experts": config["n_routed_experts"],
                                 "top_k": config["num_experts_per_tok"],
                                 "inner_size": config["moe_intermediate_size"], "shared_experts": 1,
                                 "shared_inner_size": config["moe_shared_expert_intermediate_size"], **act,
                                 "router": router}}

    @classmethod
    def spec(cls, config: Config) -> dict[str, Any]:
        pieces.only(config, num_nextn_predict_layers=0, use_bias=False)
        names = cls.kinds(config)
        return {**pieces.sizes(config), "norm": pieces.rmsnorm(config, "layer_norm_epsilon", 1e-5),
                "blocks": {name: cls.block(config, name) for name in dict.fromkeys(names)},
                "layers": pieces.stack(names)}

    @classmethod
    def tensors(cls, config: Config) -> Iterator[Piece]:
        yield from pieces.ends(config, root="backbone", embedding="embeddings", norm="norm_f")
        for i, kind in enumerate(cls.kinds(config)):
            role = "mixer" if kind in ("mamba", "attention") else "feed_forward"
            theirs, ours = f"backbone.layers.{i}.mixer", f"layers.{i}.{role}.layer"
            yield Piece(f"backbone.layers.{i}.norm.weight", f"layers.{i}.{role}.norm.weight")
            if kind == "mamba":
                yield from pieces.mamba2_tensors(theirs, ours, bias=bool(config.get("mamba_proj_bias")),
                                                 conv_bias=config.get("use_conv_bias", True))
            elif kind == "attention":
                yield from pieces.attention(config, theirs, ours, turn=0)
            elif kind == "mlp":
                yield from cls.two(theirs, ours, "up", "down", bias=bool(config.get("mlp_bias")))
            else:
                yield Piece(f"{theirs}.gate.weight", f"{ours}.router.weight")
                yield Piece(f"{theirs}.gate.e_score_correction_bias", f"{ours}.router.bias")
                yield from cls.two(f"{theirs}.shared_experts", ours, "shared_up", "shared_down")
                for e in range(config["n_routed_experts"]):
                    yield Piece(f"{theirs}.experts.{e}.up_proj.weight", f"{ours}.up.weight", (e,))
                    yield Piece(f"{theirs}.experts.{e}.down_proj.weight", f"{ours}.down.weight", (e,))

    @staticmethod
    def two(theirs: str, ours: str, up: str, down: str, bias: bool = False) -> Iterator[Piece]:
        for kind in ["weight", "bias"] if bias else ["weight"]:
            yield Piece(f"{theirs}.up_proj.{kind}", f"{ours}.{up}.{kind}")
            yield Piece(f"{theirs}.down_proj.{kind}", f"{ours}.{down}.{kind}")
