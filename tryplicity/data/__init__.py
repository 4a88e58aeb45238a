"""Training data: sources, the split, the tokenizer, token files and rows of packed documents.

    prepared = prepare(parse_source(registry, "python-docs"), vocab_size=4096)
    stream = prepared.stream(seed=0)
    batch = stream.batch(position=0, rows=8, context_length=512)

Each name is loaded when first used; none loads torch before rows are made.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {"prepare": "prepared", "Prepared": "prepared", "parse_source": "sources", "cache_root": "cache",
          "prepare_conversations": "conversations", "ChatFormat": "conversations",
          "Mixture": "mixture", "Batch": "packing", "HeldOut": "packing", "PackedStream": "packing",
          "TokenFile": "packing", "load_tokenizer": "tokenizer", "train_tokenizer": "tokenizer",
          "SPECIAL_TOKENS": "tokenizer"}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tryplicity.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tryplicity.data.{_HOMES[name]}"), name)
