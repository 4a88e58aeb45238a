"""llama-index: its class for servers like OpenAI's."""

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from told import MODEL, QUESTION, URL, tell

model = OpenAILike(model=MODEL, api_base=f"{URL}/v1", api_key="none", is_chat_model=True, temperature=0, max_tokens=16)
answer = model.chat([ChatMessage(role="user", content=QUESTION)]).message.content
streamed = "".join(part.delta for part in model.stream_chat([ChatMessage(role="user", content=QUESTION)]))
assert OpenAILike(model=MODEL, api_base=f"{URL}/v1", api_key="none", max_tokens=4).complete("the model").text
tell(answer, streamed)
