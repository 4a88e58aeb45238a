"""smolagents: its model for servers of this kind, alone and as an agent that may call tools."""

from smolagents import OpenAIModel, Tool
from told import MODEL, QUESTION, URL, tell


class LookUp(Tool):
    name, description, output_type = "look_up", "What a word means.", "string"
    inputs = {"word": {"type": "string", "description": "the word"}}

    def forward(self, word: str) -> str:
        return word


model = OpenAIModel(MODEL, api_base=f"{URL}/v1", api_key="none", temperature=0, max_tokens=16)
messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
answer = model.generate(messages).content
streamed = "".join(delta.content or "" for delta in model.generate_stream(messages))
called = model.generate(messages, tools_to_call_from=[LookUp()], max_tokens=60)     # must call it
assert called.tool_calls[0].function.name == "look_up"
tell(answer, streamed)
