"""langchain: an answer, a stream, a batch of completions, a conversation sent back, tools, a typed answer."""

from typing import Literal

from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel
from told import MODEL, QUESTION, URL, tell


class Thing(BaseModel):
    kind: Literal["list", "file"]


@tool
def look_up(word: str) -> str:
    """What a word means."""
    return word


made = {"base_url": f"{URL}/v1", "api_key": "none", "model": MODEL, "temperature": 0}
chat = ChatOpenAI(**made, max_tokens=16)
answer = chat.invoke(QUESTION).content
streamed = "".join(chunk.content for chunk in chat.stream(QUESTION))
batch = OpenAI(**made, max_tokens=4).generate([f"{number}. a list of" for number in range(30)])     # 20 at a time
assert len(batch.generations) == 30 and all(each[0].text for each in batch.generations)
history = [HumanMessage(QUESTION, name="ann"), AIMessage(""), HumanMessage("And a file?", name="ann")]
assert chat.invoke(history).content
assert chat.bind_tools([look_up]).invoke(QUESTION).content == answer
assert isinstance(ChatOpenAI(**made, max_tokens=60).with_structured_output(Thing).invoke(QUESTION), Thing)
responses = ChatOpenAI(**made, max_tokens=16, use_responses_api=True)
assert responses.invoke(QUESTION).text == answer == "".join(chunk.text for chunk in responses.stream(QUESTION))
tell(answer, streamed)
