"""The model: embed -> blocks -> norm -> heads. Nothing here names a concrete layer.

Shapes: B batch, T time, D hidden, V vocabulary, K kept tokens of a row; `streams` is whatever the residual component
keeps, [B, T, D] or [B, T, S, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tryplicity import kernels
from tryplicity.components import (
    IGNORE,
    Layer,
    Mean,
    Norm,
    Objective,
    Report,
    Residual,
    Rows,
    State,
    output_and_report,
)
from tryplicity.errors import PluginFault, UserError
from tryplicity.functional import cross_entropy_and_nll
from tryplicity.guard import broken
from tryplicity.parts import Component
from tryplicity.promises import check_mean, check_output, check_weights
from tryplicity.spec import Spec

NEXT_TOKEN = "next_token"


class Table(nn.Module):
    """A vector for every token of the vocabulary. For inference alone `hold` may give it another form."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.scale_V: Tensor | None = None  # of int8 rows
        self.dtype: torch.dtype | None = None  # of what comes out; None: the weight's

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # on meta it would import the compiler, two seconds of it
            nn.init.normal_(self.weight, std=0.02)

    def hold(self, weight_VD: Tensor, scale_V: Tensor | None, dtype: torch.dtype) -> None:
        """weight_VD: fp32, bf16, or int8 with a scale for each row; it may lie in a mapped file."""
        self.weight = nn.Parameter(weight_VD, requires_grad=False)
        self.scale_V, self.dtype = scale_V, dtype


class Embedding(Table):
    def __init__(self, vocab_size: int, hidden_size: int, multiplier: float = 1.0) -> None:
        super().__init__(vocab_size, hidden_size)
        self.multiplier = multiplier

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD = F.embedding(ids_BT, self.weight)
        if self.scale_V is not None:
            x_BTD = x_BTD.to(self.dtype) * self.scale_V[ids_BT][..., None].to(self.dtype)
        elif self.dtype is not None:
            x_BTD = x_BTD.to(self.dtype)
        return x_BTD if self.multiplier == 1.0 else x_BTD * self.multiplier


class Unembedding(Table):
    """The output matrix of a model whose embeddings are not tied."""


def unembed(table: Table, h_BTD: Tensor) -> Tensor:
    """Logits [B, T, V]. Decoding in fp32 on a CPU gives a token the same bits however many there are."""
    weight_VD, scale_V = table.weight, table.scale_V
    if (not torch.is_grad_enabled() and type(h_BTD) is Tensor and h_BTD.device.type == "cpu"
            and h_BTD.dtype == torch.float32 and weight_VD.is_contiguous() and not torch.compiler.is_compiling()):
        return kernels.rows_linear(h_BTD.flatten(0, -2), weight_VD, scale_V).unflatten(0, h_BTD.shape[:-1])
    logits_BTV = F.linear(h_BTD, weight_VD.to(h_BTD.dtype))
    return logits_BTV if scale_V is None else logits_BTV * scale_V.to(h_BTD.dtype)


class SubLayer(nn.Module):
    """norm -> layer, or where the spec says so layer -> norm or norm -> layer -> norm, joined to the residual stream(s)
    by the residual component."""

    def __init__(self, spec: Spec, part: Any, layer: int, sublayer: int) -> None:
        super().__init__()
        site, norms = spec.site(layer, sublayer), spec.layers[layer].norms or spec.norms
        self.norm = None if norms in ("after", "none") else site.norm(spec.hidden_size)
        self.layer = part.build(site)
        self.norm_after = None if norms in ("before", "none") else site.norm(spec.hidden_size)
        self.residual = spec.residual.build(site)

    def forward(self, streams: Tensor, state: State | Rows | None, doc_ids_BT: Tensor | None,
                embedding_BTD: Tensor | None = None, use: int = 0) -> tuple[Tensor, Report]:
        layer = self.layer
        more = {"use": use} if layer.takes_use else {}

        def embedding(row: slice = slice(None)) -> dict[str, Tensor]:
            return {"embedding": embedding_BTD[row]} if layer.takes_embedding and embedding_BTD is not None else {}

        def run(given_BTD: Tensor) -> tuple[Tensor, Report]:
            x_BTD = _normed(self.norm, given_BTD)
            if isinstance(state, Rows) and not layer.takes_rows:
                rows = [output_and_report(layer(x_BTD[i:i + 1], state=own, **embedding(slice(i, i + 1)), **more))[0]
                        for i, own in enumerate(state)]
                return _normed(self.norm_after, torch.cat(rows)), Report()
            y_BTD, report = output_and_report(layer(x_BTD, state=state, doc_ids=doc_ids_BT, **embedding(), **more))
            check_output(layer, given_BTD, y_BTD)
            return _normed(self.norm_after, y_BTD), report

        return self.residual(streams, run)


def _normed(norm: Norm | None, x_BTD: Tensor) -> Tensor:
    if norm is None:
        return x_BTD
    y_BTD = norm(x_BTD)
    check_output(norm, x_BTD, y_BTD)
    return y_BTD


class Block(nn.Module):
    """One layer of the stack: a mixer, then a feed-forward, as far as the spec has them."""

    def __init__(self, spec: Spec, layer: int) -> None:
        super().__init__()
        block = spec.layers[layer]
        self.mixer = SubLayer(spec, block.mixer, layer, 0) if block.mixer else None
        before = int(self.mixer is not None)
        self.feed_forward = SubLayer(spec, block.feed_forward, layer, before) if block.feed_forward else None
        self.objectives = _objectives(spec, "reads_blocks", spec.site(layer))

    @property
    def sublayers(self) -> dict[str, SubLayer]:
        """In order, by what they are."""
        both = {"mixer": self.mixer, "feed_forward": self.feed_forward}
        return {role: part for role, part in both.items() if part is not None}

    @property
    def residual(self) -> Residual:
        """Of the first sub-layer."""
        return next(iter(self.sublayers.values())).residual

    def new_state(self, batch: int, **options: Any) -> list[State | None]:
        return [part.layer.new_state(batch, **options) for part in self.sublayers.values()]

    def also_given(self, embedding_BTD: Tensor, use: int) -> tuple:
        """What `forward` takes after the documents, as far as a layer of it asks for it."""
        layers = [part.layer for part in self.sublayers.values()]
        embedding = embedding_BTD if any(layer.takes_embedding for layer in layers) else None
        if any(layer.takes_use for layer in layers):
            return embedding, use
        return () if embedding is None else (embedding,)

    def forward(self, streams: Tensor, state: list[State | Rows | None] | None = None,
                doc_ids_BT: Tensor | None = None, embedding_BTD: Tensor | None = None,
                use: int = 0) -> tuple[Tensor, Report]:
        """use: see `Layer.takes_use`."""
        report, before = Report(), streams
        for i, (role, part) in enumerate(self.sublayers.items()):
            streams, said = part(streams, state and state[i], doc_ids_BT, embedding_BTD, use)
            report.include(f"{role}.layer", said)
        if self.objectives and self.training and torch.is_grad_enabled():
            reduce = self.residual.reduce
            x_BTD, y_BTD = reduce(before), reduce(streams)
            for name, objective in self.objectives.items():
                report.include(f"objectives.{name}", objective.block_loss(x_BTD, y_BTD, doc_ids_BT))
        return streams, report


class Stack(nn.ModuleList):
    """The layers in their order. A shared block stands at each of its layers, and is held, named, saved and initialised
    as the first of them: `named_children` has each block once."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.first = spec.first_uses  # of each layer, the one that its block is held as
        for i in sorted(set(self.first)):
            self.add_module(str(i), Block(spec, i))

    def __len__(self) -> int:
        return len(self.first)

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, layer: int | slice) -> Block | list[Block]:
        places = self.first[layer]
        if isinstance(layer, slice):
            return [self._modules[str(place)] for place in places]
        return self._modules[str(places)]

    def use(self, layer: int) -> int:
        """At which of its block's layers one is, from 0."""
        return self.first[:layer].count(self.first[layer])


def _objectives(spec: Spec, kind: str, site: Any) -> nn.ModuleDict:
    """The objectives of the spec's `brain` that act at a site: `reads_blocks` or `weighs_tokens`."""
    parts = [part for part in spec.brain if issubclass(part.component, Objective)]
    for part in parts:
        if not (part.component.reads_blocks() or part.component.weighs_tokens()):
            raise UserError(f"objective {part.name}: overrides neither block_loss nor token_weights")
    return nn.ModuleDict({part.name: part.build(site) for part in parts if getattr(part.component, kind)()})


class Losses(NamedTuple):
    """What a training forward gives."""

    objectives: dict[str, Mean]  # the next token's and each head's: summed nats and their number
    report: Report  # auxiliary losses and statistics of the layers and objectives
    nll_BT: Tensor  # nats of each next token, unweighted and detached; zero where there is none


class Model(nn.Module):
    """A language model as its spec declares it. Assemble under `torch.device("meta")`, then `initialise`."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = Embedding(spec.vocab_size, spec.hidden_size, spec.embedding_multiplier)
        self.layers = Stack(spec)
        self.norm = spec.site().norm(spec.hidden_size)
        self.unembedding = None if spec.tied_embeddings else Unembedding(spec.vocab_size, spec.hidden_size)
        self.heads = nn.ModuleDict({part.name: part.build(spec.site()) for part in spec.heads})
        self.objectives = _objectives(spec, "weighs_tokens", spec.site())
        self.activation_checkpointing = False

    @property
    def table(self) -> Table:
        """The output matrix."""
        return self.embedding if self.unembedding is None else self.unembedding

    @property
    def unembedding_VD(self) -> Tensor:
        return self.table.weight

    def logits(self, h_BTD: Tensor) -> Tensor:
        """[B, T, V] of a hidden state as `hidden` gives it, the next token's or what a head drafts."""
        logits_BTV, cap = unembed(self.table, h_BTD), self.spec.logits_softcap
        return logits_BTV if cap is None else (logits_BTV / cap).tanh() * cap

    def hidden(self, ids_BT: Tensor, *, state: list | None = None, doc_ids_BT: Tensor | None = None,
               run: Callable = nn.Module.__call__) -> tuple[Tensor, Report]:
        """The hidden state after the last norm, times `logits_multiplier`, [B, T, D], and what the layers reported.
        run: calls a block."""
        residual = self.layers[0].residual
        x_BTD = self.embedding(ids_BT)
        if torch.is_autocast_enabled(x_BTD.device.type):
            # autocast leaves an embedding in fp32, and with it every residual stream: twice the memory
            x_BTD = x_BTD.to(torch.get_autocast_dtype(x_BTD.device.type))
        streams, report = residual.expand(x_BTD), Report()
        if isinstance(state, Rows):
            state = _by_layer(state)
        for i, block in enumerate(self.layers):
            more = block.also_given(x_BTD, self.layers.use(i))
            if self.activation_checkpointing and torch.is_grad_enabled():
                streams, said = checkpoint(block, streams, None, doc_ids_BT, *more, use_reentrant=False,
                                           preserve_rng_state=False)
            else:
                streams, said = run(block, streams, state and state[i], doc_ids_BT, *more)
            report.include(f"layers.{self.layers.first[i]}", said)
        return last_hidden(self.norm(residual.reduce(streams)), self.spec.logits_multiplier), report

    def forward(self, ids_BT: Tensor, *, targets: Mapping[str, Tensor] | None = None, state: list | None = None,
                doc_ids_BT: Tensor | None = None, last_only: bool = False) -> Losses | Tensor:
        """With `targets` (from `targets()`): the losses. Without: logits [B, T, V], or [B, 1, V] if last_only.

        state: what `new_state` gave, updated in place; the tokens continue those it has seen. Or Rows of what
        `new_state(1)` gave, one for each row of ids_BT.
        """
        h_BTD, report = self.hidden(ids_BT, state=state, doc_ids_BT=doc_ids_BT)
        if targets is None:
            return self.logits(h_BTD[:, -1:] if last_only else h_BTD)
        next_BT = targets[NEXT_TOKEN]
        weighing = self.objectives if self.training else {}
        total, nll_BT = next_token_loss(h_BTD, self.unembedding_VD, next_BT, weighing, report,
                                        self.spec.logits_softcap)
        objectives = {NEXT_TOKEN: Mean(total, (next_BT != IGNORE).sum())}
        if self.training:
            for name, head in self.heads.items():
                objectives[name] = check_mean(head, head(h_BTD, targets[name], self.unembedding_VD))
        return Losses(objectives, report, nll_BT)

    def targets(self, ids_BT: Tensor, next_BT: Tensor, doc_ids_BT: Tensor | None) -> dict[str, Tensor]:
        """What each objective must predict, from data alone; IGNORE where nothing."""
        return {NEXT_TOKEN: next_BT, **{name: head.targets(ids_BT, next_BT, doc_ids_BT)
                                        for name, head in self.heads.items()}}

    def weights(self) -> dict[str, float]:
        """The factor of each objective's mean in the total loss."""
        return {NEXT_TOKEN: 1.0, **{name: head.weight for name, head in self.heads.items()}}

    def new_state(self, batch: int) -> list:
        """An empty decoding state for `batch` sequences."""
        weight = self.embedding.weight
        return [block.new_state(batch, device=weight.device, dtype=self.embedding.dtype or weight.dtype)
                for block in self.layers]

    def set_factors(self, factors: Mapping[str, float]) -> None:
        """The factor of each objective by name; one where none is given."""
        for module in self.modules():
            if isinstance(module, Objective):
                module.factor = factors.get(module.name, 1.0)

    def after_step(self, step: int, stats: Mapping[str, Mean]) -> None:
        """Let every module adapt its buffers from its statistics, summed over the whole batch."""
        for name, own in self._by_module(stats).items():
            self.get_submodule(name).after_step(step, own)

    def metrics(self, stats: Mapping[str, Mean]) -> dict[str, float | list[float]]:
        """Summed statistics as numbers to log, under their module's name."""
        return {f"{_short(name)}.{key}": value for name, own in self._by_module(stats).items()
                for key, value in self.get_submodule(name).metrics(own).items()}

    def _by_module(self, stats: Mapping[str, Mean]) -> dict[str, dict[str, Mean]]:
        found: dict[str, dict[str, Mean]] = {}
        for path, stat in stats.items():
            module, _, name = path.rpartition(".")
            found.setdefault(module, {})[name] = stat
        return found


def _by_layer(rows: Rows) -> list[list[Rows | None]]:
    """The states of several sequences, each a list over layers of a list over sub-layers, as such a list of Rows; None
    where a sub-layer has no state."""
    return [[None if own[0] is None else Rows(own) for own in zip(*blocks, strict=True)]
            for blocks in zip(*rows, strict=True)]


def last_hidden(h_BTD: Tensor, multiplier: float) -> Tensor:
    """The hidden state whose product with the output matrix is the logits: multiplied here, they are so everywhere."""
    return h_BTD if multiplier == 1.0 else h_BTD * multiplier


def next_token_loss(h_BTD: Tensor, unembedding_VD: Tensor, next_BT: Tensor, weighing: Mapping[str, Objective],
                    report: Report, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """The summed next-token loss, weighted by the objectives that weigh tokens, and each token's own, [B, T]."""
    h_ND, next_N = h_BTD.flatten(0, 1), next_BT.flatten()
    if not weighing:
        total, nll_N = cross_entropy_and_nll(h_ND, unembedding_VD, next_N, softcap=softcap)
        return total, nll_N.view_as(next_BT)
    with torch.no_grad():  # the weights of a row depend on all its losses, so that they come first
        nll_BT = cross_entropy_and_nll(h_ND, unembedding_VD, next_N, softcap=softcap)[1].view_as(next_BT)
    weights_BT, keep = torch.ones_like(nll_BT), 1.0
    for name, objective in weighing.items():
        own_BT, said = output_and_report(objective.token_weights(nll_BT, next_BT != IGNORE))
        check_weights(objective, own_BT, nll_BT)
        report.include(f"objectives.{name}", said)
        weights_BT, keep = weights_BT * own_BT, min(keep, objective.keep)
    if keep == 1.0:
        total, _ = cross_entropy_and_nll(h_ND, unembedding_VD, next_N, weights_BT.flatten(), softcap=softcap)
        return total, nll_BT
    kept_BK = weights_BT.topk(math.ceil(keep * next_BT.shape[1]), dim=1).indices
    h_BKD = h_BTD.gather(1, kept_BK[..., None].expand(-1, -1, h_BTD.shape[-1]))
    total, _ = cross_entropy_and_nll(h_BKD.flatten(0, 1), unembedding_VD, next_BT.gather(1, kept_BK).flatten(),
                                     weights_BT.gather(1, kept_BK).flatten(), softcap=softcap)
    return total, nll_BT


def _short(module: str) -> str:
    """'layers.3.feed_forward.layer.router' -> 'layers.3.feed_forward.router': the wrapper's name tells nothing."""
    return ".".join(step for step in module.split(".") if step != "layer")


def assemble(spec: Spec) -> Model:
    """The model on the meta device: every shape, no memory. Raises PluginFault for a layer that could be trained and
    not decoded, since its state is none."""
    with torch.device("meta"):
        model = Model(spec)
        for i, block in enumerate(model.layers):
            for role, part in block.sublayers.items():
                _check_state(part.layer, f"layers.{i}.{role}")
    return model


def _check_state(layer: Layer, path: str) -> None:
    """Whether the empty state of a layer can be made, as decoding makes it, and copied, as the engine copies it."""
    def refuse(why: str) -> PluginFault:
        made = type(layer).new_state.__code__
        return PluginFault(f"{path} ({layer.family} {layer.name}): {why} (new_state, {made.co_filename}:"
                           f"{made.co_firstlineno})")

    try:
        state = layer.new_state(1, device=torch.device("meta"), dtype=torch.float32)
    except Exception as error:
        raise refuse(f"cannot make its decoding state: {type(error).__name__}: {error}") from error
    if state is None:
        return
    if not isinstance(state, State):
        raise refuse(f"its decoding state is a {type(state).__name__}; return a State, or None for a layer without one")
    try:
        state.clone()
    except TypeError as error:
        raise refuse(str(error)) from error


def _component_of(model: nn.Module, name: str) -> nn.Module:
    """The component that holds a parameter, itself or in a module of torch's."""
    steps = name.split(".")
    holders = [model.get_submodule(".".join(steps[:end])) for end in range(len(steps) - 1, 0, -1)]
    return next((holder for holder in holders if isinstance(holder, Component)), holders[0])


def initialise(model: Model, device: torch.device | str, seed: int,
               block_done: Callable[[nn.Module], Any] = lambda block: None) -> Model:
    """Give a model on the meta device memory and its initial values, the same for the same seed.

    block_done: called with each block of the stack when that has its values, before the next one gets memory; a
    strategy may keep a share of it.
    Raises PluginFault naming a parameter or buffer that its module's reset_parameters left uninitialised.
    """
    torch.manual_seed(seed)
    for name, child in model.named_children():
        blocks = child is model.layers
        for path, part in child.named_children() if blocks else [(name, child)]:
            _initialise(model, f"{name}.{path}" if blocks else name, part, device)
            if blocks:
                block_done(part)
    return model


@torch.no_grad()
def _initialise(model: Model, path: str, part: nn.Module, device: torch.device | str) -> None:
    part.to_empty(device=device)
    for tensor in (*part.parameters(), *part.buffers()):
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    for module in part.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, tensor in (*part.named_parameters(path), *part.named_buffers(path)):  # some share what others filled
        if tensor.is_floating_point() and tensor.isnan().any():
            raise broken(_component_of(model, name),
                         f"{name} is uninitialised: reset_parameters must fill what the module itself holds")
