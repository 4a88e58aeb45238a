"""lm-eval: local-completions with its defaults (it finds the tokenizer by itself) and local-chat-completions."""

import json

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from told import MODEL, QUESTION, URL

PAIRS = [("the model reads a list", " of numbers and returns"), ("if it is not empty", " it raises an error"),
         ("another function", " opens a socket, prints text for each line in order")]
STOPS = ["\n\n", "Question:", "Answer:", "</s>", "###", "<|im_end|>"]


def asked(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


model = LocalCompletionsAPI(base_url=f"{URL}/v1/completions", model=MODEL, max_length=512, batch_size=3)
scores = model.loglikelihood([asked("loglikelihood", *pair) for pair in PAIRS])
rolling = model.loglikelihood_rolling([asked("loglikelihood_rolling", "".join(pair)) for pair in PAIRS])
[written] = model.generate_until([asked("generate_until", PAIRS[0][0], {"until": STOPS, "max_gen_toks": 16})])
chat = LocalChatCompletion(base_url=f"{URL}/v1/chat/completions", model=MODEL)
prompt = chat.apply_chat_template([{"role": "user", "content": QUESTION}])
[answer] = chat.generate_until([asked("generate_until", prompt, {"until": STOPS, "max_gen_toks": 16})])
print(json.dumps({"pairs": PAIRS, "scores": scores, "rolling": rolling, "written": written, "answer": answer,
                  "streamed": answer}))
