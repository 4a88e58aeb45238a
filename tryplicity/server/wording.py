"""What is wrong with a value of a request, in this server's own words. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: by the kind of fault pydantic found, with what it knows of it
#: (https://docs.pydantic.dev/latest/errors/validation_errors/)
_SAID = {
    "missing": "is missing", "none_required": "must be left out",
    "string_type": "must be a string", "bool_type": "must be true or false", "list_type": "must be a list",
    "int_type": "must be a whole number", "int_from_float": "must be a whole number", "float_type": "must be a number",
    "finite_number": "must be a finite number", "int_parsing_size": "is too large",
    "dict_type": "must be an object", "model_type": "must be an object", "model_attributes_type": "must be an object",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be {ge:g} or more", "greater_than": "must be over {gt:g}",
    "less_than_equal": "must be {le:g} or less", "less_than": "must be below {lt:g}",
    "too_long": "may have {max_length} entries, and has more", "too_short": "must have {min_length} or more entries",
    "string_too_long": "may have {max_length} characters, and has more",
    "string_too_short": "must have {min_length} or more characters",
    "string_pattern_mismatch": "must match {pattern}", "extra_forbidden": "is not known here"}


def said(problem: Mapping[str, Any]) -> str:
    """One of the problems that pydantic lists, after the name of the value: "must be a string"."""
    words = _SAID.get(problem["type"], "is not what may stand here")
    return words.format_map(problem.get("ctx", {}))


def place(problem: Mapping[str, Any]) -> str:
    """Where it is: "messages.0.content"."""
    return ".".join(str(part) for part in problem["loc"])
