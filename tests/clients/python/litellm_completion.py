"""litellm: chat, completions and responses."""

import litellm
from told import MODEL, QUESTION, URL, tell

made = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": "none", "temperature": 0}
messages = [{"role": "user", "content": QUESTION}]
answer = litellm.completion(messages=messages, max_tokens=16, metadata={"run": "1"}, **made)
stream = litellm.completion(messages=messages, max_tokens=16, stream=True, **made)
text = litellm.text_completion(prompt=["the model", "a list"], max_tokens=4,
                               **{**made, "model": f"text-completion-openai/{MODEL}"})
assert len(text.choices) == 2
again = [*messages, answer.choices[0].message.model_dump(), {"role": "user", "content": "And a file?"}]
assert litellm.completion(messages=again, max_tokens=16, **made).choices[0].message.content
litellm.responses(input=QUESTION, max_output_tokens=16, **made)
tell(answer.choices[0].message.content, "".join(chunk.choices[0].delta.content or "" for chunk in stream))
