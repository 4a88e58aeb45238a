"""What the page asks beside answers: the model, passages, conversations (/api/...)."""

from __future__ import annotations

import json as json_text
import re
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from sanic.response import HTTPResponse, json

from tryplicity.server import conversations, routing
from tryplicity.server.errors import outside, wrong
from tryplicity.server.limits import Body, parse, read_body, read_json

if TYPE_CHECKING:
    from sanic import Request, Sanic

    from tryplicity.server.routing import ReadBody
    from tryplicity.server.service import Service

QUERY_CHARACTERS = 2000
MOST_PASSAGES = 50


class TitleBody(Body):
    title: Annotated[str, Field(max_length=conversations.TITLE_CHARACTERS)] = conversations.NEW

    def checked(self) -> str:
        title = " ".join(self.title.split())
        if not title:
            raise wrong("the title is empty", "title")
        return title


class RenameBody(TitleBody):
    title: Annotated[str, Field(max_length=conversations.TITLE_CHARACTERS)]


def add_routes(app: Sanic, service: Service, read: ReadBody) -> None:
    store, stored = service.store, service.stored

    async def model(request: Request) -> HTTPResponse:
        return json(service.describe())

    async def search(request: Request) -> HTTPResponse:
        query, limit = _query(request), _limit(request)
        if not query.strip():
            raise wrong("q: what to look for is missing", "q", "missing_parameter")
        passages, seconds = await service.search(query, limit)
        return json({"query": query, "results": [dict(p._asdict()) for p in passages], "seconds": seconds})

    async def listed(request: Request) -> HTTPResponse:
        return json({"conversations": await stored(store.summaries, _query(request))})

    async def create(request: Request) -> HTTPResponse:
        body = parse(TitleBody, await read(request, empty=True))
        return json((await stored(store.create, body.checked())).model_dump(), status=201)

    async def get(request: Request, id: str) -> HTTPResponse:
        return json((await stored(store.get, id)).model_dump())

    async def rename(request: Request, id: str) -> HTTPResponse:
        body = parse(RenameBody, await read(request))
        return json((await stored(store.rename, id, body.checked())).model_dump())

    async def delete(request: Request, id: str) -> HTTPResponse:
        await stored(store.delete, id)
        return HTTPResponse(status=204)

    async def export(request: Request, id: str) -> HTTPResponse:
        form = request.args.get("format", "json")
        if form not in ("json", "markdown"):
            raise wrong("format: json or markdown", "format")
        conversation = await stored(store.get, id)
        name = re.sub(r"[^A-Za-z0-9]+", "-", conversation.title).strip("-")[:60] or "conversation"
        if form == "markdown":
            return _download(conversations.as_markdown(conversation), "text/markdown; charset=utf-8", f"{name}.md")
        return _download(_json(conversations.Export(conversations=[conversation])), "application/json",
                         f"{name}.json")

    async def export_all(request: Request) -> HTTPResponse:
        text = await service.in_thread(_json, await stored(store.export))
        return _download(text, "application/json", "conversations.json")

    async def import_all(request: Request) -> HTTPResponse:
        options = service.options
        body = await read_body(request, options.import_bytes, options.body_seconds)
        export = await service.in_thread(lambda: conversations.read_export(read_json(body)))
        return json(await stored(store.load, export))

    for path, method, handler in (
            ("/api/model", "GET", model), ("/api/search", "GET", search),
            ("/api/conversations", "GET", listed), ("/api/conversations", "POST", create),
            ("/api/conversations/export", "GET", export_all), ("/api/conversations/import", "POST", import_all),
            ("/api/conversations/<id:str>", "GET", get), ("/api/conversations/<id:str>", "PATCH", rename),
            ("/api/conversations/<id:str>", "DELETE", delete), ("/api/conversations/<id:str>/export", "GET", export)):
        routing.add(app, method, path, handler)


def _json(export: conversations.Export) -> str:
    return json_text.dumps(export.model_dump(), ensure_ascii=False, indent=1)


def _download(text: str, content_type: str, name: str) -> HTTPResponse:
    return HTTPResponse(text, content_type=content_type,
                        headers={"Content-Disposition": f'attachment; filename="{name}"'})


def _query(request: Request) -> str:
    query = request.args.get("q", "")
    if len(query) > QUERY_CHARACTERS:
        raise outside(f"q: at most {QUERY_CHARACTERS} characters", "q")
    try:
        query.encode()
    except UnicodeEncodeError:
        raise wrong("q is not Unicode text", "q") from None
    return query


def _limit(request: Request) -> int:
    text = request.args.get("limit", "5")
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise wrong("limit: a whole number", "limit", "invalid_type")
    if int(text) < 1:
        raise outside("limit: must be 1 or more", "limit")
    return min(int(text), MOST_PASSAGES)
