"""A conversation of a thousand messages: it opens, scrolls to its beginning, and an answer still streams into it."""

import statistics

import pytest

from tests.browser.conftest import until
from tests.browser.test_accessibility import ANSWER

pytestmark = pytest.mark.browser


def long_conversation(server):
    messages = []
    for i in range(500):
        messages += [{"role": "user", "content": f"Question {i}?"},
                     {"role": "assistant", "content": f"Answer {i}. {ANSWER}", "finish": "stop"}]
    return server.conversation(messages, "A thousand")


def test_a_thousand_messages_open_scroll_and_stream(open_page, server, capsys):
    id = long_conversation(server)
    page = open_page(server, settings={"max_tokens": 400, "search": False, "temperature": 1, "seed": 1})
    opened = page.evaluate("""async (id) => {
        const start = performance.now();
        location.hash = `#c/${id}`;
        while (!document.querySelector('.answer')) await new Promise(requestAnimationFrame);
        await new Promise(requestAnimationFrame);
        return performance.now() - start;
    }""", id)
    assert page.inner_text(".question:nth-last-child(2) h2") == "Question 499?"
    assert page.locator(".message").count() < 100       # the others are made when the reader goes up to them
    at_end = """(() => {
        const s = document.getElementById('scroller');
        return s.scrollHeight - s.scrollTop - s.clientHeight < 60;
    })()"""
    assert page.evaluate(at_end)

    # up to the beginning, a screen at a time; what is read stays where it is while older messages are put before it
    scrolled = page.evaluate("""async () => {
        const scroller = document.getElementById('scroller');
        const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
        const times = [];
        let jumps = 0;
        for (let i = 0; i < 3000; i += 1) {
            scroller.scrollTop -= scroller.clientHeight;
            await frame();
            const middle = scroller.getBoundingClientRect().x + scroller.clientWidth / 2;
            const seen = document.elementFromPoint(middle, 300)?.closest('.message');
            const before = seen?.getBoundingClientRect().top;
            const start = performance.now();
            await frame(); await frame();
            times.push((performance.now() - start) / 2);
            if (seen && Math.abs(seen.getBoundingClientRect().top - before) > 200) jumps += 1;
            if (scroller.scrollTop <= 0 && document.querySelector('.earlier').hidden) return [times, jumps];
        }
        return [times, jumps];
    }""")
    times, jumps = scrolled
    assert page.inner_text(".question >> nth=0 >> h2") == "Question 0?"
    assert page.locator(".message").count() == 1000
    assert jumps == 0
    assert page.is_visible("#latest")

    page.click("#latest")
    assert page.evaluate(at_end)
    page.fill("#question", "And now?")
    page.press("#question", "Enter")
    page.wait_for_selector(".answer:last-child .actions")
    updates = page.evaluate("window.tryplicity.updates")
    assert len(updates) > 3 and page.evaluate(at_end)
    assert page.locator(".message").count() == 1002
    with capsys.disabled():
        print(f"\n1,000 messages: opened in {opened:.0f} ms; a frame while scrolling {statistics.median(times):.1f} ms "
              f"(median of {len(times)}), {sorted(times)[int(0.99 * len(times))]:.1f} ms (p99); a streamed update "
              f"{statistics.median(updates):.2f} ms (median of {len(updates)}), {max(updates):.2f} ms (worst)")


def test_a_reader_who_went_up_is_left_there_and_can_come_back(open_page, server):
    id = long_conversation(server)
    page = open_page(server, f"/#c/{id}", settings={"max_tokens": 1500, "search": False, "temperature": 1, "seed": 1})
    page.wait_for_selector(".answer")
    page.fill("#question", "Slowly, please.")
    page.press("#question", "Enter")
    until(page, "document.querySelector('.answer:last-child .prose').textContent.length > 5")
    page.hover("#scroller")
    page.mouse.wheel(0, -1500)
    page.wait_for_selector("#latest")
    top = page.evaluate("document.getElementById('scroller').scrollTop")
    length = "document.querySelector('.answer:last-child .prose').textContent.length"
    before = page.evaluate(length)
    until(page, f"{length} > {before} || !document.body.hasAttribute('data-busy')")
    assert abs(page.evaluate("document.getElementById('scroller').scrollTop") - top) < 300
    page.click("#latest")
    page.wait_for_selector("#latest", state="hidden")
    page.keyboard.press("Escape")
    until(page, "!document.body.hasAttribute('data-busy')")
