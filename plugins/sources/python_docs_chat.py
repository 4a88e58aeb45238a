"""Questions and answers from the documentation that every installation carries: asked for a name, say what it means.

The answers are the first sentences of docstrings, without signatures and markup; `python_names` finds the names.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tryplicity import Conversation, LeftOut, Source, UserError, escaped
from tryplicity_plugins.sources import harvest, python_docs
from tryplicity_plugins.sources.python_names import Meaning, c_meanings, package_meanings

VERSION = 1             # raise when the same files would give other conversations
_LONGEST = 280          # characters of an answer


class PythonDocsChat(Source):
    """Conversations about the documented names of Python and of installed scientific packages; needs no download.

    Each name is asked about in several ways, and the answer is what its documentation says first. All questions about
    a name share the part of their id before `#`.
    """

    name = "python-docs-chat"
    default_for = ("chat",)

    @dataclass(frozen=True)
    class Config:
        packages: tuple[python_docs.Package, ...] = tuple(python_docs._PLANS)
        """whose names to ask for; those not installed are passed over"""
        phrasings: Annotated[int, Field(ge=1, le=5)] = 3
        """how many questions about each name"""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.read_share = 0.0   # of the packages, while `conversations` runs

    def fingerprint(self) -> str:
        """From the options and the versions of what is read and of the harvester."""
        versions = {package: python_docs._version(package) for package in self.config.packages}
        described = json.dumps([self.name, VERSION, harvest.VERSION, self.config.phrasings, versions], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def documents(self) -> Iterator:
        raise UserError("python-docs-chat: holds conversations for a chat phase; the documents are in python-docs")

    def conversations(self) -> Iterator[Conversation]:
        meanings: dict[str, Meaning] = {}
        self.left_out = LeftOut("items")
        for number, (package, root) in enumerate(python_docs._installed(self.config.packages, self.left_out)):
            for meaning in package_meanings(package, root, answer_of):
                meanings.setdefault(meaning.name, meaning)
            if package == "python":
                for meaning in (*c_meanings(answer_of), *_statements(root)):
                    meanings.setdefault(meaning.name, meaning)
            self.read_share = (number + 1) / len(self.config.packages)
        if not meanings:
            raise UserError(f"python-docs-chat: none of the packages {', '.join(self.config.packages)} is installed "
                            "with its Python sources; install one, or give conversations of your own: a .jsonl file")
        shared = Counter(meaning.answer for meaning in meanings.values())
        for name in sorted(meanings):
            meaning = meanings[name]
            if shared[meaning.answer] <= 2:     # what many names share tells none of them apart
                for part, question in enumerate(_questions(meaning, self.config.phrasings)):
                    yield Conversation(f"{escaped(name)}#{part}", ({"role": "user", "content": question},
                                                          {"role": "assistant", "content": meaning.answer}),
                                       meaning.url)


# --- questions ---

_ANY = ("What is {name}?", "Explain {name}.", "Tell me about {name}.", "Can you explain {name}?",
        "Describe {name} in short.", "What can you tell me about {name}?")
_CALLED = ("What does {name} do?", "What is {name} for?", "I came across {name}. What does it do?")
_QUESTIONS = {
    "function": (*_ANY, *_CALLED, "What does the function {name} do?"),
    "method": (*_ANY, *_CALLED, "What does the method {name} do?"),
    "class": (*_ANY, "What is {name} for?", "What is the class {name}?"),
    "attribute": (*_ANY, "What does {name} hold?"),
    "statement": (*_ANY, "What does {name} do?", "What is {name} for?"),
    "module": (*_ANY, "What is {name} for?", "What is the module {name} about?"),
}


def _questions(meaning: Meaning, count: int) -> list[str]:
    """Some of the ways to ask, chosen by a hash of the name."""
    def place(template: str) -> bytes:
        return hashlib.blake2b(f"{meaning.name} {template}".encode(), digest_size=8).digest()

    return [template.format(name=meaning.name) for template in sorted(_QUESTIONS[meaning.kind], key=place)[:count]]


# --- answers ---

_SIGNATURE = re.compile(r"^[\w.]+\s*\(.*\)(?:\s*(?:->|-->|=>)\s*[\w.\[\], ]+)?[.:]?(?:\s*--)?$")
_SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)(?<!cf)[.!?][\"')]?\s+(?=[A-Z\"'(]|[\w.]+\()")
_SAYS_NOTHING = re.compile(
    r"(?:See|Same as|Similar to|Identical to|Deprecated|DEPRECATED|Internal|Private|TODO|XXX|Helper|For internal use"
    r"|Inherited|Not implemented|Override|Overridden|Overloaded|An? internal|Please|Warning|Note|Method should not"
    r"|This (?:method|function|class) is (?:deprecated|internal|private|overridden))\b")
# what is left of formulas, markup, examples and remarks for developers
_LEFTOVER = re.compile(r"[{}\\$|]|\b(?:deprecated|internal use)\b|`|::|:\w+:|\.\.\.|\(\)\(|; see below|[^\x20-\x7e]")


def answer_of(docstring: str, documented: object = None) -> str | None:
    """The first sentences of a docstring, or None where they would not read well alone."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    for paragraph in paragraphs[:3]:
        lines = [line.strip() for line in paragraph.split("\n") if line.strip()]
        while lines and _SIGNATURE.match(lines[0]):
            lines.pop(0)
        if lines and not _SIGNATURE.match(" ".join(lines)):
            return _answer(lines)
        # a signature alone: what it means comes next
    return None


def _answer(lines: list[str]) -> str | None:
    """The first sentences of a paragraph, as many as are short and read well."""
    if re.match(r"[-*+=~#>.:@|]|\d+[.)]\s", lines[0]):
        return None             # a list, a table, an example or a directive
    if len(lines) > 1 and re.fullmatch(r"([=\-~^*#])\1{2,}", lines[1]):
        return None             # a heading
    text = re.sub(r"(`{1,2})([^`']+)'{1,2}", r"'\2'", harvest.clean(" ".join(lines)))    # quoted `so' in older texts
    ends = [end.end() for end in _SENTENCE_END.finditer(text)]
    answer = ""
    for start, end in itertools.pairwise([0, *ends, len(text)]):
        sentence = text[start:end].strip()
        if (len(f"{answer} {sentence}") > _LONGEST or sentence[-1:] not in (".", "!", "?", ")")
                or sentence.count("(") != sentence.count(")") or _SAYS_NOTHING.match(sentence)
                or _LEFTOVER.search(sentence) or not (answer or _reads(sentence))):
            break
        answer = f"{answer} {sentence}".strip()
    return answer or None


def _reads(answer: str) -> bool:
    """Whether it is prose; a few plain words may be a sentence too ("Greatest common divisor.")."""
    words = answer[:-1].split()
    plain = all(re.fullmatch(r"[A-Za-z][a-z-]*[,']?[a-z]*", word) for word in words)
    return harvest.reads_as_prose(answer) or (answer[0].isupper() and 2 < len(words) < 9 and plain)


# --- the language ---

def _statements(root: Path) -> Iterator[Meaning]:
    """The statements of the language, from the reference that pydoc prints."""
    try:
        source = (root / "pydoc_data" / "topics.py").read_text(encoding="utf-8")
    except OSError:
        return      # some distributions leave it out
    for topic, text in sorted(ast.literal_eval(source[source.index("{"):]).items()):
        title, _, rest = text.strip().partition("\n")
        if (named := re.fullmatch(r'The "(\w+)" statement', title)) and (
                answer := answer_of(rest.strip().partition("\n")[2])):
            yield Meaning(f"the {named[1]} statement", "statement", answer, python_docs._topic_url(topic))
