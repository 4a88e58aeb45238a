"""Passages for a question, and answers whose sources are checked.

    path = ensure_index("python-reference", registry)
    passages = PassageIndex(path).search("How do I join two paths?", limit=5)
    checked = check("Use os.path.join, which joins two or more path components.", passages)

Each name is loaded when first used; none loads torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {"build_index": "building", "ensure_index": "building", "PassageIndex": "index", "DEFAULT_SOURCE": "building",
          "cut": "cutting", "check": "citations", "Checked": "citations", "MARK": "citations",
          "messages": "answer", "quotation": "answer"}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tryplicity.search' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tryplicity.search.{_HOMES[name]}"), name)
