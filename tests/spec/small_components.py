"""Small components and a valid spec of them, so that these tests stand on the machinery alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from tryplicity import (
    Activation,
    Brain,
    FeedForward,
    Head,
    Linear,
    Mixer,
    Norm,
    Optimizer,
    Part,
    Residual,
    Router,
    Schedule,
    uses,
)

Size = Annotated[int, Field(gt=0)]


class Attention(Mixer):
    """Heads that share the width."""

    name = "attention"

    @dataclass(frozen=True)
    class Config:
        heads: Size = 4
        """how many heads look at once"""
        window: Size | None = None
        causal: bool = True
        rotary: Literal["full", "half", "none"] = "full"

    @classmethod
    def check(cls, config, site):
        if site.hidden_size % config.heads:
            near = min((n for n in range(1, site.hidden_size + 1) if site.hidden_size % n == 0),
                       key=lambda n: abs(n - config.heads))
            yield "heads", (f"hidden_size {site.hidden_size} does not divide by {config.heads} heads; "
                            f"{near} would do")


class Memory(Mixer):
    name = "memory"

    @dataclass(frozen=True)
    class Config:
        state_size: Size = 16
        decay: Annotated[float, Field(gt=0, lt=1)] = 0.9


class TopK(Router):
    name = "top_k"

    @dataclass(frozen=True)
    class Config:
        temperature: Annotated[float, Field(gt=0)] = 1.0


class Inhibition(Router):
    name = "inhibition"

    @dataclass(frozen=True)
    class Config:
        strength: Annotated[float, Field(ge=0)] = 0.1


class SiLU(Activation):
    name = "silu"


class Experts(FeedForward):
    name = "moe"

    @dataclass(frozen=True)
    class Config:
        inner_size: Size
        experts: Size = 8
        router: Part = uses("router", default="top_k")
        """which experts a token goes to"""
        activation: Part | None = uses("activation", optional=True)

    @classmethod
    def check(cls, config, site):
        if config.inner_size > 8 * site.hidden_size:
            yield "inner_size", f"more than eight times hidden_size; at most {8 * site.hidden_size}"


class Plain(Linear):
    name = "linear"


class RMSNorm(Norm):
    name = "rmsnorm"


class Add(Residual):
    name = "add"


class Ahead(Head):
    name = "ahead"

    @dataclass(frozen=True)
    class Config:
        tokens: Size = 2


@dataclass(frozen=True)
class Stage:
    until: Annotated[float, Field(gt=0, le=1)]
    """share of the run at which the stage ends"""
    judge: Part | None = uses("activation", optional=True)


class Curriculum(Brain):
    name = "curriculum"

    @dataclass(frozen=True)
    class Config:
        stages: tuple[Stage, ...] = ()


class Adam(Optimizer):
    name = "adamw"

    @dataclass(frozen=True)
    class Config:
        learning_rate: Annotated[float, Field(gt=0)] = 1e-3


class Warmup(Schedule):
    name = "wsd"


COMPONENTS = [Attention, Memory, TopK, Inhibition, SiLU, Experts, Plain, RMSNorm, Add, Ahead, Curriculum,
              Adam,
              Warmup]


#: valid, with every construct in it
VALID = """\
name: small
vocab_size: 512
hidden_size: 64
context_length: 128
linear: {type: linear}

blocks:
  recall:
    mixer: {type: memory, state_size: 8}
    feed_forward: &experts
      type: moe
      inner_size: 32
      router: {type: inhibition, strength: 0.5}
  look:
    mixer:
      type: attention
      heads: 4
    feed_forward: *experts

layers:
  - repeat: 2
    of: [{repeat: 3, of: recall}, look]
  - {pattern: [recall, look], layers: 3}
  - mixer: memory

overrides:
  "1-2": {mixer: {state_size: 4}}
  11: {feed_forward: {type: moe, inner_size: 8}}

heads: [{type: ahead, tokens: 3}]
brain:
  - {type: curriculum, stages: [{until: 0.5}, {until: 1, judge: silu}]}

training:
  optimizer: {type: adamw, learning_rate: 3.0e-3}
  gradient_clip: 0.5

expect: {total_parameters: 1e6}
"""

