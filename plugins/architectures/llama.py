"""Llama and what is built like it: attention and a gated feed-forward in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tryplicity import Architecture, Piece, UserError
from tryplicity_plugins.architectures import pieces
from tryplicity_plugins.architectures.pieces import Config, unless


class Llama(Architecture):
    """Llama 1 to 3 and SmolLM2 (https://huggingface.co/docs/transformers/model_doc/llama)."""

    name = "llama"
    ignored = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    tied = False  # where the config does not say
    norms = ("input_layernorm", "post_attention_layernorm")
    own_norm = "norm"  # of ours: the one before a sub-layer, or the one after it
    norm_eps = 1e-6
    qk_norms: tuple[str, ...] = ()
    rope_base = 10000.0

    @classmethod
    def biases(cls, config: Config) -> tuple[bool, bool]:
        """Of q, k and v, and of the output."""
        return (bool(config.get("attention_bias")),) * 2

    @classmethod
    def window(cls, config: Config) -> int | None:
        return None

    @classmethod
    def attention(cls, config: Config) -> dict[str, Any]:
        """The mixer."""
        bias, out_bias = cls.biases(config)
        return pieces.gqa(config, **pieces.rope(config, base=cls.rope_base),
                          **unless(False, bias=bias, out_bias=out_bias, qk_norm=bool(cls.qk_norms)),
                          **unless(None, window=cls.window(config)))

    @classmethod
    def feed_forward(cls, config: Config, layer: int) -> dict[str, Any]:
        return pieces.mlp(config)

    @classmethod
    def top(cls, config: Config) -> dict[str, Any]:
        """What a spec says beside its blocks."""
        return {**pieces.sizes(config, cls.tied), "norm": pieces.rmsnorm(config, default=cls.norm_eps)}

    @classmethod
    def spec(cls, config: Config) -> dict[str, Any]:
        blocks, names = {}, []
        for i in range(config["num_hidden_layers"]):
            feed_forward = cls.feed_forward(config, i)
            name = {"gated_mlp": "dense"}.get(feed_forward["type"], feed_forward["type"])
            blocks[name] = {"mixer": cls.attention(config), "feed_forward": feed_forward}
            names.append(name)
        return {**cls.top(config), "blocks": blocks, "layers": pieces.stack(names)}

    @classmethod
    def config(cls, spec: dict[str, Any]) -> dict[str, Any] | None:
        mixer = spec["layers"][0]["mixer"]
        return {**pieces.config_of_sizes(spec), "rms_norm_eps": spec["norm"]["eps"],
                **pieces.config_of_gqa(spec, mixer), "attention_bias": mixer.get("bias", False),
                "sliding_window": mixer.get("window"), **cls.config_of_feed_forwards(spec)}

    @classmethod
    def config_of_feed_forwards(cls, spec: dict[str, Any]) -> dict[str, Any]:
        first = spec["layers"][0]["feed_forward"]
        return {"intermediate_size": pieces.inner_size(spec, first), "mlp_bias": first.get("bias", False),
                "hidden_act": pieces.config_of_activation(first["activation"])}

    @classmethod
    def tensors(cls, config: Config) -> Iterator[Piece]:
        yield from pieces.ends(config, tied_by_default=cls.tied)
        for i in range(config["num_hidden_layers"]):
            theirs, ours = f"model.layers.{i}", f"layers.{i}"
            for norm, role in zip(cls.norms, ("mixer", "feed_forward"), strict=True):
                yield Piece(f"{theirs}.{norm}.weight", f"{ours}.{role}.{cls.own_norm}.weight")
            bias, out_bias = cls.biases(config)
            yield from pieces.attention(config, f"{theirs}.self_attn", f"{ours}.mixer.layer", bias=bias,
                                        out_bias=out_bias, norms=cls.qk_norms)
            yield from cls.feed_forward_tensors(config, i, f"{theirs}.mlp", f"{ours}.feed_forward.layer")

    @classmethod
    def feed_forward_tensors(cls, config: Config, layer: int, theirs: str, ours: str) -> Iterator[Piece]:
        yield from pieces.gated_mlp(config["intermediate_size"], theirs, ours, bias=bool(config.get("mlp_bias")))


class Mistral(Llama):
    """Mistral 7B and its kin (arXiv:2310.06825): Llama with a sliding window."""

    name = "mistral"

    @classmethod
    def window(cls, config: Config) -> int | None:
        return config.get("sliding_window", 4096)


class Qwen2(Llama):
    """Qwen2 and 2.5 (arXiv:2412.15115): Llama with biases of q, k and v."""

    name = "qwen2"

    @classmethod
    def biases(cls, config: Config) -> tuple[bool, bool]:
        return True, False

    @classmethod
    def window(cls, config: Config) -> int | None:
        pieces.only(config, use_sliding_window=False)
        return None


class Qwen3(Qwen2):
    """Qwen3 (arXiv:2505.09388): Llama with norms of every head's query and key."""

    name = "qwen3"
    qk_norms = ("q_norm", "k_norm")

    @classmethod
    def biases(cls, config: Config) -> tuple[bool, bool]:
        return (bool(config.get("attention_bias")),) * 2


class Olmo2(Llama):
    """OLMo 2 (arXiv:2501.00656): norms after the sub-layers, and of the whole query and key."""

    name = "olmo2"
    qk_norms = ("q_norm", "k_norm")
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    own_norm = "norm_after"
    norm_eps = 1e-5

    @classmethod
    def attention(cls, config: Config) -> dict[str, Any]:
        return {**super().attention(config), "qk_norm_over": "width"}

    @classmethod
    def top(cls, config: Config) -> dict[str, Any]:
        return {**super().top(config), "norms": "after"}


class BitNet(Llama):
    """BitNet b1.58 2B4T (arXiv:2504.12285), as its trained weights in bf16: ternary linears, norms inside of both
    sub-layers."""

    name = "bitnet"
    tied = False
    norm_eps = 1e-5
    rope_base = 500000.0

    @classmethod
    def attention(cls, config: Config) -> dict[str, Any]:
        return {**super().attention(config), "out_norm": True}

    @classmethod
    def feed_forward(cls, config: Config, layer: int) -> dict[str, Any]:
        return {**pieces.mlp({"hidden_act": "relu2", **config}), "inner_norm": True}

    @classmethod
    def top(cls, config: Config) -> dict[str, Any]:
        if (said := config.get("quantization_config")) and said.get("quantization_mode") != "online":
            raise UserError("a BitNet whose weights are packed already is not read; give the one in bf16")
        linear = {"linear": "bitlinear_unnormed"} if said else {}
        return {**super().top(config), **linear}

    @classmethod
    def tensors(cls, config: Config) -> Iterator[Piece]:
        yield from super().tensors(config)
        for i in range(config["num_hidden_layers"]):
            yield Piece(f"model.layers.{i}.self_attn.attn_sub_norm.weight", f"layers.{i}.mixer.layer.out_norm.weight")
            yield Piece(f"model.layers.{i}.mlp.ffn_sub_norm.weight",
                        f"layers.{i}.feed_forward.layer.inner_norm.weight")
