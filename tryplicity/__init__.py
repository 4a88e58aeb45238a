"""Tryplicity: invent, budget, train and talk to hybrid language models declared in YAML.

Everything a plugin may import is exported here, each name loaded when first used, so that
`import tryplicity` is instant and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
#: of what plugins rest on (tests/public_api.txt): raised when something of it goes or changes
API_VERSION = 1

_EXPORTS = {
    "tryplicity.hookspecs": ["hookimpl"],
    "tryplicity.bounds": ["Count", "Length", "Positive", "Seed", "Share", "Size", "Some", "Steps", "Weight"],
    "tryplicity.parts": ["Component", "Part", "later", "uses"],
    "tryplicity.components": ["CONVOLUTION", "IGNORE", "SAME", "TRANSPOSED", "Activation", "Architecture",
                              "Brain", "Conversation", "Document", "FeedForward", "Form", "Head", "Piece", "turned",
                              "Inhibition", "Judge", "Layer", "Linear", "Mean", "Mixer", "Night", "Norm", "Objective",
                              "Optimizer", "Parallelism", "Passage", "PerUse", "Repair", "Report", "Residual",
                              "Retriever", "Router", "Routing", "Rows", "Schedule", "Site", "Source", "Stage", "State",
                              "Reading", "Verdict", "output_and_report"],
    "tryplicity.functional": ["chunked_cross_entropy", "grouped_linear", "grouped_product_works", "sum_of_squares"],
    "tryplicity.model": ["initialise"],
    "tryplicity.promises": ["check_experts", "check_routing"],
    "tryplicity.errors": ["PluginFault", "Unreachable", "UserError"],
    "tryplicity.leftout": ["LeftOut"],
    "tryplicity.data.documents": ["escaped", "unit_hash"],
    "tryplicity.data.grades": ["grade"],
    "tryplicity.evaluation.texts": ["TextScorer"],
    "tryplicity.corpus.shards": ["read_shard"],
    "tryplicity.files": ["whole_file", "write_text"],
    "tryplicity.search": ["PassageIndex", "ensure_index"],
    "tryplicity.plugins": ["load_plugins"],
    "tryplicity.named": ["NamedModel"],
    "tryplicity.world": ["World"],
    "tryplicity.training.reference": ["train_reference"],
    "tryplicity.training.saved": ["saved_weights"],
    "tryplicity.planner.memory": ["Facts", "MemoryPlan", "finish_plan", "moments"],
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = [*_HOME, "kernels", "API_VERSION", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return importlib.import_module("tryplicity.kernels")
    if name not in _HOME:
        raise AttributeError(f"module 'tryplicity' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
