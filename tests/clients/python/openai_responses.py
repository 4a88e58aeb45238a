"""openai: responses."""

import openai
from told import MODEL, QUESTION, URL, tell

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none")
answer = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=16)
with client.responses.stream(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=16) as stream:
    parts = [event.delta for event in stream if event.type == "response.output_text.delta"]
tell(answer.output_text, "".join(parts))
