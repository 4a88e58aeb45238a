"""dspy: its model, and a prediction whose form it asks for in words, then by a schema."""

import dspy
from told import MODEL, QUESTION, URL, tell

model = dspy.LM(f"openai/{MODEL}", api_base=f"{URL}/v1", api_key="none", temperature=0, max_tokens=16, cache=False)
[answer] = model(QUESTION)
answer = answer if isinstance(answer, str) else answer["text"]
[again] = model(messages=[{"role": "user", "content": QUESTION}])
tell(answer, again if isinstance(again, str) else again["text"])
