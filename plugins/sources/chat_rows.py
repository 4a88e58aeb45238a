"""From a row of a data set to the messages of a conversation, in the forms that are common.

    {"messages": [{"role": "user", "content": "..."}, ...]}             OpenAI's; content may be a list of parts
    {"conversations": [{"from": "human", "value": "..."}, ...]}         ShareGPT's
    {"prompt": "...", "completion": "..."}                              also instruction and output (Alpaca's, with
                                                                        input), prompt and response, question and answer
"""

from __future__ import annotations

from typing import Any

from tryplicity import UserError

_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer"))
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system",
          "function": "tool"}


def messages_of(row: Any, where: str) -> tuple[dict[str, str], ...]:
    """The messages of one row; what says nothing is left out only of a system's. Raises UserError, which begins
    with `where`, for a row in none of these forms. Roles and texts are checked when the data is prepared."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: not an object but {type(row).__name__}; write {{\"messages\": [...]}}")
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            return _messages(row[key], f"{where}: {key}")
    for question, answer in _PAIRS:
        asked, answered = row.get(question), row.get(answer)
        if isinstance(asked, list) and isinstance(answered, list):      # two halves of a list of messages
            return _messages([*asked, *answered], f"{where}: {question}")
        if asked is not None and answered is not None:
            more = row.get("input") if question == "instruction" else None
            return (_message("user", f"{asked}\n\n{more}" if more else asked), _message("assistant", answered))
    raise UserError(f"{where}: no conversation: its keys are {', '.join(map(str, row)) or 'none'}; a row holds "
                    "messages ([{role, content}, ...]), conversations ([{from, value}, ...]), or prompt and "
                    "completion, or instruction and output")


def _messages(value: Any, where: str) -> tuple[dict[str, str], ...]:
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        # `datasets` gives a list of records column by column where it was declared a Sequence
        value = [dict(zip(value, record, strict=True)) for record in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(f"{where}: not a list of messages; write [{{\"role\": \"user\", \"content\": \"...\"}}, ...]")
    messages = []
    for message in value:
        role = message.get("role", message.get("from"))
        made = _message(role, message.get("content", message.get("value")))
        if made["role"] != "system" or made["content"]:
            messages.append(made)
    return tuple(messages)


def _message(role: Any, content: Any) -> dict[str, str]:
    if isinstance(content, list) and all(isinstance(part, (dict, str)) for part in content):
        content = "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)
    if isinstance(content, str):
        content = content.replace("\r\n", "\n")
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content}
