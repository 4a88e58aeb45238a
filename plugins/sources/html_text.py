"""The text of an HTML page: what a reader sees, one line a paragraph."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_UNSEEN = {"script", "style", "template", "svg", "noscript", "head", "nav", "iframe", "object", "select", "button"}
_BLOCKS = {"address", "article", "aside", "blockquote", "br", "caption", "center", "dd", "details", "dialog", "div",
           "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6",
           "header", "hr", "li", "main", "ol", "option", "p", "pre", "section", "summary", "table", "tr", "ul"}
_APART = {"p", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "blockquote", "section", "article"}
_CELLS = {"td", "th"}
_CHARSET = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?\s*([\w.:-]+)|<\?xml[^>]+encoding\s*=\s*["']([\w.:-]+)""", re.I)


def html_text(markup: str) -> str:
    """Blocks on lines of their own, white space joined save in <pre>, entities resolved; without scripts, styles,
    comments and navigation. The page's title comes first where no heading says the same."""
    page = _Page()
    page.feed(markup)
    page.close()
    return page.text()


def decoded_page(raw: bytes, said: str | None = None) -> str | None:
    """The markup of a page that is UTF-8, or else in the encoding that it was said to be in or names itself; None where
    it is in none of these."""
    for encoding in ("utf-8-sig", said, charset(raw)):
        try:
            if encoding:
                return raw.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            continue
    return None


def charset(raw: bytes) -> str | None:
    """The encoding that a page names itself in its first kilobyte."""
    match = _CHARSET.search(raw[:1024])
    return (match[1] or match[2]).decode("ascii") if match else None


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[str] = []
        self.line: list[str] = []
        self.title: list[str] = []
        self.in_title, self.unseen, self.pre = False, [], 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "title" and "svg" not in self.unseen:
            self.in_title = True
        elif tag == "body" or (self.unseen == ["head"] and tag in _BLOCKS):     # an open head ends here
            self.unseen.clear()
            self._end_line(False)
        elif tag in _UNSEEN:
            self.unseen.append(tag)
        elif tag in _BLOCKS:
            self._end_line(tag in _APART)
        elif tag in _CELLS and "".join(self.line).strip():
            self.line.append(" ")
        self.pre += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self._end_line(False)

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self.in_title = False
        elif tag in self.unseen:            # with what was left open inside it
            del self.unseen[len(self.unseen) - 1 - self.unseen[::-1].index(tag):]
        elif tag in _BLOCKS:
            self._end_line(tag in _APART)
        self.pre = max(0, self.pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if self.in_title:
            self.title.append(data)
        elif not self.unseen:
            if self.pre:
                first, *others = data.split("\n")
                self.line.append(first)
                for line in others:
                    self._end_line(False, keep=True)
                    self.line.append(line)
            else:
                self.line.append(re.sub(r"\s+", " ", data))

    def _end_line(self, apart: bool, keep: bool = False) -> None:
        line = "".join(self.line)
        line = line.rstrip() if keep or self.pre else re.sub(" {2,}", " ", line).strip()
        self.line = []
        if line or keep:
            self.lines.append(line)
        if apart and self.lines and self.lines[-1]:
            self.lines.append("")

    def text(self) -> str:
        self._end_line(False)
        body = "\n".join(self.lines).strip("\n")
        title = " ".join("".join(self.title).split())
        if title and title != body.split("\n", 1)[0]:
            body = f"{title}\n\n{body}" if body else title
        return f"{body}\n" if body else ""
