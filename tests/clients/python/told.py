"""What every script is told, and how it tells what it got."""

import json
import sys

URL, MODEL, QUESTION = sys.argv[1:4]


def tell(answer: str, streamed: str) -> None:
    """The answer of at most 16 tokens at temperature 0, whole and as it streamed."""
    print(json.dumps({"answer": answer, "streamed": streamed}))


def tell_typed(answer: dict, streamed: dict) -> None:
    """Where the form of the answer is what counts."""
    print(json.dumps({"typed": answer, "streamed": streamed}))
