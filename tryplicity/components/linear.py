"""What layers are made of: linear maps, norms, activations.

Shapes: N tokens, S rows sorted by expert, I and F the features in and inside, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tryplicity.components.module import Module
from tryplicity.functional import grouped_linear
from tryplicity.guard import broken


class Linear(Module):
    """`Class(config, in, out, experts=...)`: x @ W.T, dense [out, in] or a stack [experts, out, in].

    A new linear overrides `effective_weight` and `effective_input`; dense, stacked and single-expert products
    then follow. One that an exported model holds in fewer bits overrides `packed_like`, `pack` and `unpack` too; all
    else (the file, loading, decoding) follows. `adopt`, `forward` and `expert_weight` are there to be overridden by
    one that can multiply by what it packed. One that packs only if a user says how names the ways in `forms`, and reads
    in `form` which was asked for.
    """

    family = "linear"
    #: bits a weight takes in the exported model
    packed_bits: ClassVar[float] = 16.0
    #: what it packs to, in a word for people and file names
    packed_format: ClassVar[str] = "packed"
    #: words by which `tryplicity export --linear` may ask it to pack, "int8" say
    forms: ClassVar[tuple[str, ...]] = ()
    #: whether its constructor wants `parts`: how many rows each of several matrices has that stand in one, one below
    #: the other, where a layer multiplies by them at once; None: it is one matrix
    takes_parts: ClassVar[bool] = False

    def __init__(self, config, in_features: int, out_features: int, *, experts: int | None = None,
                 active_experts: float | None = None, bias: bool = False, init_std: float = 0.02) -> None:
        super().__init__()
        self.config, self.in_features, self.out_features, self.experts = config, in_features, out_features, experts
        self.init_std = init_std
        self.form: str | None = None  # one of `forms`, in which it packs; None: as it does unasked
        stack = () if experts is None else (experts,)
        self.weight: Any = nn.Parameter(torch.empty(*stack, out_features, in_features))  # None once it is packed
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
        assert offsets_E is not None
        return grouped_linear(x if spread is None else spread(x), weight, offsets_E)

    def _whole_weight(self) -> Tensor:
        return self.unpack() if self.weight is None else self.effective_weight(self.weight)

    def packed_like(self) -> dict[str, Tensor]:
        """What `pack` gives, by name: tensors on the meta device of the same shapes and dtypes, which follow from this
        linear's sizes and form alone. Empty: an exported model stores `weight` itself."""
        return {}

    def pack(self) -> dict[str, Tensor] | None:
        """What an exported model stores in place of `weight`; the other parameters are there as they are."""
        return None

    def ready_to_pack(self) -> bool:
        """Whether what `pack` gives multiplies as this does now. One whose rounding still fades in says no, with its
        buffers as they were saved: it is served as it is, and not exported."""
        return True

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


class Norm(Module):
    """`Class(config, size)`: normalises the last axis."""

    family = "norm"

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Activation(Module):
    """`Class(config, features, groups=None)`: elementwise on [..., features].

    groups: several sets of neurons in one (the experts of a stack); then `forward(x_SF, group_S)` gets the
    group of each row, `groups` itself meaning an unused row that must not count in any statistic.
    Returns the output, or (output, Report).
    """

    family = "activation"

    def forward(self, x: Tensor, group: Tensor | None = None):
        raise NotImplementedError
