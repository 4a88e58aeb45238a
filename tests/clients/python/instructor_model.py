"""instructor: a typed answer, by its default way, which is a tool that must be called."""

from typing import Literal

import instructor
import openai
from pydantic import BaseModel, Field
from told import MODEL, QUESTION, URL, tell_typed


class Thing(BaseModel):
    kind: Literal["list", "file"]
    count: int = Field(ge=0, le=9)


client = instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1", api_key="none"))
messages = [{"role": "user", "content": QUESTION}]
answer = client.chat.completions.create(model=MODEL, messages=messages, response_model=Thing, max_tokens=100)
*_, last = client.chat.completions.create_partial(model=MODEL, messages=messages, response_model=Thing, max_tokens=100)
assert isinstance(answer, Thing)
tell_typed(answer.model_dump(), last.model_dump())
