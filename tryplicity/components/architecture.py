"""Published architectures: how a config.json of transformers reads as a spec, and where each tensor goes.

An architecture is a class whose `name` is the `model_type` of its config.json. It says two things, both as plain data:

    class Tiny(Architecture):
        '''A stack of one kind of block.'''
        name = "tiny"

        @classmethod
        def spec(cls, config):
            return {"vocab_size": config["vocab_size"], "hidden_size": config["hidden_size"], ...}

        @classmethod
        def tensors(cls, config):
            yield Piece("model.embed_tokens.weight", "embedding.weight")
            for i in range(config["num_hidden_layers"]):
                yield Piece(f"model.layers.{i}.attn.q.weight", f"layers.{i}.mixer.layer.qkv.weight",
                            slice(0, 64), turned(32))
                ...

Each piece is one foreign tensor and the part of our tensor that it is, with a form between them that can be undone bit
for bit; what is imported and exported again is therefore the same file. All pieces of one of our tensors must fill it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from tryplicity.parts import Component


class Form(NamedTuple):
    """A rearrangement of a tensor's numbers and its inverse; neither changes a bit of one."""

    ours: Callable[[Tensor], Tensor]  # from the foreign arrangement
    theirs: Callable[[Tensor], Tensor]


SAME = Form(lambda tensor: tensor, lambda tensor: tensor)
TRANSPOSED = Form(lambda tensor: tensor.mT, lambda tensor: tensor.mT)
#: a depthwise convolution's weight: [C, 1, W] there, [W, C] here
CONVOLUTION = Form(lambda tensor: tensor.squeeze(1).mT, lambda tensor: tensor.mT.unsqueeze(1))


def turned(head_dim: int, rotary: int | None = None) -> Form:
    """Rows of q and k (or what is added to or multiplied with them), head after head: transformers turns dimension i
    with i + rotary/2, this project 2i with 2i + 1. rotary: so many dimensions of each head, the first; None: all."""
    rotary = head_dim if rotary is None else rotary

    def by_head(tensor: Tensor, pairs: tuple[int, int]) -> Tensor:
        heads = tensor.unflatten(0, (-1, head_dim))
        first = heads[:, :rotary].unflatten(1, pairs).transpose(1, 2).flatten(1, 2)
        return (first if rotary == head_dim else _joined(first, heads[:, rotary:])).flatten(0, 1)

    return Form(lambda tensor: by_head(tensor, (2, rotary // 2)), lambda tensor: by_head(tensor, (rotary // 2, 2)))


def _joined(first: Tensor, rest: Tensor) -> Tensor:
    import torch

    return torch.cat((first, rest), 1)


class Piece(NamedTuple):
    """A foreign tensor, and which part of ours it is."""

    foreign: str
    ours: str
    at: Any = ...  # an index into ours: a slice of rows, (expert, slice), ...; by default all of it
    form: Form = SAME


class Architecture(Component):
    """A published architecture, by the `model_type` of its config.json in transformers' form. Never instantiated."""

    family = "architecture"
    #: regular expressions of names in its files that hold nothing of their own (tables that are computed)
    ignored: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def spec(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The model of a config.json as a spec file would say it (name apart). Raises UserError for what a spec cannot
        say; a KeyError is told as a missing key of the config."""
        raise NotImplementedError

    @classmethod
    def config(cls, spec: Mapping[str, Any]) -> dict[str, Any] | None:
        """The way back: a config.json for a model that was not imported, by which `spec` must give that model again,
        or it is not taken; None, or a KeyError, where there is none. For `tryplicity export --format transformers`.

        spec: vocab_size, hidden_size, context_length, tied_embeddings, norm and linear, and for each of `layers` its
        mixer and feed_forward (None where it has none), with all their options.
        """
        return None

    @classmethod
    def tensors(cls, config: Mapping[str, Any]) -> Iterable[Piece]:
        """Every tensor of its files that holds something. One that is not there although it is said here is an error,
        and so is one that is there and not said."""
        raise NotImplementedError
