"""What numbers in a spec, a profile or an option may be: wide enough for any model yet built, and no wider.

Every number has two ends, so that a slip of the keyboard is one line and not a traceback, an overflow or a minute of
silence. The widest model these allow still has fewer elements in a tensor than 64 bits can count the bytes of.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Size = Annotated[int, Field(ge=1, le=2**20)]
"""A width: hidden_size, the inner size of a feed-forward, a state, a vocabulary."""
Count = Annotated[int, Field(ge=1, le=2**16)]
"""How many of a thing one layer has: heads, experts, streams."""
Length = Annotated[int, Field(ge=1, le=2**20)]
"""Tokens in a row."""
Steps = Annotated[int, Field(ge=1, le=10**12)]
"""Optimizer steps, rows, bytes of a document: what is counted over a run."""
Some = Annotated[int, Field(ge=0, le=10**6)]
"""A count that may be none."""
Positive = Annotated[float, Field(ge=1e-30, le=1e6)]
"""A rate, a factor, a small number that divides: in fp32 it is still more than 0."""
Weight = Annotated[float, Field(ge=0, le=1e6)]
"""A factor of something that 0 switches off."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What torch and numpy both take."""
