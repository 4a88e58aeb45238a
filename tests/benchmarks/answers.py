"""How many answers rest on their sources: of questions whose right passage was found.

    python -m tests.benchmarks.answers MODEL [MODEL ...] [--questions 40] [--max-tokens 96] [--show]

MODEL: a run folder, an exported file, or a name such as smollm2. The questions are of tests/search/questions.yaml,
with the index of what Python itself carries; a question counts if a passage that answers it is among the five that the
page would show. Each model is asked as the page asks it, with its own template, at temperature 0, and the page's own
checker says whether a sentence of the answer is borne out by a passage. Which is not whether the answer is good.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

PASSAGES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="the page's own is 1.1")
    parser.add_argument("--weights", choices=["int8", "bf16", "fp32"])
    parser.add_argument("--show", action="store_true", help="print the answers")
    given = parser.parse_args()

    from tests.search.test_questions import QUESTIONS, is_right
    from tryplicity import load_plugins
    from tryplicity.data import parse_source
    from tryplicity.inference.engine import Engine
    from tryplicity.named import resolve
    from tryplicity.search import citations
    from tryplicity.search.building import build_index
    from tryplicity.search.index import PassageIndex
    from tryplicity.server.ask import AskBody, Turn
    from tryplicity.server.conversations import Conversation
    from tryplicity.training.process import limit_spinning, tune_malloc

    limit_spinning()
    tune_malloc()
    plugins = load_plugins()
    source = parse_source(plugins.registry, {"type": "python-reference", "packages": ["python"]})
    with tempfile.TemporaryDirectory() as folder:
        index = PassageIndex(build_index(source.documents(), Path(folder) / "python.sqlite"))
        asked = []
        for question in [*QUESTIONS["test"], *QUESTIONS["tuning"]]:
            passages = index.search(question["ask"], PASSAGES)
            if any(is_right(passage, question) for passage in passages):
                asked.append((question["ask"], passages))
        asked = asked[:given.questions]
        for name in given.models:
            found = resolve(name, plugins)
            engine = Engine.load(found.path, plugins.registry, weights=given.weights or found.weights)
            begun, supported, tokens = time.monotonic(), 0, 0
            for number, (text, passages) in enumerate(asked, 1):
                body = AskBody(content=text, search=True, sampling={
                    "temperature": 0, "repetition_penalty": given.repetition_penalty})
                turn = Turn(Conversation(), body, ["content"])
                pieces = list(engine.generate(turn.request(engine, passages, given.max_tokens)))
                answer = "".join(piece.text for piece in pieces)
                tokens += sum(len(piece.tokens) for piece in pieces)
                checked = citations.check(answer.strip(), passages)
                supported += checked.supported
                if given.show:
                    print(f"{'+' if checked.supported else '-'} {text}\n    {checked.text}\n", flush=True)
                print(f"{name}: {supported} of {number}", file=sys.stderr, flush=True)
            print(f"{name} ({engine.card.format}): {supported} of {len(asked)} answers rest on a passage; "
                  f"{tokens / len(asked):.0f} tokens an answer, {(time.monotonic() - begun) / len(asked):.1f} s each")
            engine.close()


if __name__ == "__main__":
    main()
