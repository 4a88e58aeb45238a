"""The web, through a SearXNG instance: https://docs.searxng.org/dev/search_api.html"""

from __future__ import annotations

import hashlib
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from tryplicity import Passage, Retriever, UserError

_MOST_BYTES = 4_000_000     # of an answer
_LONGEST = 4_000            # characters of a passage
_LONGEST_QUESTION = 500     # characters that are sent: engines refuse long ones


class SearXNG(Retriever):
    """Asks a SearXNG instance, whose settings must allow the format json (`search: formats: [html, json]`).

    The question is sent to the instance, and by it to the search engines that it uses. A passage is what a result
    page shows of a page, not the page itself.
    """

    name = "searxng"

    @dataclass(frozen=True)
    class Config:
        url: Annotated[str, Field(pattern=r"^https?://[^\s/?#]+[^\s?#]*$")]
        """the instance's address, such as http://localhost:8888"""
        timeout: Annotated[float, Field(gt=0, le=120)] = 10.0
        """seconds to wait for it"""
        language: str | None = None
        """of the results, such as en; none: as the instance is set"""

    def __init__(self, config: Config) -> None:
        self.config = config

    def search(self, question: str, limit: int) -> list[Passage]:
        """Raises UserError when the instance cannot be reached, refuses, or gives no JSON."""
        question = " ".join(question.split())[:_LONGEST_QUESTION]
        if not question or limit < 1:
            return []
        results = self._ask(question).get("results")
        passages: list[Passage] = []
        seen: set[str] = set()
        for rank, result in enumerate(results if isinstance(results, list) else (), 1):
            passage = _passage(result, rank)
            if passage and passage.url not in seen:
                seen.add(passage.url)
                passages.append(passage)
        return passages[:limit]

    def _ask(self, question: str) -> dict[str, Any]:
        asked = {"q": question, "format": "json"} | ({"language": self.config.language} if self.config.language else {})
        url = f"{self.config.url.rstrip('/')}/search?{urllib.parse.urlencode(asked)}"
        where = f"searxng {self.config.url}"
        request = urllib.request.Request(url, headers={"Accept": "application/json", "User-Agent": "tryplicity"})
        try:
            with urllib.request.urlopen(request, timeout=self.config.timeout) as response:
                body = response.read(_MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            error.close()
            raise UserError(f"{where}: {_REFUSALS.get(error.code, f'answered {error.code} {error.reason}')}") from error
        except TimeoutError as error:
            raise UserError(f"{where}: no answer within {self.config.timeout:g} s; is it overloaded? "
                            "A longer wait: timeout") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                reason = f"no answer within {self.config.timeout:g} s"
            raise UserError(f"{where}: cannot be reached ({reason}); is the address right, and does it run?") from error
        if len(body) > _MOST_BYTES:
            raise UserError(f"{where}: its answer is longer than {_MOST_BYTES // 1_000_000} MB; is it the address of a "
                            "SearXNG instance?")
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: its answer is no JSON; is it the address of a SearXNG instance?") from error
        if not isinstance(answer, dict):
            raise UserError(f"{where}: its answer is not that of SearXNG; is it the address of an instance?")
        return answer


_REFUSALS = {
    403: "it refuses JSON (403); in its settings.yml, under search, set formats: [html, json], and restart it",
    404: "it has no /search (404); is it the address of a SearXNG instance?",
    429: "it limits how often it may be asked (429); wait, or use an instance of your own with limiter: false",
}


def _passage(result: Any, rank: int) -> Passage | None:
    """None for a result without an address of the web or without text."""
    if not isinstance(result, dict):
        return None
    url, title, text = (value if isinstance(value := result.get(key), str) else ""
                        for key in ("url", "title", "content"))
    title, text = (" ".join(part.split()) for part in (title, text))
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.netloc or any(sign.isspace() for sign in url):
        return None
    if not (text or title):
        return None
    score = result.get("score")
    score = float(score) if isinstance(score, int | float) and not isinstance(score, bool) else 1.0 / rank
    return Passage(hashlib.sha256(url.encode("utf-8", "replace")).hexdigest()[:16], title or parts.netloc, url,
                   (text or title)[:_LONGEST], score)
