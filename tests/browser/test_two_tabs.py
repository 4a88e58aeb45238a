"""Two tabs on one conversation: neither loses what the other wrote."""

import pytest

from tests.browser.conftest import until
from tests.browser.test_page import LONG, SHORT, ask, current, messages

pytestmark = pytest.mark.browser


@pytest.fixture
def tabs(open_page, server):
    """A conversation of one question, open twice."""
    first = open_page(server, settings=SHORT | {"search": False})
    ask(first, "the first question")
    second = open_page(server, f"/#c/{current(first)}", settings=SHORT | {"search": False})
    second.wait_for_selector(".answer .actions")
    return first, second


def contents(server, page, role="user"):
    return [m["content"] for m in messages(server, page) if m["role"] == role]


def shown(page):
    return page.locator(".question h2").all_inner_texts()


def test_a_question_from_the_older_tab_comes_last_and_shows_what_it_missed(tabs, server):
    first, second = tabs
    ask(second, "from the newer tab")
    ask(second, "and another")
    ask(first, "from the older tab")
    asked = ["the first question", "from the newer tab", "and another", "from the older tab"]
    until(first, "document.querySelectorAll('.question').length === 4")
    assert contents(server, first) == asked == shown(first)
    assert first.locator(".answer").count() == 4 and first.locator(".answer .actions").count() == 4
    first.reload()
    first.wait_for_selector(".answer .actions")
    assert shown(first) == asked


@pytest.mark.parametrize("change", ["edit", "regenerate"])
def test_the_older_tab_cannot_drop_what_it_does_not_know(tabs, server, change):
    first, second = tabs
    ask(second, "from the newer tab")
    before = messages(server, first)
    if change == "edit":
        first.hover(".question")
        first.click(".question [title=Edit]")
        first.fill(".edit textarea", "the first question, put better")
        first.press(".edit textarea", "Enter")
    else:
        first.click(".answer:last-child [title=Regenerate]")
    until(first, "document.querySelectorAll('.question').length === 2")
    assert messages(server, first) == before and shown(first) == ["the first question", "from the newer tab"]
    assert "gone on with elsewhere" in first.inner_text("#toast")
    if change == "edit":    # what was typed is not lost
        assert first.input_value("#question") == "the first question, put better"
    assert first.is_enabled("#send")


def test_an_edit_of_what_is_known_replaces_it(tabs, server):
    first, _ = tabs
    first.hover(".question")
    first.click(".question [title=Edit]")
    first.fill(".edit textarea", "put better")
    first.press(".edit textarea", "Enter")
    first.wait_for_selector(".answer:last-child .actions")
    assert contents(server, first) == ["put better"] == shown(first)


def test_a_tab_that_is_looked_at_again_shows_what_came(tabs):
    first, second = tabs
    ask(second, "from the newer tab")
    first.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    until(first, "document.querySelectorAll('.answer .actions').length === 2")
    assert shown(first) == ["the first question", "from the newer tab"]


def test_an_answer_being_written_elsewhere_is_not_disturbed(open_page, server):
    first = open_page(server, settings=LONG)
    ask(first, "a long one", wait=False)
    first.wait_for_selector(".answer .prose :first-child")
    second = open_page(server, f"/#c/{current(first)}", settings=SHORT)
    second.wait_for_selector(".question")
    ask(second, "meanwhile", wait=False)    # waits for the first to end, or says that one is being written
    first.press("body", "Escape")
    first.wait_for_selector(".answer .actions")
    until(second, "document.querySelector('.answer:last-child .actions') || document.querySelector('.problem-ways')")
    if second.locator(".problem-ways").count():
        second.click("text=Try again")
        second.wait_for_selector(".answer:last-child .actions")
    assert contents(server, first) == ["a long one", "meanwhile"] == shown(second)


def test_a_question_whose_answer_failed_is_not_asked_twice(open_page, make_server):
    """Without a model the question is kept; trying again writes its answer, not a second question."""
    bare = make_server(model=False, search="none")
    page = open_page(bare, settings={"search": False})
    page.fill("#question", "one")
    page.press("#question", "Enter")
    page.wait_for_selector("text=No model is loaded, so nothing writes")
    page.click(".problem-ways >> text=Try again")
    page.wait_for_timeout(500)
    page.wait_for_selector("text=No model is loaded, so nothing writes")
    assert contents(bare, page) == ["one"] == shown(page)
