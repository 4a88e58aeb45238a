"""The embedded corpus, harvested once here from two of its packages."""

import subprocess
import sys
from pathlib import Path

import pytest

from tryplicity import UserError
from tryplicity_plugins.sources import harvest, python_docs
from tryplicity_plugins.sources.python_docs import PythonDocs


def source(*packages):
    return PythonDocs(PythonDocs.Config(packages) if packages else PythonDocs.Config())


@pytest.fixture(scope="module")
def documents():
    return list(source("python", "mpmath").documents())


def size(documents, domain):
    return sum(len(d.text.encode()) for d in documents if d.domain == domain)


def test_there_is_enough_of_every_domain(documents):
    assert size(documents, "text") > 1e6 and size(documents, "code") > 8e6 and size(documents, "math") > 1e5
    assert len({d.id for d in documents}) == len(documents)
    assert all(d.text.strip() and d.url for d in documents)


def test_code_is_the_file_itself(documents):
    import textwrap

    by_id = {d.id: d for d in documents}
    assert by_id["python/textwrap.py#code"].text == Path(textwrap.__file__).read_text(encoding="utf-8")
    assert "encodings/cp1252.py" not in " ".join(by_id)     # a table, not a program
    assert not [i for i in by_id if "/test/" in i or "site-packages" in i]


def test_prose_reads_as_english(documents):
    text = next(d for d in documents if d.id == "python/textwrap.py#text").text
    assert text.startswith("textwrap\n\n")
    assert "\n\nfill: Fill a single paragraph of text, returning a new string.\n\n" in text
    paragraphs = [p for d in documents if d.domain == "text" for p in d.text.strip().split("\n\n")[1:]]
    assert len(paragraphs) == len(set(paragraphs)) > 8000
    assert not [p for p in paragraphs if "\n" in p or ">>>" in p or p[-1] not in ".!?)\"'"]
    assert sum(" the " in f" {p.lower()} " for p in paragraphs) > 0.5 * len(paragraphs)


def test_mathematics_keeps_its_examples(documents):
    """mpmath's examples are in its sources; those of sympy and numpy stay between the paragraphs."""
    assert python_docs._PLANS["sympy"].examples == python_docs._PLANS["numpy"].examples == "inline"
    assert "code" in {d.domain for d in documents if d.id.startswith("mpmath")}


def test_urls_can_be_checked(documents):
    url = {d.id: d.url for d in documents}
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert url["python/asyncio/tasks.py#text"] == f"https://docs.python.org/{version}/library/asyncio.html"
    assert url["python/logging/handlers.py#text"].endswith("/library/logging.handlers.html")
    assert url["python/pydoc_data/topics/lambda#text"].endswith("/reference/expressions.html#lambda")
    assert url["python/textwrap.py#code"].startswith("https://github.com/python/cpython/blob/v3.")
    assert url["python/textwrap.py#code"].endswith("/Lib/textwrap.py")
    assert url["mpmath/calculus/odes.py#code"] == "mpmath.calculus.odes:mpmath/calculus/odes.py"


def test_every_topic_has_a_page(documents):
    topics = [d for d in documents if "/topics/" in d.id]
    assert len(topics) > 60 and not [d.id for d in topics if "reference/index" in d.url]


def test_two_harvests_are_the_same(documents):
    again = list(source("mpmath").documents())
    assert again == list(source("mpmath").documents())
    assert [d.id for d in again if d.domain == "code"] == [
        d.id for d in documents if d.id.startswith("mpmath") and d.domain == "code"]


def test_nothing_is_imported():
    program = ("import sys; from tryplicity_plugins.sources.python_docs import PythonDocs\n"
               "before = set(sys.modules); list(PythonDocs(PythonDocs.Config(('networkx', "
               "'mpmath'))).documents())\nprint([m for m in set(sys.modules) - before if "
               "m.startswith(('networkx', 'mpmath'))])")
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_missing_packages_are_passed_over_and_none_at_all_is_told(monkeypatch):
    found = python_docs.importlib.util.find_spec
    monkeypatch.setattr(python_docs.importlib.util, "find_spec",
                        lambda name: None if name == "sympy" else found(name))
    assert {d.id.split("/")[0] for d in source("sympy", "mpmath").documents()} == {"mpmath"}
    with pytest.raises(UserError, match=r"none of the packages sympy is installed.*--data path/to/folder"):
        list(source("sympy").documents())


def test_the_fingerprint_follows_versions_harvester_and_options(monkeypatch):
    seen = [source().fingerprint(), source("python").fingerprint()]
    assert source().fingerprint() == seen[0]
    monkeypatch.setattr(harvest, "VERSION", harvest.VERSION + 1)
    seen.append(source().fingerprint())
    monkeypatch.setattr(python_docs, "_version", lambda package: "9.9")
    seen.append(source().fingerprint())
    assert len(set(seen)) == 4


def test_the_share_read_grows_to_one():
    mpmath = source("mpmath")
    shares = [mpmath.read_share for _ in mpmath.documents()]
    assert shares == sorted(shares) and shares[0] < 0.5 and mpmath.read_share == 1.0
