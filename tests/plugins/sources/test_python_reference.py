"""Reference pages of this installation."""

import json
import subprocess
import sys

import pytest

from tryplicity import UserError
from tryplicity_plugins.sources import python_docs
from tryplicity_plugins.sources.python_reference import PythonReference


@pytest.fixture(scope="module")
def pages():
    return {document.id: document for document in PythonReference(PythonReference.Config(("python",))).documents()}


def test_a_page_for_each_name_with_its_signature(pages):
    assert len(pages) > 5000
    join = pages["python/os.path.join#function"]
    assert join.text.startswith("os.path.join\n\njoin(a, *p)\n\nJoin two or more pathname components")
    assert join.url.endswith("/library/os.path.html#os.path.join") and join.domain == "text"
    append = pages["python/list.append#method"]
    assert append.text == "list.append\n\nappend(object, /)\n\nAppend object to the end of the list.\n"
    assert append.url.endswith("/library/stdtypes.html#list.append")
    assert pages["python/itertools#module"].text.startswith("itertools\n\nFunctional tools")
    assert pages["python/KeyError#class"].url.endswith("/library/exceptions.html#KeyError")
    wrap = pages["python/textwrap.TextWrapper.wrap#method"]
    assert wrap.text.startswith("textwrap.TextWrapper.wrap\n\nwrap(text")


def test_names_are_public_and_told_once(pages):
    names = [identity.removeprefix("python/").partition("#")[0] for identity in pages]
    assert len(set(names)) == len(names)
    assert not [name for name in names if name.split(".")[0].startswith("_")]


def test_the_language_and_what_it_defines(pages):
    split = next(page for identity, page in pages.items() if identity.startswith("python/str.split#"))
    assert "delimiter" in split.text or "separator" in split.text
    topics = [page for identity, page in pages.items() if identity.endswith("#topic")]
    assert any(page.text.startswith('The "with" statement\n\n') for page in topics)
    assert all("****" not in page.text.split("\n\n")[1] for page in topics)


def test_the_same_each_time_and_nothing_imported(tmp_path):
    """Each read twice in a new interpreter: the same pages, and no third-party package is loaded by it."""
    program = """
import hashlib, json, sys
from tryplicity_plugins.sources.python_reference import PythonReference
def digest():
    source = PythonReference(PythonReference.Config(("networkx",)))
    return hashlib.sha256(json.dumps([*source.documents()]).encode()).hexdigest(), source.fingerprint()
print(json.dumps([digest(), digest(), [m for m in ("networkx", "sympy", "antigravity") if m in sys.modules]]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second, loaded = json.loads(done.stdout)
    assert first == second and not loaded


def test_nothing_installed_is_told(monkeypatch):
    monkeypatch.setattr(python_docs, "_root", lambda package: None)
    with pytest.raises(UserError, match="none of the packages networkx is installed"):
        list(PythonReference(PythonReference.Config(("networkx",))).documents())
