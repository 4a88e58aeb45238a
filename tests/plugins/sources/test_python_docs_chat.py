"""Questions and answers from the documentation of this installation."""

import json
import subprocess
import sys

import pytest

from tryplicity import UserError
from tryplicity_plugins.sources import python_docs, python_docs_chat
from tryplicity_plugins.sources.python_docs_chat import PythonDocsChat, answer_of


def source(*packages, **options):
    return PythonDocsChat(PythonDocsChat.Config(packages or ("python", "networkx"), **options))


@pytest.fixture(scope="module")
def conversations():
    return list(source().conversations())


@pytest.fixture(scope="module")
def answers(conversations):
    return {c.id.split("#")[0]: c.messages[1]["content"] for c in conversations}


def test_there_are_thousands_and_each_name_is_asked_about_in_three_ways(conversations, answers):
    assert len(answers) > 4000 and len(conversations) == 3 * len(answers)
    assert len({c.id for c in conversations}) == len(conversations) and all(c.url for c in conversations)
    questions = [c.messages[0]["content"] for c in conversations]
    assert len(set(questions)) == len(questions)
    for conversation, question in zip(conversations, questions, strict=True):
        assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
        assert conversation.id.split("#")[0] in question and question[-1] in "?."


def test_known_names_have_their_meaning(answers):
    """Read by a person in the documentation of Python and networkx."""
    assert answers["os.path.join"].startswith("Join two or more pathname components, inserting '/' as needed.")
    assert answers["textwrap.fill"] == "Fill a single paragraph of text, returning a new string."
    assert answers["dict.get"] == "Return the value for key if key is in the dictionary, else default."
    assert answers["math.gcd"] == "Greatest Common Divisor."
    assert answers["len"] == "Return the number of items in a container."
    assert answers["json.loads"].startswith("Deserialize s (a str, bytes or bytearray instance containing a JSON")
    assert answers["asyncio.gather"].startswith("Return a future aggregating results from the given coroutines")
    assert answers["networkx.shortest_path"] == "Compute shortest paths in the graph."
    assert "the with statement" in answers and "block" in answers["the with statement"]


def test_names_are_the_public_ones(answers):
    assert not [name for name in answers if any(part.startswith("_") for part in name.split("."))]
    assert not {"asyncio.tasks.gather", "posixpath.join", "json.decoder.JSONDecoder", "ntpath.join"} & set(answers)
    assert {"json.JSONDecoder.decode", "collections.Counter", "collections.deque", "networkx.Graph"} <= set(answers)


def test_answers_are_short_sentences_without_markup(answers):
    for name, answer in answers.items():
        assert 10 < len(answer) <= 280 and answer[-1] in ".!?)", name
        assert not any(mark in answer for mark in ("`", ":func:", ">>>", "\n", "::", "\\")), answer


@pytest.mark.parametrize("docstring, answer", [
    ("Return the `sum` of :class:`~a.b.Item` objects.\n\nAnd more.", "Return the sum of Item objects."),
    ("f(x,\n  y) -> int\n\nThe lowest index of y in x. See also g.", "The lowest index of y in x."),
    ("g(x)\nReturn what the mapping holds, e.g. Numbers. It is sorted.",
     "Return what the mapping holds, e.g. Numbers. It is sorted."),
    ("Make one of these:\n\n  * a\n  * b", None),
    ("See `torch.abs`.", None),
    ("Title\n=====\n\nText of it is here.", None),
    (":param x: the number that is doubled", None),
    ("x", None),
    ("", None),
])
def test_the_first_sentences_of_a_docstring(docstring, answer):
    assert answer_of(docstring) == answer


def test_what_files_take_from_one_another_decides_the_name(tmp_path, monkeypatch):
    """A package with a private module, a star, an explicit name, documentation of C code and a circle."""
    package = tmp_path / "networkx"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("from .core import *\nfrom networkx.sub import make, other as another\n")
    (package / "core.py").write_text('__all__ = ["hidden", "swap"]\nfrom ._c import swap\nfrom . import sub\n'
                                     'def hidden():\n    """Hide a thing from all the others."""\n'
                                     'def internal():\n    """Show a thing to all of the others."""\n')
    (package / "_c.py").write_text('add_newdoc("networkx._c", "swap", """swap(a, b)\n\nSwap a thing with another."""'
                                   ')\n')
    (package / "sub" / "__init__.py").write_text("from ._made import *\nfrom networkx.core import *\n")
    (package / "sub" / "_made.py").write_text('def make():\n    """Make a thing out of the others."""\n'
                                              'class other:\n    """The other kind of a thing."""\n'
                                              '    def turn(self):\n        """Turn a thing into another."""\n')
    monkeypatch.setattr(python_docs, "_root", lambda _: package)
    found = {c.id.split("#")[0]: c.messages[1]["content"] for c in source("networkx").conversations()}
    assert found == {"networkx.hidden": "Hide a thing from all the others.",
                     "networkx.swap": "Swap a thing with another.",
                     "networkx.make": "Make a thing out of the others.",
                     "networkx.another": "The other kind of a thing.",
                     "networkx.another.turn": "Turn a thing into another."}


def test_urls_are_pages(conversations):
    url = {c.id: c.url for c in conversations}
    assert url["os.path.join#0"] == f"{python_docs._DOCS}/library/os.path.html#os.path.join"
    assert url["str.split#0"] == f"{python_docs._DOCS}/library/stdtypes.html#str.split"
    assert url["networkx.shortest_path#0"].startswith("networkx.algorithms.shortest_paths.generic:networkx/")


def test_two_harvests_are_the_same_in_another_process():
    program = ("import json; from tryplicity_plugins.sources.python_docs_chat import PythonDocsChat\n"
               "print(json.dumps(list(PythonDocsChat(PythonDocsChat.Config(('mpmath',))).conversations())))")
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == json.loads(json.dumps(list(source("mpmath").conversations())))


def test_fingerprint_documents_and_missing_packages(monkeypatch):
    seen = {source("python").fingerprint(), source().fingerprint(), source("python", phrasings=2).fingerprint()}
    monkeypatch.setattr(python_docs_chat, "VERSION", -1)
    seen.add(source("python").fingerprint())
    assert len(seen) == 4
    with pytest.raises(UserError, match="the documents are in python-docs"):
        source().documents()
    monkeypatch.setattr(python_docs, "_root", lambda _: None)
    with pytest.raises(UserError, match=r"none of the packages mpmath is installed.*a \.jsonl file"):
        list(source("mpmath").conversations())
