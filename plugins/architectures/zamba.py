"""Zamba2: Mamba-2, told now and then by one or two blocks of attention that many layers share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tryplicity import SAME, Architecture, Piece, UserError, turned
from tryplicity_plugins.architectures import pieces
from tryplicity_plugins.architectures.pieces import Config, unless

#: what layers are called, in transformers 4 and 5
HYBRID, MAMBA = ("hybrid", "g"), ("mamba", "linear_attention", "m")
#: where nothing is said of them
LAYERS = ["hybrid" if i in (6, 12, 18, 24, 30, 36, 42, 47, 51) else "mamba" for i in range(54)]


class Zamba2(Architecture):
    """Zamba2 (arXiv:2411.15242): Mamba-2, and blocks of attention over hidden state and embedding that are shared, each
    use with adapters of its own."""

    name = "zamba2"

    @classmethod
    def hybrids(cls, config: Config) -> list[tuple[int, int]]:
        """Of each layer with a shared block: its number, and the block's."""
        kinds = config.get("layers_block_type") or config.get("layer_types") or LAYERS
        if unknown := [kind for kind in kinds if kind not in (*HYBRID, *MAMBA)]:
            raise UserError(f"layers of kind {unknown[0]} cannot be said in a spec")
        layers = [i for i, kind in enumerate(kinds) if kind in HYBRID]
        return [(layer, use % config.get("num_mem_blocks", 1)) for use, layer in enumerate(layers)]

    @classmethod
    def spec(cls, config: Config) -> dict[str, Any]:
        pieces.only(config, add_bias_linear=False, use_long_context=False)
        hidden, heads = config["hidden_size"], config["n_mamba_heads"]
        mamba = pieces.mamba2({**config, "mamba_d_head": int(config.get("mamba_expand", 2) * hidden) // heads,
                               "time_step_limit": (config.get("time_step_min", 0.001), None)}, heads="n_mamba_heads",
                              groups="mamba_ngroups", eps="", conv_bias="")
        shared = {"type": "shared_attention", "mixer": mamba, "heads": config["num_attention_heads"],
                  **unless(config["num_attention_heads"], kv_heads=pieces.kv_heads(config)),
                  "inner_size": config.get("intermediate_size") or 4 * hidden,
                  "activation": pieces.activation(config.get("hidden_act") or "gelu"),
                  "adapter_rank": config.get("adapter_rank", 128),
                  **unless(False, adapted_attention=bool(config.get("use_shared_attention_adapter")))}
        if config.get("use_mem_rope"):
            said = pieces.rope({**config, "head_dim": 2 * hidden // config["num_attention_heads"]})
            if set(said) != {"rope_base"}:
                raise UserError("scaled or partial positions of the shared attention cannot be said in a spec")
            shared |= said
        hybrids = dict(cls.hybrids(config))
        blocks = {"mamba": {"mixer": mamba}} | {
            f"shared_{n}": {"mixer": shared, "norms": "none", "shared": f"shared_{n}"}
            for n in dict.fromkeys(hybrids.values())}
        names = [f"shared_{hybrids[i]}" if i in hybrids else "mamba" for i in range(config["num_hidden_layers"])]
        return {**pieces.sizes(config, True), "norm": pieces.rmsnorm(config, default=1e-5), "blocks": blocks,
                "layers": pieces.stack(names)}

    @classmethod
    def tensors(cls, config: Config) -> Iterator[Piece]:
        yield from pieces.ends(config, norm="final_layernorm", tied_by_default=True)
        hybrids, first, uses = dict(cls.hybrids(config)), {}, {}
        for i in range(config["num_hidden_layers"]):
            theirs, ours, mamba = f"model.layers.{i}", f"layers.{i}.mixer.layer", f"layers.{i}.mixer.norm.weight"
            decoder = theirs
            if i in hybrids:
                block = hybrids[i]
                if block not in first:
                    first[block] = i
                    yield from cls.shared(config, f"{theirs}.shared_transformer", ours)
                own = f"layers.{first[block]}.mixer.layer.uses.{uses.setdefault(block, 0)}"
                uses[block] += 1
                yield Piece(f"{theirs}.linear.weight", f"{own}.linear.weight")
                yield from cls.adapters(config, f"model.layers.{first[block]}.shared_transformer", own,
                                        list(hybrids).index(i))
                decoder, ours, mamba = f"{theirs}.mamba_decoder", f"{own}.mixer", f"{own}.norm.weight"
            yield Piece(f"{decoder}.input_layernorm.weight", mamba)
            yield from pieces.mamba2_tensors(f"{decoder}.mamba", ours)

    @classmethod
    def sizes(cls, config: Config) -> tuple[int, dict[str, int]]:
        """Dimensions of a head, and rows of q, k and v."""
        size = 2 * config["hidden_size"] // config["num_attention_heads"]
        heads, groups = config["num_attention_heads"] * size, pieces.kv_heads(config) * size
        return size, {"q": heads, "k": groups, "v": groups}

    @classmethod
    def shared(cls, config: Config, theirs: str, ours: str) -> Iterator[Piece]:
        size, rows = cls.sizes(config)
        turn, start = turned(size) if config.get("use_mem_rope") else SAME, 0
        for name, count in rows.items():
            yield Piece(f"{theirs}.self_attn.{name}_proj.weight", f"{ours}.attention.qkv.weight",
                        slice(start, start + count), SAME if name == "v" else turn)
            start += count
        yield Piece(f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.out.weight")
        yield Piece(f"{theirs}.input_layernorm.weight", f"{ours}.norm.weight")
        yield Piece(f"{theirs}.pre_ff_layernorm.weight", f"{ours}.attended_norm.weight")
        yield Piece(f"{theirs}.feed_forward.gate_up_proj.weight", f"{ours}.gate_up.weight")
        yield Piece(f"{theirs}.feed_forward.down_proj.weight", f"{ours}.down.weight")

    @classmethod
    def adapters(cls, config: Config, theirs: str, own: str, use: int) -> Iterator[Piece]:
        """use: which of all layers with a shared block."""
        for half, name in enumerate(("down", "up")):
            yield Piece(f"{theirs}.feed_forward.gate_up_proj_adapter_list.{use}.{half}.weight",
                        f"{own}.gate_up.{name}.weight")
            for n, kind in enumerate("qkv" if config.get("use_shared_attention_adapter") else ""):
                turns = config.get("use_mem_rope") and name == "up" and kind != "v"
                yield Piece(f"{theirs}.self_attn.linear_{kind}_adapter_list.{use}.{half}.weight",
                            f"{own}.qkv.{n}.{name}.weight", ..., turned(cls.sizes(config)[0]) if turns else SAME)
