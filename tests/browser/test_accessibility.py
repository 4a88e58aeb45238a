"""axe-core on each screen: nothing serious, nothing critical (https://github.com/dequelabs/axe-core)."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

ANSWER = """The function joins **paths** [1]. See [the page](https://example.org).

### More

- a list
- of things

```python
def f(): return "x"  # a comment
```

| a | b |
|---|---|
| 1 | 2 |
"""
MESSAGES = [
    {"role": "user", "content": "How are paths joined?"},
    {"role": "assistant", "content": ANSWER, "supported": True, "finish": "length", "tokens_per_second": 20.0,
     "sources": [{"number": 1, "id": "1", "title": "os.path", "url": "https://example.org/os.path",
                  "text": "Joins paths."}]},
    {"role": "user", "content": "And otherwise?"},
    {"role": "assistant", "content": "Nothing is known.", "supported": False, "finish": "cancelled"},
]
PHONE = {"width": 390, "height": 844, "has_touch": True, "is_mobile": True}


def serious(page):
    """What axe finds. It runs as one of the page's own files would; the policy of the page stays in force."""
    import axe_playwright_python

    source = next(Path(axe_playwright_python.__file__).parent.rglob("axe.min.js")).read_text()
    page.wait_for_timeout(300)      # dialogs rise in 160 ms; half-transparent text would be judged by its contrast
    page.evaluate(source)
    result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert result["passes"], "axe looked at nothing"
    return [(each["id"], [node["html"][:160] for node in each["nodes"]]) for each in result["violations"]
            if each["impact"] in ("serious", "critical")]


@pytest.fixture(params=["desktop", "phone", "light"])
def size(request):
    return {"phone": PHONE, "light": {"color_scheme": "light"}, "desktop": {}}[request.param]


def test_start_screen(open_page, server, size):
    assert serious(open_page(server, **size)) == []


def test_conversation_with_an_open_passage(open_page, server, size):
    id = server.conversation(MESSAGES, "Paths")
    page = open_page(server, f"/#c/{id}", **size)
    page.locator(".card").first.click()
    assert serious(page) == []
    page.locator("[aria-label=Edit]").first.click()
    assert serious(page) == []


@pytest.mark.parametrize("opener", ["#open-settings", "#model"])
def test_sheets(open_page, server, size, opener):
    page = open_page(server, **size)
    page.click(opener)
    assert serious(page) == []


def test_help_and_the_menu(open_page, server):
    id = server.conversation(MESSAGES, "Paths again")
    page = open_page(server, f"/#c/{id}")
    page.click("#more")
    assert serious(page) == []
    page.keyboard.press("Escape")
    page.click("#open-help")
    assert serious(page) == []


def test_side_bar_while_renaming_and_deleting(open_page, server, size):
    server.conversation(MESSAGES, "To rename")
    page = open_page(server, **size)
    if "width" in size:
        page.click("#side-open")
    item = page.locator("#conversations li", has_text="To rename").first
    item.hover()
    item.locator("[aria-label^=Rename]").click()
    assert serious(page) == []
    page.keyboard.press("Escape")
    page.locator("#conversations li", has_text="To rename").first.locator("[aria-label^=Delete]").click()
    assert serious(page) == []


def test_completing_a_text(open_page, server, size):
    assert serious(open_page(server, "/#complete", **size)) == []


def test_no_model_and_its_problem(open_page, bare, size):
    page = open_page(bare, **size)
    page.fill("#question", "How are paths joined?")
    page.press("#question", "Enter")
    page.wait_for_selector(".problem")
    assert serious(page) == []


def test_key_dialog(open_page, make_server):
    page = open_page(make_server(model=False, api_key="k"), ready=False)
    page.wait_for_selector("#key-dialog[open]")
    assert serious(page) == []
