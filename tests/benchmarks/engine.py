"""What the engine adds to a model: many answers at once, guesses ahead, turns that are not read again.

    python -m tests.benchmarks.engine RUN        # a run folder or an exported file; by default tiny's initial weights

Prints tokens per second of 1 to 64 answers at once; of greedy decoding with and without guesses from the multi-token
heads, with the share of guesses that were right (of initial weights it tells nothing); and what a second turn reads.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import time

TEXTS = ("The function returns", "A list is", "This module provides")  # to guess ahead from, where there is a tokenizer
TOKENS = 64


def main(arguments: list[str]) -> None:
    from tryplicity.training.process import limit_spinning, tune_malloc

    limit_spinning()
    tune_malloc()
    from tryplicity import load_plugins
    from tryplicity.inference.engine import Engine, Request
    from tryplicity.inference.packed import load_model
    from tryplicity.inference.sampler import Sampling
    from tryplicity.inference.speculative import Drafter

    registry = load_plugins().registry
    if arguments:
        model, _, tokenizer, info = load_model(arguments[0], registry)
        print(f"{info.name}: {info.parameters / 1e6:.1f}M parameters, {info.format}")
    else:
        model, tokenizer = _initial(registry), None
        print("tiny: initial weights, packed")
    greedy, vocab_size = Sampling(temperature=0), model.spec.vocab_size

    def ask(number: int, length: int = 32, tokens: int = TOKENS) -> Request:
        dice = random.Random(number)
        return Request(tuple(dice.randrange(6, vocab_size) for _ in range(length)), greedy, tokens,
                       end_tokens=frozenset())

    print("\nanswers at once   tokens/s in all   each   first token, s (the slowest)")
    for streams in (1, 2, 4, 8, 16, 64):
        engine = Engine(model, tokenizer, slots=streams, prefix_bytes=0)
        list(engine.generate(ask(-1, tokens=4)))
        begun = time.perf_counter()
        generations = [engine.submit(ask(number), lambda piece: None) for number in range(streams)]
        for generation in generations:
            generation.wait()
        seconds = time.perf_counter() - begun
        each = sorted(generation.tokens_per_second for generation in generations)[streams // 2]
        print(f"{streams:15}   {streams * TOKENS / seconds:15.1f}   {each:4.1f}   "
              f"{max(generation.seconds_to_first for generation in generations):.3f}")
        engine.close()

    if Drafter(model):
        print("\ngreedy            tokens/s   guesses that were right")
        speeds: dict[bool, list[float]] = {False: [], True: []}
        engines = {way: Engine(model, tokenizer, prefix_bytes=0, speculative=way) for way in speeds}
        texts: dict[bool, list[list[int]]] = {False: [], True: []}
        for number in range(-1, len(TEXTS)):  # the first warms
            for way, engine in engines.items():
                request = ask(number)
                if tokenizer is not None:
                    request = dataclasses.replace(request, prompt=tuple(engine.encode(TEXTS[number])))
                begun = time.perf_counter()
                text = [token.id for piece in engine.generate(request) for token in piece.tokens]
                if number >= 0:
                    speeds[way].append(TOKENS / (time.perf_counter() - begun))
                    texts[way].append(text)
        assert texts[True] == texts[False], "guessing ahead changed a token"
        said = engines[True].statistics()
        share = said["accepted_total"] / max(said["drafted_total"], 1)
        for way, name in ((False, "one by one"), (True, "guessing ahead")):
            print(f"{name:15}   {sorted(speeds[way])[len(TEXTS) // 2]:8.1f}   {f'{share:.0%}' if way else ''}")
        print("the same tokens both ways")

    engine = Engine(model, tokenizer)
    first = ask(0, min(512, model.spec.context_length // 2), 16)
    written = [token.id for piece in engine.generate(first) for token in piece.tokens]
    second = engine.submit(Request((*first.prompt, *written, *range(10, 26)), greedy, 2, end_tokens=frozenset()),
                           lambda piece: None)
    second.wait()
    print(f"\na second turn of {second.prompt_tokens} tokens reads {second.prompt_tokens - second.cached_tokens}; "
          f"its first token comes after {second.seconds_to_first:.3f} s")


def _initial(registry):
    from tryplicity.components import Linear
    from tryplicity.model import assemble, initialise
    from tryplicity.spec import load_spec

    model = initialise(assemble(load_spec("tiny", registry)), "cpu", 0).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Linear) and (packed := module.pack()) is not None:
            module.adopt(packed)
    return model


if __name__ == "__main__":
    main(sys.argv[1:])
