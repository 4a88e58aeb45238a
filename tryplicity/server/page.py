"""The page and its files, from the installed folder `static`, and nothing outside of it."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sanic.response import HTTPResponse

from tryplicity.server import routing
from tryplicity.server.errors import ApiError

if TYPE_CHECKING:
    from sanic import Request, Sanic

PACKAGE = "tryplicity_static"
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
         ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml", ".woff2": "font/woff2",
         ".png": "image/png", ".ico": "image/x-icon", ".txt": "text/plain; charset=utf-8",
         ".webmanifest": "application/manifest+json"}


def folder() -> Path:
    spec = find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def add_routes(app: Sanic, root: Path | None = None) -> None:
    """GET / and GET /static/..."""
    root = (root or folder()).resolve()

    async def index(request: Request) -> HTTPResponse:
        return answer(request, root, "index.html")

    async def file(request: Request, path: str) -> HTTPResponse:
        return answer(request, root, path)

    routing.add(app, "GET", "/", index)
    routing.add(app, "GET", "/static/<path:path>", file)


def answer(request: Request, root: Path, name: str) -> HTTPResponse:
    """A file below `root`, or 304 when the browser has it. Raises ApiError 404."""
    path = _inside(root, name)
    if path is None:
        raise ApiError(404, "there is no such file", code="not_found")
    stat = path.stat()
    content, tag = _read(path, stat.st_mtime_ns, stat.st_size)
    # a browser asks each time whether its copy is the newest; the fonts never change
    cache = "public, max-age=604800" if path.suffix == ".woff2" else "no-cache"
    headers = {"ETag": tag, "Cache-Control": cache}
    if tag in (part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")):
        return HTTPResponse(status=304, headers=headers)
    if request.method == "HEAD":
        headers["Content-Length"] = str(len(content))
        return HTTPResponse(headers=headers, content_type=TYPES[path.suffix])
    return HTTPResponse(content, headers=headers, content_type=TYPES[path.suffix])


def _inside(root: Path, name: str) -> Path | None:
    """The file, if it is one, of a known kind, and below `root` after every link and `..` is followed."""
    try:
        path = (root / name).resolve()
        if path.is_relative_to(root) and path.suffix in TYPES and path.is_file():
            return path
    except (OSError, ValueError):   # a name too long, a zero byte
        pass
    return None


@lru_cache(maxsize=256)
def _read(path: Path, changed: int, size: int) -> tuple[bytes, str]:
    content = path.read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:20]}"'
