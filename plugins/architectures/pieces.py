"""What many architectures have in common: options out of a config.json, and the tables of attention, feed-forwards,
experts, Mamba-2 and the ends of the stack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tryplicity import CONVOLUTION, SAME, Piece, UserError, turned

Config = Mapping[str, Any]
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu2": "relu2", "gelu_pytorch_tanh": "gelu_tanh",
               "gelu_new": "gelu_tanh"}


# --- a config.json as a spec ---

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


def tied(config: Config, default: bool = False) -> bool:
    """Whether the output matrix is the embedding table. default: where the config does not say."""
    said = config.get("tie_word_embeddings")
    return default if said is None else bool(said)


def sizes(config: Config, tied_by_default: bool = False) -> dict[str, Any]:
    """The sizes at the top of a spec."""
    return {"vocab_size": config["vocab_size"], "hidden_size": config["hidden_size"],
            "context_length": config["max_position_embeddings"], "tied_embeddings": tied(config, tied_by_default)}


def rmsnorm(config: Config, key: str = "rms_norm_eps", default: float = 1e-6) -> dict[str, Any]:
    return {"type": "rmsnorm", "eps": float(config.get(key, default))}


def activation(name: str) -> str:
    """What a config calls an activation, as ours. Raises UserError for one that there is not."""
    if name not in ACTIVATIONS:
        raise UserError(f"the activation {name} has no counterpart here (there are: {', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[name]


def head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def kv_heads(config: Config) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def rotary(config: Config) -> dict[str, Any]:
    """What is said of rotary positions, wherever transformers 4 (rope_theta, rope_scaling, partial_rotary_factor) or 5
    (rope_parameters) has it."""
    return {**{key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None},
            **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def rotary_dims(config: Config, fraction: float = 1.0) -> int:
    """Dimensions of each head that are turned. fraction: where the config does not say."""
    return int(head_dim(config) * rotary(config).get("partial_rotary_factor", fraction))


def rope(config: Config, *, base: float = 10000.0, fraction: float = 1.0) -> dict[str, Any]:
    """Options of rotary positions. Raises UserError for a scaling that there is not."""
    said = rotary(config)
    options = {"rope_base": float(said.get("rope_theta", base)),
               **unless(1.0, rotary_fraction=float(said.get("partial_rotary_factor", fraction)))}
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "default":
        return options
    if kind == "linear":
        scaling = {"factor": float(said["factor"])}
    elif kind == "llama3":
        scaling = {"factor": float(said["factor"]), "low_freq_factor": float(said["low_freq_factor"]),
                   "high_freq_factor": float(said["high_freq_factor"]),
                   "original_context": int(said["original_max_position_embeddings"])}
    elif kind == "yarn" and not said.get("mscale") and said.get("truncate", True):
        original = said.get("original_max_position_embeddings") or config["max_position_embeddings"]
        scaling = {"factor": float(said["factor"]), "original_context": int(original),
                   "beta_fast": float(said.get("beta_fast") or 32), "beta_slow": float(said.get("beta_slow") or 1),
                   **unless(None, attention_factor=said.get("attention_factor"))}
    else:
        raise UserError(f"rotary positions scaled by {kind} cannot be said in a spec (default, linear, llama3 and "
                        "plain yarn can)")
    return {**options, "rope_scaling": {"type": kind, **scaling}}


def gqa(config: Config, **options: Any) -> dict[str, Any]:
    """Attention's sizes, and `options`."""
    return {"type": "gqa", "heads": config["num_attention_heads"], "kv_heads": kv_heads(config),
            "head_dim": head_dim(config), **options}


def mlp(config: Config, inner: str = "intermediate_size", act: str = "hidden_act") -> dict[str, Any]:
    return {"type": "gated_mlp", "inner_size": config[inner], "activation": activation(config.get(act) or "silu"),
            **unless(False, bias=bool(config.get("mlp_bias")))}


def softmax_router(config: Config, normalize: bool) -> dict[str, Any]:
    return {"type": "top_k", "score": "softmax", "normalize": normalize}


def only(config: Config, **wanted: Any) -> None:
    """Raises UserError where the config says otherwise than the only thing that can be said here."""
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise UserError(f"{key} {config[key]} of its config.json cannot be said in a spec (only {value} can)")


def mamba2(config: Config, *, heads: str = "mamba_n_heads", head_dim: str = "mamba_d_head",
           state: str = "mamba_d_state", groups: str = "mamba_n_groups", width: str = "mamba_d_conv",
           eps: str = "rms_norm_eps", bias: str = "mamba_proj_bias", conv_bias: str = "mamba_conv_bias",
           **options: Any) -> dict[str, Any]:
    """A Mamba-2 mixer, by the names that the config has for its sizes."""
    limits = config.get("time_step_limit") or (0.0, None)
    low, high = (value.get("__float__") if isinstance(value, Mapping) else value for value in limits)
    return {"type": "mamba2", "heads": config[heads], "head_dim": mamba_head_dim(config, heads, head_dim),
            "state_size": config[state], "groups": config.get(groups, 1), "conv_width": config[width],
            "norm_eps": float(config.get(eps, 1e-5)), **unless(False, bias=bool(config.get(bias, False))),
            **unless(True, conv_bias=bool(config.get(conv_bias, True))), **unless(0.0, dt_limit_min=float(low)),
            **unless(None, dt_limit_max=None if high in (None, "Infinity", float("inf")) else float(high)), **options}


def mamba_head_dim(config: Config, heads: str = "mamba_n_heads", head_dim: str = "mamba_d_head") -> int:
    said = config.get(head_dim, "auto")
    return said if said != "auto" else config.get("mamba_expand", 2) * config["hidden_size"] // config[heads]


# --- and back: a config.json from a spec's layers with all their options ---

def config_of_sizes(spec: Config) -> dict[str, Any]:
    return {"vocab_size": spec["vocab_size"], "hidden_size": spec["hidden_size"],
            "num_hidden_layers": len(spec["layers"]), "max_position_embeddings": spec["context_length"],
            "tie_word_embeddings": spec["tied_embeddings"]}


def config_of_gqa(spec: Config, mixer: Config) -> dict[str, Any]:
    """Of attention with positions. Raises KeyError for another mixer, or what no Llama has."""
    heads, base, scaling = mixer["heads"], mixer["rope_base"], mixer.get("rope_scaling")
    said = {"rope_type": "default", "rope_theta": base}
    if scaling:
        said = {"rope_theta": base, "rope_type": scaling["type"],
                **{name: value for name, value in scaling.items() if name != "type" and value is not None}}
        if "original_context" in said:
            said["original_max_position_embeddings"] = said.pop("original_context")
    return {"num_attention_heads": heads, "num_key_value_heads": mixer["kv_heads"] or heads,
            "head_dim": mixer["head_dim"] or spec["hidden_size"] // heads, "rope_theta": base, "rope_parameters": said}


def inner_size(spec: Config, feed_forward: Config) -> int:
    """Of a gated_mlp, its default too."""
    return feed_forward["inner_size"] or -(-8 * spec["hidden_size"] // (3 * 64)) * 64


def config_of_activation(part: Config) -> str:
    """Raises KeyError for one that transformers does not have."""
    return {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[part["type"]]


# --- tables of tensors ---

def attention(config: Config, theirs: str, ours: str, *, bias: bool = False, out_bias: bool = False,
              turn: int | None = None, names: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
              norms: Sequence[str] = ()) -> Iterator[Piece]:
    """Grouped-query attention: q, k and v one below the other. turn: dimensions of each head that are turned; None:
    all. norms: what the norms of q and k are called, if there are any."""
    size, (q, k, v, out) = head_dim(config), names
    heads, groups = config["num_attention_heads"] * size, kv_heads(config) * size
    form = turned(size, turn) if turn != 0 else SAME
    for kind in ["weight", "bias"] if bias else ["weight"]:
        yield Piece(f"{theirs}.{q}.{kind}", f"{ours}.qkv.{kind}", slice(0, heads), form)
        yield Piece(f"{theirs}.{k}.{kind}", f"{ours}.qkv.{kind}", slice(heads, heads + groups), form)
        yield Piece(f"{theirs}.{v}.{kind}", f"{ours}.qkv.{kind}", slice(heads + groups, heads + 2 * groups))
    for kind in ["weight", "bias"] if out_bias else ["weight"]:
        yield Piece(f"{theirs}.{out}.{kind}", f"{ours}.out.{kind}")
    for norm, own in zip(norms, ("q_norm", "k_norm") if norms else (), strict=True):
        yield Piece(f"{theirs}.{norm}.weight", f"{ours}.{own}.weight", ..., form)


def gated_mlp(inner: int, theirs: str, ours: str, *, bias: bool = False, prefix: str = "",
              names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> Iterator[Piece]:
    """Gate and up, one below the other, and down. prefix: of our names."""
    gate, up, down = names
    for kind in ["weight", "bias"] if bias else ["weight"]:
        yield Piece(f"{theirs}.{gate}.{kind}", f"{ours}.{prefix}gate_up.{kind}", slice(0, inner))
        yield Piece(f"{theirs}.{up}.{kind}", f"{ours}.{prefix}gate_up.{kind}", slice(inner, 2 * inner))
        yield Piece(f"{theirs}.{down}.{kind}", f"{ours}.{prefix}down.{kind}")


def experts(count: int, inner: int, theirs: str, ours: str, *, router: str = "gate",
            names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> Iterator[Piece]:
    """A router, and gated experts of which each has tensors of its own there."""
    gate, up, down = names
    yield Piece(f"{theirs}.{router}.weight", f"{ours}.router.weight")
    for e in range(count):
        yield Piece(f"{theirs}.experts.{e}.{gate}.weight", f"{ours}.gate_up.weight", (e, slice(0, inner)))
        yield Piece(f"{theirs}.experts.{e}.{up}.weight", f"{ours}.gate_up.weight", (e, slice(inner, 2 * inner)))
        yield Piece(f"{theirs}.experts.{e}.{down}.weight", f"{ours}.down.weight", (e,))


def mamba2_tensors(theirs: str, ours: str, *, norm: bool = True, bias: bool = False,
                   conv_bias: bool = True) -> Iterator[Piece]:
    """Rows of z, x, B, C and dt are in one order there and here."""
    for projection in ("in_proj", "out_proj"):
        for kind in ["weight", "bias"] if bias else ["weight"]:
            yield Piece(f"{theirs}.{projection}.{kind}", f"{ours}.{projection}.{kind}")
    yield Piece(f"{theirs}.conv1d.weight", f"{ours}.conv_weight", ..., CONVOLUTION)
    if conv_bias:
        yield Piece(f"{theirs}.conv1d.bias", f"{ours}.conv_bias")
    for name in ("A_log", "D", "dt_bias"):
        yield Piece(f"{theirs}.{name}", f"{ours}.{name}")
    if norm:
        yield Piece(f"{theirs}.norm.weight", f"{ours}.norm_weight")


def ends(config: Config, *, root: str = "model", norm: str = "norm", embedding: str = "embed_tokens",
         tied_by_default: bool = False, head: str = "lm_head") -> Iterator[Piece]:
    """Embedding, last norm, output matrix."""
    yield Piece(f"{root}.{embedding}.weight", "embedding.weight")
    yield Piece(f"{root}.{norm}.weight", "norm.weight")
    if not tied(config, tied_by_default):
        yield Piece(f"{head}.weight", "unembedding.weight")
