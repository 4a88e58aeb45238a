"""The base classes a plugin author subclasses, one per family.

A component is a class with a `family`, a `name`, a frozen dataclass `Config` and a constructor that takes the
config first. The smallest layer:

    class Shift(Mixer):
        '''Each token sees the one before it.'''
        name = "shift"

        @dataclass(frozen=True)
        class Config:
            gain: float = 1.0       #: how much of the previous token is kept

        def __init__(self, config, site):
            super().__init__()
            self.gain = config.gain

        def forward(self, x_BTD, *, state=None, doc_ids=None): ...

Shapes: B batch, T time, D hidden, E experts, K chosen experts, N tokens (B*T), S rows sorted by expert,
V vocabulary, F inner.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from numbers import Number
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tryplicity.errors import UserError
from tryplicity.functional import grouped_linear
from tryplicity.guard import broken
from tryplicity.leftout import LeftOut
from tryplicity.parts import Component, Part

if TYPE_CHECKING:
    import numpy as np

    from tryplicity.world import World

IGNORE = -100  # the target of a position that has none


class Mean(NamedTuple):
    """A mean kept as its total and its count, so that parts of a batch (and ranks) add up exactly."""

    total: Tensor
    count: Tensor | float

    def __add__(self, other: Mean) -> Mean:  # type: ignore[override]
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Tensor:
        return self.total / (self.count if isinstance(self.count, Tensor) else max(self.count, 1e-9))


@dataclass
class Report:
    """What a layer says beside its output.

    losses: auxiliary losses by name, already weighted; each a mean over the rows (sequences) of this
        micro-batch of something computed per row, so that a batch cut into parts gives the same sum.
    stats: statistics by name, as totals and counts, detached.
    """

    losses: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    stats: dict[str, Mean] = dataclasses.field(default_factory=dict)

    def include(self, attribute: str, child: Report) -> None:
        """Add what the submodule held as `attribute` reported, under that name."""
        for name, loss in child.losses.items():
            self.losses[f"{attribute}.{name}"] = loss
        for name, stat in child.stats.items():
            self.stats[f"{attribute}.{name}"] = stat


def output_and_report(result: Tensor | tuple[Tensor, Report]) -> tuple[Tensor, Report]:
    """A component may return its output alone or with a Report; this gives both."""
    return result if isinstance(result, tuple) else (result, Report())


#: what a state may hold beside tensors and what holds them: nothing of it can be changed
_CONSTANTS = (Number, str, bytes, NoneType, Enum, torch.dtype, torch.device, torch.Size)


class State(dict):
    """The decoding state of one layer: named tensors, batch first, and numbers; in lists, tuples, dicts and further
    States to any depth, as a layer has it that is made of others. Updated in place."""

    def clone(self) -> State:
        """A copy that goes its own way, all the way down; what neither will write again may be shared. Tensors that
        share memory in one share it in the other. Raises TypeError naming what cannot be copied."""
        return _Copying(self).state(self, "state")


class Rows(tuple):
    """One decoding state for each row of a batch, whose sequences are of different lengths."""


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested states (their attributes too), mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in (*value.values(), *vars(value).values()) if isinstance(value, State) else value.values():
            yield from tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors(inner)


class _Copying:
    """One copying of a state: what is there twice is there twice in the copy."""

    def __init__(self, state: State) -> None:
        distinct = {id(tensor): tensor for tensor in tensors(state)}
        self.uses = Counter(tensor.untyped_storage()._cdata for tensor in distinct.values())
        self.done: dict[int, Tensor] = {}
        self.memory: dict[int, Any] = {}

    def state(self, value: State, where: str) -> State:
        twin = copy.copy(value)  # of its class, with whatever its constructor wants
        twin.update({key: self.value(inner, f"{where}[{key!r}]") for key, inner in value.items()})
        vars(twin).update({key: self.value(inner, f"{where}.{key}") for key, inner in vars(value).items()})
        return twin

    def value(self, value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, State):
            return self.state(value, where) if type(value).clone is State.clone else value.clone()
        if isinstance(value, _CONSTANTS):
            return value
        if type(value) is dict:
            return {key: self.value(inner, f"{where}[{key!r}]") for key, inner in value.items()}
        if type(value) in (list, tuple, Rows) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            parts = [self.value(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        raise TypeError(f"{where} is a {type(value).__name__}, which cannot be copied with the state; hold tensors and "
                        "numbers, in States, dicts, lists or tuples")

    def tensor(self, value: Tensor) -> Tensor:
        if id(value) not in self.done:
            self.done[id(value)] = self._tensor(value)
        return self.done[id(value)]

    def _tensor(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if self.uses[storage._cdata] == 1:
            return value.clone()
        if storage._cdata not in self.memory:
            self.memory[storage._cdata] = storage.clone()
        return value.detach().new_empty(0).set_(self.memory[storage._cdata], value.storage_offset(), value.shape,
                                                value.stride())


@dataclass(frozen=True)
class Site:
    """Where in the model a component stands, and the linear and norm components it should build with."""

    hidden_size: int
    vocab_size: int
    context_length: int
    layers: int
    layer: int | None = None
    sublayer: int = 0  # sub-layers before this one in its block
    linear_part: Part | None = None
    norm_part: Part | None = None

    def linear(self, in_features: int, out_features: int, *, experts: int | None = None,
               active_experts: float | None = None, bias: bool = False, writes_residual: bool = False) -> Linear:
        """The spec's linear component. `writes_residual`: initialised smaller, by 1/sqrt(2 * layers)."""
        std = 0.02 / (2 * self.layers) ** 0.5 if writes_residual else 0.02
        return self.linear_part.build(in_features, out_features, experts=experts, active_experts=active_experts,
                                      bias=bias, init_std=std)

    def norm(self, size: int) -> Norm:
        """The spec's norm component over the last axis of `size`."""
        return self.norm_part.build(size)


class Repair(NamedTuple):
    """What a module repaired in itself while the model slept."""

    stats: dict[str, float]
    #: own parameters by (dotted) name -> bool mask over dim 0: rows whose optimizer state must be zeroed
    reset: dict[str, Tensor]


class _Module(nn.Module, Component):
    """A component that is a torch module."""

    #: names of parameters of this module that weight decay must leave alone, beside all vectors and scalars
    undecayed: ClassVar[tuple[str, ...]] = ()
    #: share of this module's own parameters that work on one token (routed experts: chosen / all)
    active_fraction: float = 1.0

    def reset_parameters(self) -> None:
        """Initialise the parameters and buffers that this module itself holds (not its children's).

        Called once after the model, assembled on the meta device, got its memory. Whatever is left
        uninitialised raises.
        """

    def path(self, device: torch.device, compiled: bool) -> str | None:
        """Which of several ways of computing the same this takes in training on a device, and why, in a line for
        `doctor`; None where there is one way."""
        return None

    def before_step(self, step: int) -> None:
        """Called before each optimizer step with the number of steps done; decide here, on the host, what the
        step's forward passes will do beside the usual."""

    def after_step(self, step: int, stats: Mapping[str, Mean]) -> None:
        """Adapt buffers once per optimizer step, from this module's own statistics summed over the batch."""

    def consolidate(self, min_use: float, generator: torch.Generator) -> Repair | None:
        """Called at a sleep: repair what has gone unused or astray; None where there is nothing of the kind.

        min_use: a part used less than so many times its even share counts as dead. generator: the source of
        whatever is drawn anew.
        """
        return None

    def metrics(self, stats: Mapping[str, Mean]) -> dict[str, float | list[float]]:
        """What to log of this module's summed statistics; by default the mean of each."""
        return {name: stat.value.tolist() for name, stat in stats.items()}


class Layer(_Module):
    """A mixer or feed-forward: `Class(config, site)`, maps [B, T, D] to [B, T, D]."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x_BTD: Tensor, *, state: State | None = None, doc_ids: Tensor | None = None):
        """x_BTD: any length. Returns the output, or (output, Report).

        state: what `new_state` gave; the tokens continue those the state has seen, and it is updated in place.
        doc_ids: [B, T] integers from 0; tokens with different ids never reach one another, in one chunk or two: the
        state must know the last token's id. None: one document a row, with a state the one it stands in.
        No host synchronisation (no .item(), no shape that depends on data) while gradients are on.
        """
        raise NotImplementedError

    def new_state(self, batch: int, *, device=None, dtype=None) -> State | None:
        """An empty decoding state; None for a layer that looks at each token alone."""
        return None

    #: True: `state` may also be Rows, one State of `new_state(1)` for each row of x_BTD, as many sequences that are
    #: decoded together have; False: the layer is then called row by row
    takes_rows: ClassVar[bool] = False

    def extra_flops(self, tokens: int) -> int:
        """FLOPs of a custom kernel that torch's counter cannot see, forward only, for `tokens` tokens."""
        return 0


class Mixer(Layer):
    """Moves information between tokens."""

    family = "mixer"


class FeedForward(Layer):
    """Works on each token alone."""

    family = "feed_forward"


class Linear(_Module):
    """`Class(config, in, out, experts=...)`: x @ W.T, dense [out, in] or a stack [experts, out, in].

    A new linear overrides `effective_weight` and `effective_input`; dense, stacked and single-expert products
    then follow. One that an exported model holds in fewer bits overrides `packed_like`, `pack` and `unpack` too; all
    else (the file, loading, decoding) follows. `adopt`, `forward` and `expert_weight` are there to be overridden by
    one that can multiply by what it packed.
    """

    family = "linear"
    #: bits a weight takes in the exported model
    packed_bits: ClassVar[float] = 16.0
    #: what it packs to, in a word for people and file names
    packed_format: ClassVar[str] = "packed"

    def __init__(self, config, in_features: int, out_features: int, *, experts: int | None = None,
                 active_experts: float | None = None, bias: bool = False, init_std: float = 0.02) -> None:
        super().__init__()
        self.config, self.in_features, self.out_features, self.experts = config, in_features, out_features, experts
        self.init_std = init_std
        stack = () if experts is None else (experts,)
        self.weight = nn.Parameter(torch.empty(*stack, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(*stack, out_features)) if bias else None
        if experts is not None and active_experts is not None:
            self.active_fraction = active_experts / experts

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def effective_weight(self, weight: Tensor) -> Tensor:
        """The weight as it enters the product; any leading stack, then [out, in]."""
        return weight

    def effective_input(self, x: Tensor) -> Tensor:
        """The input as it enters the product, [..., in]."""
        return x

    def forward(self, x: Tensor, offsets_E: Tensor | None = None,
                spread: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Dense: [..., in] -> [..., out]. Stacked: rows x_SI sorted by expert, offsets_E int32 their ends.

        spread: makes such rows of tokens x_NI; applied after `effective_input`, so that a token is prepared once.
        """
        weight, x = self._whole_weight(), self.effective_input(x)
        if self.weight is not None and weight.shape != self.weight.shape:
            raise broken(self, f"effective_weight gave {list(weight.shape)} for {list(self.weight.shape)}")
        if self.experts is None:
            return F.linear(x, weight, self.bias)
        return grouped_linear(x if spread is None else spread(x), weight, offsets_E)

    def _whole_weight(self) -> Tensor:
        return self.unpack() if self.weight is None else self.effective_weight(self.weight)

    def packed_like(self) -> dict[str, Tensor]:
        """What `pack` gives, by name: tensors on the meta device of the same shapes and dtypes, which follow from this
        linear's sizes alone. Empty: an exported model stores `weight` itself."""
        return {}

    def pack(self) -> dict[str, Tensor] | None:
        """What an exported model stores in place of `weight`; the other parameters are there as they are."""
        return None

    def adopt(self, packed: Mapping[str, Tensor]) -> None:
        """Take what `pack` gave, in place of `weight`, which is None from then on, for inference alone; the tensors
        may lie in a mapped file. Here each becomes a buffer of its name."""
        self.weight = None
        for name, tensor in packed.items():
            self.register_buffer(name, tensor, persistent=False)

    def unpack(self) -> Tensor:
        """The weight as it enters the product, from what `adopt` took."""
        raise NotImplementedError

    def packed_nbytes(self) -> int:
        """Bytes in memory of what `adopt` took, as it lies there; 0 while there is a `weight`."""
        return 0 if self.weight is not None else sum(getattr(self, name).nbytes for name in self.packed_like())

    def expert_weight(self, expert: int) -> Tensor:
        """The [out, in] weight of one expert of a stack as it enters the product with an `effective_input`; for
        decoding, where only the chosen weights should be read."""
        return self.unpack()[expert] if self.weight is None else self.effective_weight(self.weight[expert])

    def extra_repr(self) -> str:
        stack = "" if self.experts is None else f"experts={self.experts}, "
        return f"{stack}in={self.in_features}, out={self.out_features}"


class Norm(_Module):
    """`Class(config, size)`: normalises the last axis."""

    family = "norm"

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Activation(_Module):
    """`Class(config, features, groups=None)`: elementwise on [..., features].

    groups: several sets of neurons in one (the experts of a stack); then `forward(x_SF, group_S)` gets the
    group of each row, `groups` itself meaning an unused row that must not count in any statistic.
    Returns the output, or (output, Report).
    """

    family = "activation"

    def forward(self, x: Tensor, group: Tensor | None = None):
        raise NotImplementedError


class Routing(NamedTuple):
    """A router's choice for N tokens."""

    experts_NK: Tensor  # int64; the number of experts itself stands for "none"
    weights_NK: Tensor  # the dtype of the tokens; zero where there is none
    report: Report


class Inhibition(_Module):
    """`Class(config, experts)`: how the choice of one expert for a token lowers the standing of the others.

    Any router can have one: an option `inhibition: Part = uses("inhibition", optional=True)`, built as
    `self.inhibition`, which then chooses from the router's scores.
    """

    family = "inhibition"

    def wants_sketch(self, step: int) -> bool:
        """As a router's own."""
        return False

    def take_sketch(self, sketch_EM: Tensor) -> None:
        """As a router's own."""

    def choose(self, scores_NE: Tensor, standing_NE: Tensor, most: int,
               k_N: Tensor | None = None) -> tuple[Tensor, Report]:
        """The experts of each token, [N, most], in the order in which they were chosen, and a report that the router
        includes as `inhibition`.

        scores_NE: detached, fp32; the weights of the chosen come from them. standing_NE: what is chosen by, scores
        and whatever else (balance) the router adds. k_N: how many of a token's experts will be used; None: all.
        """
        raise NotImplementedError

    def revive(self, dead: list[int]) -> None:
        """These experts were drawn anew: what was known of them is no longer so."""


class Router(_Module):
    """`Class(config, site, experts, top_k)`: chooses experts for each token.

    `max_k` is the widest choice (the K of Routing), `mean_k` what a budget is planned with.
    """

    family = "router"
    max_k: int
    mean_k: float
    #: what its choices do to one another; a router without it, or with None, has nothing of the kind
    inhibition: Inhibition | None

    def forward(self, x_BTD: Tensor) -> Routing:
        """x_BTD: the tokens, N = B*T."""
        raise NotImplementedError

    def wants_sketch(self, step: int) -> bool:
        """Whether `take_sketch` is to be called before this step."""
        return False

    def take_sketch(self, sketch_EM: Tensor) -> None:
        """sketch_EM: a random projection of each expert's weights, whose inner products estimate those of the
        weights, as they stand before a step. What is to be kept of it goes into a buffer."""

    def choose(self, x_D: Tensor) -> list[tuple[int, float]]:
        """What `forward` chooses for one token, as experts and their weights on the host; for decoding."""
        routing = self(x_D[None, None])
        return list(zip(routing.experts_NK[0].tolist(), routing.weights_NK[0].tolist(), strict=True))


class Residual(_Module):
    """`Class(config, site)`: how a sub-layer's output joins the stream(s). One instance per sub-layer."""

    family = "residual"

    def expand(self, x_BTD: Tensor) -> Tensor:
        """From the embedding to the stream(s) the first layer reads."""
        return x_BTD

    def reduce(self, streams: Tensor) -> Tensor:
        """From the last layer's stream(s) to [B, T, D]."""
        return streams

    def forward(self, streams: Tensor, sublayer) -> tuple[Tensor, Report]:
        """`sublayer(x_BTD) -> (y_BTD, Report)`. Returns the new stream(s) and the sub-layer's report."""
        raise NotImplementedError


class Head(_Module):
    """`Class(config, site)`: an objective on the last hidden state beside the next token's."""

    family = "head"
    #: factor of this head's mean loss in the total
    weight: float = 1.0

    def targets(self, ids_BT: Tensor, targets_BT: Tensor, doc_ids_BT: Tensor | None) -> Tensor:
        """What this head must predict, IGNORE where nothing; from data alone, so that the number of valid
        targets in the whole batch is known before the first backward pass. Any shape [B, T, ...]."""
        raise NotImplementedError

    def forward(self, h_BTD: Tensor, targets: Tensor, unembedding_VD: Tensor) -> Mean:
        """The summed loss over valid targets and their number. h_BTD: the hidden state after the last norm."""
        raise NotImplementedError

    def draft(self, h_BTD: Tensor) -> Tensor | None:
        """The hidden states that the unembedding turns into tokens 2, 3, ... ahead, [B, T, K, D], with which decoding
        may guess ahead; None for a head that has none."""
        return None


class Objective(_Module):
    """`Class(config, site)`: a training signal beside the heads'. Overrides one of the two methods below.

    With `block_loss` each block holds an instance, `site.layer` being its index; with `token_weights` the model
    holds one.
    """

    family = "objective"
    #: set before a step by the stage of a curriculum, on the host; multiplies what the objective adds
    factor: float = 1.0
    #: share of each row's tokens whose loss is propagated: those with the largest weights
    keep: float = 1.0

    def __init__(self, config: Any, site: Site) -> None:
        super().__init__()
        self.config = config

    def block_loss(self, x_BTD: Tensor, y_BTD: Tensor, doc_ids_BT: Tensor | None) -> Report:
        """A loss from a block's input and output alone, in training only. Each loss of the report is weighted,
        multiplied by `factor`, and a mean over rows of something computed for each row."""
        raise NotImplementedError

    def token_weights(self, nll_BT: Tensor, valid_BT: Tensor):
        """Weights [B, T] for the next-token loss of each token; their mean over the valid tokens of each row is
        one, and invalid tokens have zero. nll_BT: nats of the right token as the model stands, detached, fp32;
        zero where not valid. Returns the weights, or (weights, Report)."""
        raise NotImplementedError

    @classmethod
    def weighs_tokens(cls) -> bool:
        return cls.token_weights is not Objective.token_weights

    @classmethod
    def reads_blocks(cls) -> bool:
        return cls.block_loss is not Objective.block_loss


@dataclass(frozen=True)
class Stage:
    """What a part of pretraining does differently."""

    name: str
    context_length: int
    learning_rate_factor: float = 1.0
    tokens_per_step: int | None = None  # None: as many as the hardware profile gives
    mixture: Mapping[str, float] | None = None  # share of the tokens by domain; None: as the corpus is
    max_grade: float | None = None  # reading level up to this school grade; None: any
    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of objectives, by name


@dataclass
class Night:
    """What a sleeping brain module can reach."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    #: how the model lies over the ranks, all of which sleep alike: a parameter is changed inside `strategy.whole(part,
    #: write=True)`, and what the optimizer holds of it by `strategy.forget`
    strategy: Parallelism
    step: int
    seed: int
    checkpoints: list[Path]  # the regular ones on disk, oldest first; `saved_weights` reads them
    score: Callable[[], float]  # held-out bits per byte of the model as it is now
    #: (numbers of training documents, steps, learning-rate factor) -> mean loss; trains on rows packed of them
    replay: Callable[[np.ndarray, int, float], float]
    interrupted: Callable[[], bool]  # then return at once: the whole sleep is undone


class Brain(Component):
    """`Class(config)`: a module of the `brain:` list that acts on the run, from the host. All methods optional."""

    family = "brain"

    def __init__(self, config: Any) -> None:
        self.config = config

    def stage(self, spent: float, context_length: int) -> Stage | None:
        """The stage of pretraining when this share of its budget is spent. context_length: the spec's."""
        return None

    def observe(self, documents: np.ndarray, losses: np.ndarray, seed: int) -> None:
        """After each step of pretraining: the training documents seen in it and each one's mean nats a token."""

    def wants_sleep(self, step: int) -> bool:
        """Asked after each step of pretraining with the number of steps done."""
        return False

    def sleep(self, night: Night) -> dict[str, Any]:
        """What is done between steps; returns what to log. Called when `wants_sleep`, and at a sleep phase."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep of this object, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""


class Optimizer(Component):
    """`Class(config)`: makes a torch optimizer."""

    family = "optimizer"
    #: bytes of optimizer state per parameter, and of temporaries in its step (for the memory plan)
    state_bytes: ClassVar[int] = 8
    step_bytes: ClassVar[int] = 0

    def build(self, decayed: list[nn.Parameter], undecayed: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The learning rate of each group is its base; the schedule multiplies it."""
        raise NotImplementedError


class Schedule(Component):
    """`Class(config)`: the learning rate's factor over a run."""

    family = "schedule"

    def factor(self, progress: float, step: int) -> float:
        """progress: the share of the budget spent, 0 to 1. step: optimizer steps done."""
        raise NotImplementedError


class Document(NamedTuple):
    """A text with an identity that does not change between harvests and a URL a reader can check.

    What stands in the id before a `#` is the work that the document is part of: its parts are all trained on or all
    held out. A foreign name (of a file, a data set) goes through `tryplicity.escaped` before it becomes part of an id.
    """

    id: str
    text: str
    domain: str  # text, code or math
    url: str
    quality: float | None = None  # what its source says of it, on the source's own scale


class Conversation(NamedTuple):
    """A dialogue to learn from. The messages are mappings of `role` (system, user, assistant, tool) and `content`; one
    of the assistant's with a `weight` of 0 is read, but not learnt to write. The id is like a Document's."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    url: str


class Reading:
    """An iterator over a source's documents that can say where it stands. This one counts: it goes on by passing over
    as many documents as it had given, which is right for what lies on the disk; a source that streams has its own."""

    #: whether going on reads from the beginning again, so that what was left out before is counted again too
    rereads: ClassVar[bool] = True

    def __init__(self, documents: Iterator[Document], position: Any = None) -> None:
        """position: what `position` gave, of documents that are still the same; None: from the beginning."""
        self._documents, self._passed = documents, 0
        for _ in range(position or 0):
            next(self, None)

    def __iter__(self) -> Reading:
        return self

    def __next__(self) -> Document:
        document = next(self._documents)
        self._passed += 1
        return document

    def position(self) -> Any:
        """Where the next document is read from, as JSON."""
        return self._passed


class Source(Component):
    """`Class(config)`: where training text comes from; it gives documents, or conversations, or both."""

    family = "source"

    @functools.cached_property
    def left_out(self) -> LeftOut:
        """What `documents` or `conversations` passed over (files, rows) when last iterated, counted by reason. Add to
        it while they run; whoever reads them to the end prints it."""
        return LeftOut("items")

    def fingerprint(self) -> str:
        """Changes when the documents may have: under this the cache finds them without reading the source. It may be
        made of paths and times; what the data is, is told by the documents alone."""
        raise NotImplementedError

    def documents(self) -> Iterator[Document]:
        """Raises UserError where the source holds conversations alone."""
        raise NotImplementedError

    def reading(self, position: Any = None) -> Reading:
        """The documents from a position on, which an earlier `Reading` gave. Raises Unreachable where a connection
        breaks: the next try goes on from the last position."""
        return Reading(self.documents(), position)

    def conversations(self) -> Iterator[Conversation]:
        """What a chat phase learns from."""
        raise UserError(f"source {self.name}: holds documents, not conversations; a chat phase needs conversations, "
                        "such as a .jsonl file of {\"messages\": [...]}")


class Verdict(NamedTuple):
    """What a judge says of a document."""

    score: float  # higher is better, on the judge's own scale
    keep: bool | None  # None: no opinion; then others decide
    reason: str = ""  # why it is not kept: a short phrase, under which such documents are counted


class Judge(Component):
    """Says whether documents are worth learning from. `Class(config)`.

    One instance works in one process, on one device; several processes may have one each. The same document gets the
    same verdict whatever others are judged with it.
    """

    family = "judge"
    #: seconds that a document takes, in its order of magnitude: the cheap ones are asked first, and the dear ones only
    #: where the vote is still open
    cost: ClassVar[float] = 1e-3

    def __init__(self, config: Any) -> None:
        self.config = config

    def load(self, device: torch.device) -> None:
        """Called once before the first `judge`: read a model. Raises UserError with the reason where it cannot."""

    def judge(self, documents: Sequence[Document]) -> list[Verdict]:
        """A verdict for each."""
        raise NotImplementedError


class Passage(NamedTuple):
    """A stretch of text that an answer can rest on, and where a reader can check it."""

    id: str  # the same for the same passage as long as the index stands
    title: str
    url: str
    text: str
    score: float  # higher is better; comparable within one search alone


class Retriever(Component):
    """Finds passages for a question. `Class(config)`; `search` may be called from several threads at once."""

    family = "retriever"

    def __init__(self, config: Any) -> None:
        self.config = config

    def search(self, question: str, limit: int) -> list[Passage]:
        """At most `limit` passages, best first. Raises UserError when it cannot search at all (no index, no
        network), with what to do."""
        raise NotImplementedError

    def examples(self, limit: int) -> list[str]:
        """At most `limit` questions that its passages can answer, for a page to offer; none where it does not know."""
        return []


class Parallelism(Component):
    """A strategy: how a model is laid over the ranks of a `World`. `Class(config)`; one instance for one training.

    What is here does for one rank; a strategy for several overrides what is different for it. Every method of a
    training is called on all ranks alike.
    """

    family = "parallelism"
    #: where a profile says `auto` the first that fits is taken, tried by this, the lowest first; the project's own are
    #: at 10 (one device), 20 (copies) and 30 (shards)
    order: ClassVar[float] = 100
    #: True: a forward pass takes one row, whatever the profile's batch; products of several round otherwise
    row_by_row: bool = False

    def memory(self, facts, hardware):
        """The peak memory of one device, part by part: `planner.memory.MemoryPlan`."""
        raise NotImplementedError

    def refuses(self, hardware) -> str | None:
        """Why this strategy cannot be used on this hardware at all, or None."""
        return None

    def ranks(self, hardware) -> int:
        """How many processes it wants, of one device each."""
        return hardware.count

    def place(self, model: nn.Module, world: World, seed: int, precision: str = "fp32") -> nn.Module:
        """Lay out a model assembled on the meta device: transform, materialise on `world.device`, initialise, tie
        again. The initial values are the same whatever the world. What the methods below need of it, it keeps.

        precision: "bf16" where the steps compute in bfloat16 (they are under autocast in any case).
        Raises UserError for a world that it cannot use.
        """
        raise NotImplementedError

    def forward(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of a micro-batch in training: of the model, or of what the strategy wrapped it in."""
        return model(*args, **kwargs)

    def micro_batch(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward pass of one micro-batch. After that of a step's last one every gradient is
        the sum (not the mean) over all ranks, or this rank's share of it."""
        return nullcontext()

    def clip_gradients(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale the gradients so that the norm of all of them together is at most `max_norm`; returns the norm before,
        a plain tensor, the same on every rank."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        # in fp64: whoever adds up the squares in another order comes to the same
        norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients])
        norm = torch.linalg.vector_norm(norms).float()
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        return norm

    def whole(self, module: nn.Module, write: bool = False) -> AbstractContextManager[Any]:
        """Inside, every parameter of the model or of a part of it is whole on every rank: to sample (each rank may call
        the model alone), to look at, or, with `write`, to change, which all ranks do alike, in full precision and
        without calling the model. Outside it the model is called by all ranks together."""
        return nullcontext()

    def forget(self, optimizer: torch.optim.Optimizer, parameter: Tensor, rows: Tensor) -> None:
        """Zero what the optimizer holds of these rows, a bool mask over dim 0, of a parameter of the model (outside
        `whole`)."""
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[rows.to(value.device)] = 0

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What a checkpoint keeps, under the names of the plain model, so that any strategy and any world can go on
        from it: {"model": {name: tensor}, "optimizer": {"state": {parameter: {...}}, "groups": [{...}]}}, where a
        group's "params" are names; DTensors where a rank holds a share. It shares the memory of what it is the state
        of. Of a parameter that the optimizer has made no step with yet there is no state."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
        held = {names[id(p)]: dict(state) for p, state in optimizer.state.items()}
        return {"model": dict(model.state_dict()), "optimizer": {"state": held, "groups": groups}}

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Put back what `state` gave, filled from a checkpoint: tensors that lie as this strategy's own do. Raises
        ValueError for an optimizer whose groups hold other parameters."""
        model.load_state_dict(state["model"])
        named = dict(model.named_parameters())
        number = {name: i for i, name in enumerate(n for g in state["optimizer"]["groups"] for n in g["params"])}
        own = [[named[name] for name in group["params"]] for group in state["optimizer"]["groups"]]
        if [[id(p) for p in group["params"]] for group in optimizer.param_groups] != [[id(p) for p in g] for g in own]:
            raise ValueError("its groups hold other parameters")
        optimizer.load_state_dict({
            "state": {number[name]: held for name, held in state["optimizer"]["state"].items()},
            "param_groups": [{**group, "params": [number[name] for name in group["params"]]}
                             for group in state["optimizer"]["groups"]]})

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Weights and buffers, whole, in CPU memory, by name: on rank 0; what other ranks give, nobody looks at. They
        may be the model's own memory."""
        return {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}


FAMILIES: dict[str, type[Component]] = {
    cls.family: cls
    for cls in (Mixer, FeedForward, Linear, Norm, Activation, Router, Inhibition, Residual, Head, Objective, Brain,
                Parallelism, Optimizer, Schedule, Source, Judge, Retriever)
}

__all__ = [
    "FAMILIES",
    "IGNORE",
    "Activation",
    "Brain",
    "Component",
    "Conversation",
    "Document",
    "FeedForward",
    "Head",
    "Inhibition",
    "Iterable",
    "Judge",
    "Layer",
    "Linear",
    "Mean",
    "Mixer",
    "Night",
    "Norm",
    "Objective",
    "Optimizer",
    "Parallelism",
    "Part",
    "Passage",
    "Reading",
    "Repair",
    "Report",
    "Residual",
    "Retriever",
    "Router",
    "Routing",
    "Rows",
    "Schedule",
    "Site",
    "Source",
    "Stage",
    "State",
    "Verdict",
    "output_and_report",
    "tensors",
]
