"""What /v1/responses can be told, as `asked` has it of the other two ways."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tryplicity.server.asked import Call, Content, Function, Sampled, Tools, Tops, UpTo, forced, plain
from tryplicity.server.errors import wrong
from tryplicity.server.limits import Body

NO_RESPONSES: dict[str, tuple[Any, ...]] = {
    "background": (False,), "context_management": ([],), "conversation": (), "moderation": (),
    "previous_response_id": (), "prompt": (), "truncation": ("disabled",)}
#: why, where "is not supported by this server" would leave a person helpless
WHY = {"previous_response_id": "this server keeps no responses; send what was said before as items of input",
       "conversation": "this server keeps no responses; send what was said before as items of input"}


class InputItem(Body):
    """A message, a call of a function that was made, or what it gave."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content = []
    id: str | None = None
    status: str | None = None
    phase: Any = None
    call_id: str | None = None
    name: str | None = None
    namespace: Any = None
    arguments: str = ""
    output: Content = []

    def message(self, place: str) -> dict[str, str]:
        """Raises ApiError."""
        if self.type == "function_call":
            return {"role": "assistant", "content": Call(name=self.name or "", arguments=self.arguments).plain()}
        if self.type == "function_call_output":
            return {"role": "tool", "content": plain(self.output, f"{place}.output")}
        if self.role is None:
            raise wrong(f"{place}.role: is missing", f"{place}.role", "missing_parameter")
        return {"role": "system" if self.role == "developer" else self.role,
                "content": plain(self.content, f"{place}.content")}


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Body):
    format: TextFormat = TextFormat()
    verbosity: Literal["medium"] = "medium"


class Reasoning(Body):
    effort: Literal["none", "minimal"] | None = None
    summary: Any = None                 # of a reasoning that does not take place
    generate_summary: Any = None
    encrypted_content: Any = None


def _input(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ResponsesBody(Sampled):
    input: Annotated[list[InputItem], BeforeValidator(_input), Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: UpTo | None = None
    max_tool_calls: Annotated[int, Field(ge=0)] | None = None
    text: TextOptions = TextOptions()
    reasoning: Reasoning = Reasoning()
    tools: Tools = []
    tool_choice: Any = None
    include: list[str] = []             # what it asks for beside the text is there only of things not done here
    top_logprobs: Tops = 0

    def check(self) -> None:
        forced(self.tools, self.tool_choice)
        form = self.text.format
        if (form.type == "json_schema") != (form.schema_ is not None):
            raise wrong("text.format: a schema belongs to type json_schema, and to no other", "text.format")

    @property
    def call(self) -> Function | None:
        return forced(self.tools, self.tool_choice)

    def schema(self) -> dict[str, Any] | None:
        form = self.text.format
        if self.call:
            return self.call.parameters
        if form.type == "text":
            return None
        return {"type": "object"} if form.schema_ is None else form.schema_

    def messages(self) -> list[dict[str, str]]:
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return [*first, *(item.message(f"input.{number}") for number, item in enumerate(self.input))]

    @property
    def logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in self.include
