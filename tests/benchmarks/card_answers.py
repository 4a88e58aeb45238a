"""How many tokens a second the engine writes with ternary weights: one answer and 64 together, likeliest and drawn."""

from __future__ import annotations

import os
from typing import Any

from tests.benchmarks.card_parts import Place

ROWS, TOKENS = (64, 1), 128
WAYS = {"likeliest": {"temperature": 0.0}, "drawn": {"temperature": 0.8, "top_p": 0.95, "seed": 1}}


def answers(place: Place) -> dict[str, Any]:
    if place.device == "cpu":
        os.environ["TRYPLICITY_STEPS"] = "captured"
    import torch

    from tryplicity import load_plugins
    from tryplicity.components import Linear
    from tryplicity.inference.engine import Engine
    from tryplicity.model import assemble, initialise
    from tryplicity.spec import load_spec

    spec = load_spec(place.spec, load_plugins().registry)
    model = initialise(assemble(spec), "cpu", 0).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Linear) and (packed := module.pack()) is not None:
            module.adopt(packed)
    model.to(place.device)
    prompts = torch.randint(6, spec.vocab_size, (max(ROWS), 32)).tolist()
    found: dict[str, float] = {}
    refused = None
    for rows in ROWS:
        engine = Engine(model, None, slots=rows, prefix_bytes=0)
        for name, options in WAYS.items():
            _written(engine, prompts[:rows], options)  # in which the step is compiled and recorded
            found[f"{rows} {name}"] = _written(engine, prompts[:rows], options)
        refused = refused or engine.scheduler.fixed.refused
        engine.close()
    said = ", ".join(f"{name}: {speed:,.0f}" for name, speed in found.items())
    return {"result": f"tokens/s by rows: {said}" + (f"; NOT RECORDED: {refused}" if refused else ""),
            "ok": refused is None, "tokens_per_second": found}


def _written(engine: Any, prompts: list[list[int]], options: dict[str, Any]) -> float:
    """Tokens a second from when all have begun to when the first has ended."""
    from tryplicity.inference.engine import Request, Sampling

    with engine.scheduler._changed:  # until all have come
        under_way = [engine.submit(Request(tuple(prompt), Sampling(**options), TOKENS, end_tokens=frozenset()),
                                   lambda piece: None) for prompt in prompts]
    for generation in under_way:
        generation.wait()
        if generation.error:
            raise RuntimeError(generation.error)
    begun, ended = max(one.first for one in under_way), min(one.last for one in under_way)
    return sum(one.completion_tokens - 1 for one in under_way) / (ended - begun)
