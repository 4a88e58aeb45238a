"""Text that satisfies a JSON schema: which tokens may come next, by llguidance (https://github.com/guidance-ai/llguidance).
Shapes: V vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tryplicity.data.tokenizer import EOS, IM_END
from tryplicity.errors import UserError


class Grammars:
    """Makes grammars for one tokenizer. `tokenizer`: of Hugging Face's tokenizers, a byte-level BPE."""

    def __init__(self, tokenizer: Any) -> None:
        from llguidance import LLTokenizer

        self.vocab_size = tokenizer.get_vocab_size()
        self._tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=self.vocab_size, eos_token=[EOS, IM_END])

    def json(self, schema: Mapping[str, Any]) -> Grammar:
        """A text of this schema, on one line as json.dumps writes it: free white space would let a weak model write
        nothing else. Raises UserError, which says why, for a schema that cannot be followed."""
        from llguidance import LLMatcher

        style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=style)
        except (TypeError, ValueError) as error:
            raise UserError(f"schema: {_first_line(error)}") from None
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        if failed:
            raise UserError(f"schema: {_first_line(messages[0])}")
        return Grammar(LLMatcher(self._tokenizer, grammar, log_level=0), self.vocab_size)


class Grammar:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> Tensor:
        """Whether each token may come next, bool [V]; an end token where the text may end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[:self._vocab_size].astype(bool))

    def take(self, token: int) -> None:
        """It came."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"schema: {_first_line(self._matcher.get_error())}")


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]
