"""The page in light and in the reader's own colours, on a narrow phone, and on paper."""

import re

import pytest
from pypdf import PdfReader

from tests.browser.conftest import until

pytestmark = pytest.mark.browser

TEXT = ("Some words [1].\n\n```python\ndef a(b):\n    return b  # a comment longer than the screen is wide, by far\n"
        "```\n\n| a | b |\n|---|---|\n| " + "x" * 60 + " | 2 |\n\n- [ ] open\n- [x] done\n\nA formula: $a_i * b_i$.")
SOURCES = [{"number": 1, "id": "1", "title": "A title " * 6, "url": "https://example.org/" + "long/" * 20,
            "text": "Text. " * 50}]


def exchange(number, **answer):
    return [{"role": "user", "content": f"Question {number}?"},
            {"role": "assistant", "content": f"Answer {number}.", "finish": "stop", **answer}]


def luminance(colour):
    """WCAG 2.2's relative luminance of "rgb(r, g, b)"."""
    parts = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_dark_unless_the_reader_prefers_light(open_page, server):
    id = server.conversation(exchange(1, content=TEXT, sources=SOURCES, supported=True))
    for scheme in ("dark", "light"):
        page = open_page(server, f"/#c/{id}", color_scheme=scheme)
        page.wait_for_selector(".code")
        page.click(".card")
        back, text = page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
        assert (luminance(back) < luminance(text)) is (scheme == "dark")
        if scheme == "dark":
            assert back == "rgb(16, 16, 31)" and text == "rgb(238, 238, 245)"
        # every piece of text is told from what is behind it: WCAG's 4.5:1
        pairs = page.evaluate("""() => {
            const behind = (e) => {
                for (; e; e = e.parentElement) {
                    const colour = getComputedStyle(e).backgroundColor;
                    if (/^rgb\\(/.test(colour)) return colour;
                }
                return 'rgb(255, 255, 255)';
            };
            const written = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
            return [...document.querySelectorAll('#page *')].filter((e) => e.checkVisibility() && written(e))
                .map((e) => [getComputedStyle(e).color, behind(e), e.className || e.tagName]);
        }""")
        assert len(pairs) > 20
        for colour, back, what in pairs:
            light, dark = sorted((luminance(colour), luminance(back)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, what, colour, back)


def test_nothing_is_wider_than_a_phone_of_320_pixels(open_page, server):
    id = server.conversation(exchange(1, content=TEXT, sources=SOURCES, supported=False,
                                      quotation="> " + "word" * 40 + " [1]"), title="A long title " * 5)
    page = open_page(server, f"/#c/{id}", width=320, height=640)
    page.wait_for_selector(".quoted")
    page.click(".card")
    wide = "document.documentElement.scrollWidth > 320 || document.querySelector('#scroller').scrollWidth > 320"
    assert not page.evaluate(wide)
    inside = """() => [...document.querySelectorAll('#top button, #dock button, textarea, .actions button')]
        .filter((e) => e.checkVisibility()).map((e) => e.getBoundingClientRect())
        .every((r) => r.left >= 0 && r.right <= 320)"""
    assert page.evaluate(inside)
    for button in ("#open-settings", "#model"):
        page.click(button)
        assert page.evaluate("document.querySelector('dialog[open]').scrollWidth <= 320")
        page.keyboard.press("Escape")
    start = open_page(server, width=320, height=640)
    assert not start.evaluate("document.documentElement.scrollWidth > 320")


def test_the_readers_own_colours_show_every_edge(open_page, server):
    page = open_page(server, forced_colors="active")
    assert page.evaluate("matchMedia('(forced-colors: active)').matches")
    for selector in ("#composer", ".toggle", ".send", ".example"):
        assert page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).borderTopStyle") == "solid"


def test_paper_gets_the_whole_conversation(open_page, server, tmp_path):
    """Messages that the screen had not made yet are printed too."""
    id = server.conversation([m for n in range(60) for m in exchange(n)])
    page = open_page(server, f"/#c/{id}")
    page.wait_for_selector("text=Question 59?")
    assert page.locator("text=Question 3?").count() == 0
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.pdf(path=str(tmp_path / "page.pdf"))
    text = "\n".join(each.extract_text() for each in PdfReader(tmp_path / "page.pdf").pages)
    for number in range(60):
        assert f"Question {number}?" in text and f"Answer {number}." in text
    assert "Ask anything" not in text and "New conversation" not in text


def test_what_is_on_the_screen_comes_first_where_it_helps(open_page, server):
    id = server.conversation(exchange(1, content="Unfounded words.", sources=SOURCES, supported=False,
                                      quotation="> The source says so. [1]"))
    page = open_page(server, f"/#c/{id}")
    page.wait_for_selector(".quoted")
    text = page.inner_text(".answer")
    assert text.index("No source supports") < text.index("The source says so") < text.index("Unfounded words")
    assert "own words" in text


def test_what_checked_means_is_said_beside_marks(open_page, server):
    id = server.conversation(exchange(1, content="Some words [1].", sources=SOURCES, supported=True))
    page = open_page(server, f"/#c/{id}")
    page.click("text=Marks checked")
    until(page, "document.querySelector('.checked p').textContent.includes('not by understanding')")


def test_a_bad_address_says_that_there_is_no_such_conversation(open_page, server):
    page = open_page(server, "/#c/%E0%A4%A")
    page.wait_for_selector("text=This conversation is no longer on the server.")
    page.click("text=New conversation >> nth=-1")
    until(page, "document.body.dataset.view === 'start'")


def test_examples_are_questions_to_the_index_that_is_served(open_page, server):
    page = open_page(server)
    shown = page.locator(".example").all_inner_texts()
    assert shown == server.call("GET", "/api/model")["search"]["examples"] and len(shown) >= 2
    for question in shown:
        assert server.call("GET", "/api/search?q=" + question.replace(" ", "%20").replace("?", "%3F"))["results"]


def test_the_settings_keep_to_the_servers_limits(open_page, make_server):
    small = make_server(max_tokens=64)
    page = open_page(small, settings={"max_tokens": 500})
    page.click("#open-settings")
    assert page.get_attribute("#set-max_tokens", "max") == "64" and page.input_value("#set-max_tokens") == "64"


def test_without_its_scripts_the_page_says_so(browser, server):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#failed", state="visible")
    assert "scripts" in page.inner_text("#failed")
    context.close()
