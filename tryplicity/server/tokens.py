"""The tokenizer, for programs that count or score tokens: /tokenize, /detokenize and /tokenizer_info in vLLM's shapes
(https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html), which lm-eval looks for by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from sanic.response import HTTPResponse, json

from tryplicity.server import routing
from tryplicity.server.errors import wrong
from tryplicity.server.limits import Body, parse
from tryplicity.server.openai import Words, check_model

if TYPE_CHECKING:
    from sanic import Request, Sanic

    from tryplicity.inference.engine import Engine
    from tryplicity.server.routing import ReadBody
    from tryplicity.server.service import Service

#: how a conversation is written, in Jinja: the form of `tryplicity.data.conversations`
CHAT_TEMPLATE = ("<|bos|>{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
                 "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


class TokenizeBody(Body):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True     # the mark that a text begins with
    return_token_strs: bool = False


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


def add_routes(app: Sanic, service: Service, read: ReadBody) -> None:
    def engine_of(model: str | None = None) -> Engine:
        engine = service.ready_engine()
        if model is not None:
            check_model(engine, model)
        if engine.tokenizer is None:
            raise wrong(f"{engine.card.id} came without a tokenizer", code="no_tokenizer")
        return engine

    async def tokenize(request: Request) -> HTTPResponse:
        body = parse(TokenizeBody, await read(request))
        engine = engine_of(body.model)
        ids = await service.in_thread(engine.encode, body.prompt)
        ids = ids if body.add_special_tokens else ids[len(engine.vocabulary.begin):]
        words = Words.of(engine)
        return json({"tokens": ids, "count": len(ids), "max_model_len": engine.card.context_length,
                     "token_strs": [words.text(id) for id in ids] if body.return_token_strs else None})

    async def detokenize(request: Request) -> HTTPResponse:
        body = parse(DetokenizeBody, await read(request))
        words = Words.of(engine_of(body.model))
        if any(id >= words.size for id in body.tokens):
            raise wrong(f"tokens: a token is none of this model's (0 to {words.size - 1})", "tokens")
        text = b"".join(words.bytes(id) for id in body.tokens).decode("utf-8", "replace")
        return json({"prompt": text})

    async def info(request: Request) -> HTTPResponse:
        from tryplicity.data.vocabulary import BOS, EOS, PAD, SPECIAL_TOKENS

        engine = engine_of()
        if config := engine.vocabulary.config:
            return json({**config, "model_max_length": engine.card.context_length})
        return json({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL_TOKENS[BOS],
                     "eos_token": SPECIAL_TOKENS[EOS], "pad_token": SPECIAL_TOKENS[PAD],
                     "model_max_length": engine.card.context_length,
                     "chat_template": CHAT_TEMPLATE if engine.card.chat else None})

    routing.add(app, "POST", "/tokenize", tokenize)
    routing.add(app, "POST", "/detokenize", detokenize)
    routing.add(app, "GET", "/tokenizer_info", info)
