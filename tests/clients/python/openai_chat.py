"""openai: chat and completions."""

import openai
from told import MODEL, QUESTION, URL, tell

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none")
assert MODEL in [model.id for model in client.models.list()]
messages = [{"role": "user", "content": QUESTION}]
answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_completion_tokens=16)
stream = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_completion_tokens=16,
                                        stream=True)
tell(answer.choices[0].message.content, "".join(chunk.choices[0].delta.content or "" for chunk in stream))
