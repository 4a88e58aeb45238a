"""What the files of many architectures have in common: the tables of attention, feed-forwards and the stack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tryplicity import SAME, Piece, UserError, turned

Config = Mapping[str, Any]


def stack(names: Sequence[str]) -> list[Any]:
    """`layers` of a spec from the name of each block: runs of the same one as repeats."""
    runs: list[list[Any]] = []
    for name in names:
        if runs and runs[-1][1] == name:
            runs[-1][0] += 1
        else:
            runs.append([1, name])
    return [name if times == 1 else {"repeat": times, "of": name} for times, name in runs]


def unless(default: Any, **options: Any) -> dict[str, Any]:
    """The options that are not the default."""
    return {name: value for name, value in options.items() if value != default}


def head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def kv_heads(config: Config) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def rope(config: Config) -> dict[str, Any]:
    """Base and scaling, where transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) has them."""
    said = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return {"rope_base": float(said.get("rope_theta") or config.get("rope_theta") or 10000.0)}


def attention(config: Config, theirs: str, ours: str, *, bias: bool = False, out_bias: bool = False,
              rotary: int | None = None, names: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
              positions: bool = True) -> Iterator[Piece]:
    """Grouped-query attention: q, k and v one below the other. rotary: dimensions of each head that are turned."""
    size, q, k, v, out = head_dim(config), *names
    heads, groups = config["num_attention_heads"] * size, kv_heads(config) * size
    turn = turned(size, rotary) if positions else SAME
    for kind in ["weight", "bias"] if bias else ["weight"]:
        yield Piece(f"{theirs}.{q}.{kind}", f"{ours}.qkv.{kind}", slice(0, heads), turn)
        yield Piece(f"{theirs}.{k}.{kind}", f"{ours}.qkv.{kind}", slice(heads, heads + groups), turn)
        yield Piece(f"{theirs}.{v}.{kind}", f"{ours}.qkv.{kind}", slice(heads + groups, heads + 2 * groups))
    yield Piece(f"{theirs}.{out}.weight", f"{ours}.out.weight")
    if out_bias:
        yield Piece(f"{theirs}.{out}.bias", f"{ours}.out.bias")


def gated_mlp(inner: int, theirs: str, ours: str, *, bias: bool = False,
              names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> Iterator[Piece]:
    """Gate and up, one below the other, and down."""
    gate, up, down = names
    for kind in ["weight", "bias"] if bias else ["weight"]:
        yield Piece(f"{theirs}.{gate}.{kind}", f"{ours}.gate_up.{kind}", slice(0, inner))
        yield Piece(f"{theirs}.{up}.{kind}", f"{ours}.gate_up.{kind}", slice(inner, 2 * inner))
        yield Piece(f"{theirs}.{down}.{kind}", f"{ours}.down.{kind}")


def ends(config: Config, *, root: str = "model", norm: str = "norm", embedding: str = "embed_tokens",
         tied: bool = False, head: str = "lm_head") -> Iterator[Piece]:
    """Embedding, last norm, output matrix. tied: what it is where the config does not say."""
    yield Piece(f"{root}.{embedding}.weight", "embedding.weight")
    yield Piece(f"{root}.{norm}.weight", "norm.weight")
    if not config.get("tie_word_embeddings", tied):
        yield Piece(f"{head}.weight", "unembedding.weight")


def sizes(config: Config, tied: bool = False) -> dict[str, Any]:
    """The sizes at the top of a spec. tied: as of `ends`."""
    return {"vocab_size": config["vocab_size"], "hidden_size": config["hidden_size"],
            "context_length": config["max_position_embeddings"],
            "tied_embeddings": config.get("tie_word_embeddings", tied)}


ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu2": "relu2"}


def activation(name: str) -> str:
    """What a config calls an activation, as ours. Raises UserError for one that there is not."""
    if name not in ACTIVATIONS:
        raise UserError(f"the activation {name} has no counterpart here (there are: {', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[name]
