"""Text that satisfies a JSON schema: which tokens may come next, by llguidance (https://github.com/guidance-ai/llguidance).
Shapes: V vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tryplicity.data.vocabulary import vocabulary_of
from tryplicity.errors import UserError
from tryplicity.inference.text import token_bytes

LARGEST = 2 ** 53  # whole numbers up to here are exact where numbers are fp64, as in llguidance and in most of JSON
DEEPEST = 64  # levels of a schema
DIGITS, EXPONENT = 16, 2  # most of a number: a weak model writes digits for ever


class Grammars:
    """Makes grammars for one tokenizer. `tokenizer`: of Hugging Face's tokenizers."""

    def __init__(self, tokenizer: Any, size: int | None = None) -> None:
        """size: of the model's vocabulary, where that is larger."""
        from llguidance import LLTokenizer

        self._bytes = token_bytes(tokenizer, size)
        self.vocab_size = len(self._bytes)
        self._tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=self.vocab_size,
                                      eos_token=sorted(vocabulary_of(tokenizer).ends))
        self._digits_V = torch.tensor([_digits(text) for text in self._bytes])

    def json(self, schema: Mapping[str, Any]) -> Grammar:
        """A text of this schema, on one line as json.dumps writes it: free white space would let a weak model write
        nothing else. Raises UserError, which says why, for a schema that cannot be followed."""
        from llguidance import LLMatcher

        _check(schema)
        style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=style)
        except (TypeError, ValueError) as error:
            raise UserError(f"schema: {_first_line(error)}") from None
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        if failed:
            raise UserError(f"schema: {_first_line(messages[0])}")
        return Grammar(LLMatcher(self._tokenizer, grammar, log_level=0), self._bytes, self._digits_V)


class Grammar:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: Any, token_bytes: list[bytes], digits_V: Tensor) -> None:
        """digits_V: of a number that goes on, in each token's text."""
        self._matcher, self._bytes, self._digits_V = matcher, token_bytes, digits_V
        self._digits, self._in_string, self._escaped = 0, False, False  # the first of the number that is being written

    def allowed(self) -> Tensor:
        """Whether each token may come next, bool [V]; an end token where the text may end. A number must end in time,
        if the schema lets it."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed_V = torch.from_numpy(np.unpackbits(bits, bitorder="little")[:len(self._bytes)].astype(bool))
        if self._digits:
            ends_V = allowed_V & (self._digits_V <= DIGITS - self._digits)
            if ends_V.any():
                return ends_V
        return allowed_V

    def take(self, token: int) -> None:
        """It came."""
        self._matcher.consume_token(token)
        self._check()
        for byte in self._bytes[token]:
            if self._in_string:
                self._in_string = self._escaped or byte != QUOTE
                self._escaped = not self._escaped and byte == BACKSLASH
            elif byte in b"0123456789":
                self._digits += 1
            elif byte in b"eE" and self._digits:
                self._digits = max(self._digits, DIGITS - EXPONENT)
            elif byte not in b".+-":
                self._digits, self._in_string = 0, byte == QUOTE

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"schema: {_first_line(self._matcher.get_error())}")


QUOTE, BACKSLASH = b'"\\'


def _digits(text: bytes) -> int:
    """Of a number that goes on in this text; one more where it begins with what needs another digit after it."""
    number = re.match(rb"[0-9.eE+-]*", text)[0]
    return sum(byte in b"0123456789" for byte in number) + (number[:1] in (b".", b"e", b"E") and number == text)


def _check(schema: Any) -> None:
    """Refuse what llguidance takes and does not hold: properties for which a pattern wants something else, and whole
    numbers that fp64 does not hold (some of which end the process). Raises UserError."""
    for path, here in _schemas(schema, "schema", 0):
        if not isinstance(here, Mapping):
            continue
        parts = list(_together(here, schema, 0))
        patterns = [pattern for part in parts for pattern in _keys(part, "patternProperties")]
        names = [name for part in parts for name in _keys(part, "properties")]
        for pattern in patterns:
            try:
                hit = next((name for name in names if re.search(pattern, name)), None)
            except (re.error, RecursionError):
                hit = None  # llguidance says what is wrong with it
            if hit is not None:
                raise UserError(f"{path}: patternProperties {pattern!r} is for the property {hit!r} too, and only one "
                                "of both could be held; write what the property must be in properties alone")
        for key, value in here.items():
            if key in ("const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"):
                _check_numbers(value, f"{path}.{key}", 0)


def _check_numbers(value: Any, path: str, depth: int) -> None:
    if depth > DEEPEST:
        raise UserError(f"{path}: is deeper than {DEEPEST} levels")
    if isinstance(value, int | float) and not abs(value) <= LARGEST:
        raise UserError(f"{path}: {str(value)[:30]} is beyond 2^53, where whole numbers are not exact any more; leave "
                        "it out")
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for one in inside:
        _check_numbers(one, path, depth + 1)


def _schemas(schema: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """A schema and all inside it; what is data, or says nothing to a program, is none."""
    if depth > DEEPEST:
        raise UserError(f"{path}: is deeper than {DEEPEST} levels")
    if isinstance(schema, list | tuple):
        for i, one in enumerate(schema):
            yield from _schemas(one, f"{path}[{i}]", depth + 1)
    elif isinstance(schema, Mapping):
        yield path, schema
        for key, value in schema.items():
            if key in ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"):
                for name in _keys(schema, key):
                    yield from _schemas(value[name], f"{path}.{key}.{name}", depth + 1)
            elif key not in ("const", "enum", "default", "examples"):
                yield from _schemas(value, f"{path}.{key}", depth + 1)


def _together(schema: Any, root: Any, depth: int) -> Iterator[Mapping[str, Any]]:
    """A schema and those that hold for the same value: of its allOf, and that which it refers to."""
    if depth > DEEPEST or not isinstance(schema, Mapping):
        return
    yield schema
    every, reference = schema.get("allOf"), schema.get("$ref")
    for part in every if isinstance(every, list | tuple) else ():
        yield from _together(part, root, depth + 1)
    if isinstance(reference, str) and reference.startswith("#"):
        found = root
        for step in reference[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            found = found.get(step) if isinstance(found, Mapping) else None
        yield from _together(found, root, depth + 1)


def _keys(schema: Mapping[str, Any], keyword: str) -> list[str]:
    value = schema.get(keyword)
    return [key for key in value if isinstance(key, str)] if isinstance(value, Mapping) else []


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]
