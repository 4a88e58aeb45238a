"""From a row of a data set to the messages of a conversation, in the forms that are common.

    {"messages": [{"role": "user", "content": "..."}, ...]}             OpenAI's; content may be a list of parts; with
                                                                        tools, tool_calls, weight
    {"conversations": [{"from": "human", "value": "..."}, ...]}         ShareGPT's; with system, tools, function_call
                                                                        and observation
    {"instruction": "...", "input": "...", "output": "..."}             Alpaca's; with system and history
    {"prompt": "...", "completion": "..."}                              and other names of a question and its answer

Calls and tools are written as text, in the form of NousResearch's Hermes (https://github.com/NousResearch/
Hermes-Function-Calling): <tool_call>{...}</tool_call> in the assistant's message, <tools>...</tools> in the system's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from tryplicity_plugins.sources.rows import BadRow, unix

_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response"),
          ("question", "answer"), ("question", "response"), ("query", "response"), ("input", "output"))
_CONTEXTS = {"instruction": ("input", "context")}       # what a question is about
_SYSTEMS = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_CALL = "function call"     # the assistant's, whose content is the call
_ROLES = {name: role for role, names in {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bard", "bing", "claude", "gemini", "bot", "chatbot", "model", "ai"),
    "tool": ("tool", "function", "observation", "ipython", "tool_response", "tool_result", "function_response"),
    _CALL: ("function_call", "tool_call"),
}.items() for name in names}

Message = dict[str, Any]


class Read(NamedTuple):
    """A row's conversation."""

    messages: tuple[Message, ...]
    unused: tuple[str, ...]     # keys that say something, and that nothing was made of


def conversation_of(row: Any) -> Read:
    """Raises BadRow for a row in none of these forms, one whose roles or contents are none, and one without an answer
    to learn."""
    if not isinstance(row, dict):
        raise BadRow("no conversation", f"not an object but {type(row).__name__}; write {{\"messages\": [...]}}")
    unused = {key for key, value in row.items() if value not in (None, "", [], {})}
    messages = _messages_of(row, unused)
    tools = [tool for key in _TOOLS for tool in _tools(row.get(key))]
    systems = [_text(row[key], "system") for key in _SYSTEMS if row.get(key)]
    unused -= {*_SYSTEMS, *_TOOLS}
    if tools:
        listed = "\n".join(tool if isinstance(tool, str) else _as_json(tool) for tool in tools)
        systems.append(f"You may call these functions:\n<tools>\n{listed}\n</tools>")
    if systems:
        if messages and messages[0]["role"] == "system":
            systems.insert(-1 if tools else len(systems), messages.pop(0)["content"])
        text = "\n\n".join(dict.fromkeys(text for text in systems if text.strip()))
        messages.insert(0, {"role": "system", "content": text})
    messages = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    for message in messages:
        if not message["content"].strip():
            raise BadRow(f"an empty message of the {message['role']}")
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
        raise BadRow("no message of the assistant to learn")
    return Read(tuple(messages), tuple(sorted(map(str, unused))))


def _messages_of(row: dict[str, Any], unused: set[str]) -> list[Message]:
    """The messages that a row holds; takes the keys it used out of `unused`."""
    for key in ("messages", "conversations"):
        if row.get(key):
            unused.discard(key)
            return _listed(row[key], key, unused)
    there = [pair for pair in _PAIRS if pair[0] in row and pair[1] in row]
    # of several names that which holds something; an empty answer is told as such
    for question, answer in sorted(there, key=lambda pair: row[pair[0]] is None or row[pair[1]] is None):
        unused -= {question, answer}
        asked, answered = row[question] or "", row[answer] or ""
        if isinstance(asked, list) and isinstance(answered, list):      # two halves of a list of messages
            return [*_listed(asked, question, unused), *_listed(answered, answer, unused)]
        contexts = [row[key] for key in _CONTEXTS.get(question, ()) if row.get(key)]
        unused -= {"history", *_CONTEXTS.get(question, ())}
        asked = "\n\n".join(_text(part, "user") for part in (asked, *contexts))
        return [*_history(row.get("history")), _said("user", asked), _said("assistant", _text(answered, "assistant"))]
    raise BadRow("no conversation", f"its keys are {', '.join(map(str, row)) or 'none'}; a row holds messages "
                 "([{role, content}, ...]), conversations ([{from, value}, ...]), or prompt and completion, or "
                 "instruction and output")


def _listed(value: Any, key: str, unused: set[str]) -> list[Message]:
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        # `datasets` gives a list of records column by column where it was declared a Sequence
        value = [dict(zip(value, record, strict=True)) for record in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise BadRow("no conversation", f"{key} is not a list of messages; write [{{\"role\": \"user\", \"content\": "
                     "\"...\"}, ...]")
    return [_message(message, f"{key}[].", unused) for message in value]


def _message(message: dict[str, Any], prefix: str, unused: set[str]) -> Message:
    name = message.get("role") or message.get("from")
    role = _ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise BadRow(f"an unknown role {name!r}", f"it may be {', '.join(_ROLES)}")
    key = next((key for key in ("content", "value", "text") if message.get(key) is not None), "content")
    content = message.get(key)
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    unused |= {prefix + str(other) for other, value in message.items() if value not in (None, "", [], {})
               and other not in ("role", "from", key, "tool_calls", "function_call", "weight")}
    if role == _CALL:
        role, calls, content = "assistant", [content], None
    if calls and role != "assistant":
        raise BadRow(f"a call by the {role}")
    text = "" if content is None and calls else _text(content, role)
    made = _said(role, "\n".join([*([text] if text.strip() else []), *map(_call, calls)]) if calls else text)
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise BadRow("a weight other than 0 and 1")
    return {**made, "weight": 0} if weight == 0 and role == "assistant" else made


def _said(role: str, text: str) -> Message:
    return {"role": role, "content": unix(text)}


def _text(content: Any, role: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise BadRow(f"no content of the {role}")
    if isinstance(content, list) and all(isinstance(part, (dict, str)) for part in content):
        return "".join(part if isinstance(part, str) else _part(part) for part in content)
    if role == "tool":
        return _as_json(content)
    raise BadRow("content that is no text", f"that of the {role} is {type(content).__name__}")


def _part(part: dict[str, Any]) -> str:
    for key in ("text", "refusal"):
        if isinstance(part.get(key), str):
            return part[key]
    raise BadRow("content that is no text", f"a part of type {part.get('type')}")


def _call(call: Any) -> str:
    """A call by whatever name, as {"name", "arguments"}."""
    call = _parsed(call)
    if isinstance(call, dict) and isinstance(call.get("function"), dict):       # OpenAI's, with an id
        call = call["function"]
    if isinstance(call, dict) and "arguments" in call:
        call = {**{key: call[key] for key in ("name",) if key in call}, "arguments": _parsed(call["arguments"])}
    elif not isinstance(call, dict | list | str):
        raise BadRow("a call that says nothing")
    return f"<tool_call>\n{call if isinstance(call, str) else _as_json(call)}\n</tool_call>"


def _tools(value: Any) -> list[Any]:
    value = _parsed(value) if value else []
    return value if isinstance(value, list) else [value]


def _history(turns: Any) -> Iterator[Message]:
    """Alpaca's: [[question, answer], ...] that went before."""
    if not turns:
        return
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise BadRow("a history that is no list of pairs")
    for asked, answered in turns:
        yield _said("user", _text(asked, "user"))
        yield _said("assistant", _text(answered, "assistant"))


def _parsed(value: Any) -> Any:
    """What a text of JSON holds; another text as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
