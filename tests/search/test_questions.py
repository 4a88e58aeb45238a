"""Forty questions whose right topic is known, asked of what every Python carries: its own documentation."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from tryplicity.data import parse_source
from tryplicity.search.index import PassageIndex, build_index

QUESTIONS = yaml.safe_load((Path(__file__).parent / "questions.yaml").read_text(encoding="utf-8"))


def is_right(passage, question):
    return bool(re.search(question["page"], passage.url)
                and re.search(question["says"], f"{passage.title}\n{passage.text}"))


def hits(search, questions, first):
    """The share of questions with a right passage among the first so many."""
    return sum(any(is_right(p, q) for p in search(q["ask"], first)) for q in questions) / len(questions)


@pytest.fixture(scope="module")
def reference(registry, tmp_path_factory):
    source = parse_source(registry, {"type": "python-reference", "packages": ["python"]})
    return PassageIndex(build_index(source.documents(), tmp_path_factory.mktemp("index") / "python.sqlite"))


def test_forty_questions_of_which_most_are_answered_by_bm25_alone(reference):
    assert len(QUESTIONS["test"]) == 40 and len(QUESTIONS["tuning"]) >= 25
    asked = [q["ask"].lower() for part in QUESTIONS.values() for q in part]
    assert len(set(asked)) == len(asked), "no question is in both sets"
    assert hits(reference.search, QUESTIONS["test"], 5) >= 0.85
    assert hits(reference.search, QUESTIONS["test"], 1) >= 0.65


def test_what_counts_as_right_is_little_of_the_whole(reference):
    """The patterns are strict: on average fewer than one passage in fifty is right for a question."""
    everything = reference.passages_at((number, 0.0) for number in range(1, len(reference) + 1))
    for question in QUESTIONS["test"]:
        right = sum(is_right(passage, question) for passage in everything)
        assert 0 < right <= len(everything) / 50, (question["ask"], right)


def test_names_of_python_are_found_by_name(reference):
    for name in ("os.path.join", "list.append", "dict.get", "itertools.chain", "re.sub", "asyncio.gather", "len",
                 "collections.Counter.most_common", "json.loads", "str.join", "textwrap.dedent", "math.gcd"):
        assert reference.search(f"What does {name} do?", 1)[0].title == name
        assert reference.search(name, 1)[0].url.startswith("https://docs.python.org/")


@pytest.mark.skipif(sys.platform != "linux", reason="pydoc_data is left out of some distributions")
def test_the_language_is_there(reference):
    titles = {passage.title for passage in reference.passages_at((n, 0.0) for n in range(1, len(reference) + 1))}
    assert any(title.startswith('The "with" statement') for title in titles)
    assert {"str.split", "list.append", "math", "itertools.permutations", "object.__len__"} <= titles
