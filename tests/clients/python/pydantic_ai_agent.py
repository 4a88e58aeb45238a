"""pydantic-ai: text, and a typed answer, with each of its two models."""

from typing import Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from told import MODEL, QUESTION, URL, tell


class Thing(BaseModel):
    kind: Literal["list", "file"]
    count: int = Field(ge=0, le=9)


provider = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
settings = {"temperature": 0, "max_tokens": 16}
for make in (OpenAIResponsesModel, OpenAIChatModel):
    model = make(MODEL, provider=provider)
    agent = Agent(model)

    @agent.tool_plain
    def look_up(word: str) -> str:
        """What a word means."""
        return word

    answer = agent.run_sync(QUESTION, model_settings=settings).output
    streamed = agent.run_stream_sync(QUESTION, model_settings=settings)
    *_, last = streamed.stream_text(debounce_by=None)
    typed = Agent(model, output_type=Thing).run_sync(QUESTION, model_settings={"max_tokens": 100}).output
    assert isinstance(typed, Thing)
tell(answer, last)
