"""The report as a page: every number of the report is on it, foreign text stays text, nothing is fetched."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

from tests.command_line import call
from tryplicity.corpus.report_page import KEPT, WIDTH, page

EVIL = '<script src="https://x.example/y.js">&"\''


def summary():
    return {"name": f"mine {EVIL}", "documents": 30, "bytes": 2_500_000, "dropped": 14, "domains": {"text": 2_000_000},
            "sources": {"a": {"kept": {"documents": 10, "bytes": 1}, "dropped": {EVIL: 10, "short words": 4}},
                        "b": {"kept": {"documents": 20}, "dropped": {}}},
            "judges": {"statistical": {"keep": 25, "drop": 4, "no opinion": 1}},
            "agreement": {"a / b": {"documents": 9, "kappa": None}, "a / c": {"documents": 8, "kappa": 0.5}},
            "examples": {"kept": [{"id": EVIL, "text": EVIL}], EVIL: [{"id": "d", "text": EVIL}]}}


class Seen(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.said = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.said.append(data)


def test_the_page_holds_the_report_and_nothing_else():
    text = page(summary())
    seen = Seen()
    seen.feed(text)
    said = " ".join(seen.said)
    assert not {"script", "link", "img"} & set(seen.tags) and not seen.links and "default-src 'none'" in text
    for words in ("30", "2.5 MB", "14", "10 / 14", "25 / 4 / 1", "0.50", EVIL, f"d: {EVIL}", "2.0 MB"):
        assert words in said, words


def test_the_bars_are_as_long_as_what_they_stand_for():
    first = ElementTree.fromstring(re.search(r"<svg.*?</svg>", page(summary()))[0])
    bars = [(bar.get("fill"), float(bar.get("width"))) for bar in first.iter() if bar.tag.endswith("rect")]
    assert [round(width / WIDTH * 24, 1) for _, width in bars] == [10, 14, 20] and bars[0][0] == bars[2][0] == KEPT


def test_filter_writes_it_beside_the_others(recipe_file, tmp_path, capfd):
    out = tmp_path / "c"
    for line in (("download", str(recipe_file()), "--out", str(out)), ("filter", str(out), "--workers", "1")):
        code, _, err = call(capfd, "data", *line)
        assert code == 0, err
    said = json.loads((out / "report.json").read_text())
    assert (out / "report.html").read_text(encoding="utf-8") == page(said)
