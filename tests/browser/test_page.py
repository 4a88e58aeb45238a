"""What a person does on the page, done by a browser."""

import json
import re
import signal
import urllib.error
import urllib.request

import pytest

from tests.browser.conftest import DOCUMENTS, PWN, until

pytestmark = pytest.mark.browser

# greedy text goes round in circles and does not end by itself, so that there is time to stop it
LONG = {"max_tokens": 1500, "temperature": 0, "repetition_penalty": 1, "search": False}
SHORT = {"max_tokens": 40, "temperature": 0.5, "seed": 1}
DONE = ".answer:last-child .actions"


def ask(page, text, wait=True):
    page.fill("#question", text)
    page.press("#question", "Enter")
    if wait:
        page.wait_for_selector(DONE)


def messages(server, page):
    return server.call("GET", f"/api/conversations/{current(page)}")["messages"]


def current(page):
    until(page, "location.hash.startsWith('#c/')")
    return page.evaluate("location.hash.slice(3)")


def answer_text(page):
    return page.inner_text(".answer:last-child .prose")


def test_first_load_asks_for_the_page_and_nothing_else(open_page, server):
    page = open_page(server)
    assert page.is_visible("#hero img") and page.is_visible(".example >> nth=0")
    assert page.evaluate("document.activeElement.id") == "question"
    assert page.evaluate("document.fonts.ready.then(() => [...document.fonts].map(f => f.family + ' ' + f.status))") \
        == ["Inter loaded"]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 16, 31)"
    assert page.evaluate("[...document.querySelectorAll('script')].every(s => s.src && !s.textContent)")
    assert page.evaluate("document.querySelectorAll('style, [style]').length") <= 1    # the question field's height
    assert "small" in page.inner_text("#tagline") and "passages" in page.inner_text("#tagline")


def test_sources_come_before_the_answer_which_comes_in_pieces(open_page, server):
    page = open_page(server, settings=SHORT | {"max_tokens": 300})
    page.evaluate("""() => {
        window.order = [];
        new MutationObserver(() => {
            const text = document.querySelector('.prose')?.textContent.length ?? 0;
            const done = document.querySelector('.actions [title=Regenerate]');
            if (document.querySelector('.card') && !window.order.includes('cards')) window.order.push('cards');
            if (text && !done && window.order.at(-1) !== text) window.order.push(text);
        }).observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true});
    }""")
    ask(page, "What does os.path.join do with path segments?")
    order = page.evaluate("window.order")
    assert order[0] == "cards" and len(set(order)) > 3, order
    kept = messages(server, page)
    assert [each["role"] for each in kept] == ["user", "assistant"]
    assert page.inner_text(".question h2") == kept[0]["content"]
    assert page.title() == "What does os.path.join do with path segments? · Tryplicity"
    assert kept[1]["supported"] is False and len(kept[1]["sources"]) > 0      # it was trained on other words
    page.wait_for_selector("text=No source supports this answer")
    shown = page.inner_text("#log")
    page.reload()
    page.wait_for_selector(".quoted")
    assert page.inner_text("#log") == shown      # what was found and quoted is still there


def test_what_the_sources_say_is_quoted_above_an_answer_that_rests_on_none(open_page, server):
    sources = [{"number": n, "id": str(n), "title": f"Title {n}", "url": f"https://example.org/{n}",
                "text": f"Text {n}."} for n in (1, 2)]
    id = server.conversation([
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "The model's own words [1].", "sources": sources, "supported": False,
         "finish": "stop", "quotation": f"> Call \\_\\_init\\_\\_ and {PWN} [2]\n>\n> Text 1 is this. [1]"}])
    page = open_page(server, f"/#c/{id}")
    box = page.get_by_role("region", name="From the sources")
    assert "not the model" in box.inner_text() and "Call __init__ and <img src=x" in box.inner_text()
    assert page.locator(".answer > .prose").inner_text() == "The model's own words [1]."      # no chip in it
    assert box.locator(".cite").all_inner_texts() == ["2", "1"]
    box.locator(".cite").first.click()
    assert "Text 2." in page.inner_text(".passage")
    page.click(".passage [aria-label='Close the passage']")
    assert page.evaluate("document.activeElement.className + document.activeElement.textContent") == "cite2"
    assert not page.evaluate("window.pwned")


def test_a_card_opens_its_passage_in_place_and_closes_again(open_page, server):
    page = open_page(server, settings=SHORT)
    ask(page, "What does os.path.join do with path segments?")
    card = page.locator(".card").first
    assert card.get_attribute("aria-expanded") == "false"
    card.click()
    assert "exactly one directory separator" in page.inner_text(".passage")
    assert "library/os.path" in page.inner_text(".passage") and card.get_attribute("aria-expanded") == "true"
    page.click(".passage [aria-label='Close the passage']")
    assert page.is_hidden(".passage")
    assert page.evaluate("document.activeElement.className") == "card"


def test_a_citation_opens_the_card_of_its_number_and_gives_the_focus_back(open_page, server):
    sources = [{"number": n, "id": str(n), "title": f"Title {n}", "url": f"https://example.org/{n}",
                "text": f"Text {n}."} for n in (1, 2)]
    id = server.conversation([
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "One [1]. Two [2]. No such source [7], no mark x[1] and `[2]`.",
         "sources": sources, "supported": True, "finish": "stop"}])
    page = open_page(server, f"/#c/{id}")
    assert page.locator(".cite").all_inner_texts() == ["1", "2"]
    assert "[7]" in answer_text(page) and "x[1] and [2]" in answer_text(page)
    page.locator(".cite").nth(1).click()
    assert "Text 2." in page.inner_text(".passage")
    link = page.locator(".passage a")
    assert link.get_attribute("href") == "https://example.org/2" and link.get_attribute("rel") == "noopener noreferrer"
    page.click(".passage [aria-label='Close the passage']")
    assert page.evaluate("document.activeElement.className + document.activeElement.textContent") == "cite2"


def test_stop_frees_the_model_keeps_the_text_and_continue_goes_on(open_page, server):
    page = open_page(server, settings=LONG)
    ask(page, "What is 3?", wait=False)
    until(page, "document.querySelector('.answer .prose')?.textContent.length > 20")
    assert page.get_attribute("#send", "aria-label") == "Stop"
    page.keyboard.press("Escape")
    page.wait_for_selector(".answer .meta >> text=Stopped")
    assert page.get_attribute("#send", "aria-label") == "Ask"
    stopped = messages(server, page)[1]
    assert stopped["finish"] == "cancelled" and 20 < len(stopped["content"]) < 4000
    assert server.call("GET", "/api/model")["statistics"]["running"] == 0
    assert re.sub(r"\s", "", answer_text(page)) == re.sub(r"\s", "", stopped["content"])

    page.evaluate(
        "localStorage.setItem('tryplicity.settings', JSON.stringify({max_tokens: 30, search: false, seed: 1}))")
    page.reload()
    page.click("text=Continue")
    until(page, "!document.querySelector('[aria-busy]')")
    page.wait_for_selector(DONE)
    longer = messages(server, page)[1]
    assert longer["id"] == stopped["id"] and longer["content"].startswith(stopped["content"].rstrip())
    assert len(longer["content"]) > len(stopped["content"])


def test_regenerate_replaces_the_last_answer(open_page, server):
    page = open_page(server, settings=SHORT | {"seed": None, "temperature": 1.5})
    ask(page, "What is 4?")
    first = messages(server, page)
    page.click(".answer:last-child [aria-label=Regenerate]")
    page.wait_for_selector(".answer[aria-busy]", state="attached")
    page.wait_for_selector(DONE)
    second = messages(server, page)
    assert len(second) == 2 and second[0]["id"] == first[0]["id"] and second[1]["id"] != first[1]["id"]
    assert page.locator(".message").count() == 2


def test_editing_a_question_drops_what_came_after_it(open_page, server):
    page = open_page(server, settings=SHORT)
    ask(page, "The first")
    ask(page, "The second")
    until(page, "document.querySelectorAll('.message').length === 4")
    page.wait_for_selector(DONE)
    page.locator("[aria-label=Edit]").nth(1).click()
    page.fill("[aria-label='Edit the question']", "The second, edited")
    page.press("[aria-label='Edit the question']", "Enter")
    page.wait_for_selector(".question h2 >> text=The second, edited")
    page.wait_for_selector(DONE)
    assert [m["content"] for m in messages(server, page) if m["role"] == "user"] == ["The first", "The second, edited"]

    page.locator("[aria-label=Edit]").first.click()     # the very first: nothing stands before it
    page.fill("[aria-label='Edit the question']", "Another beginning")
    page.click(".edit >> text=Ask")
    until(page, "document.querySelectorAll('.message').length === 2")
    page.wait_for_selector(DONE)
    assert [m["content"] for m in messages(server, page) if m["role"] == "user"] == ["Another beginning"]
    assert page.locator(".question h2").all_inner_texts() == ["Another beginning"]


def test_conversations_are_there_after_a_restart(open_page, make_server):
    server = make_server()
    page = open_page(server, settings=SHORT)
    ask(page, "What is kept?")
    before = page.inner_text("#log")
    server.stop()
    page.fill("#question", "Is anyone there?")
    page.press("#question", "Enter")
    page.wait_for_selector("text=The connection to the server was lost.")
    server.start().wait_until_ready()
    page.click(".problem >> text=Try again")
    page.wait_for_selector(DONE)
    assert len(messages(server, page)) == 4
    page.reload()
    page.click("#conversations a >> text=What is kept?")
    page.wait_for_selector(DONE)
    assert page.inner_text("#log").startswith(before.split("\n")[0])
    assert page.locator(".message").count() == 4


def test_rename_delete_and_search_in_the_side_bar(open_page, make_server):
    server = make_server(model=False)
    for title in ("Zebra crossing", "Lions & <b>tigers</b>"):
        server.conversation([{"role": "user", "content": f"about {title}"}], title)
    page = open_page(server)
    page.wait_for_selector("#conversations a")
    page.fill("#find", "zebra")
    until(page, "document.querySelectorAll('#conversations a').length === 1")
    assert page.inner_text("#conversations a") == "Zebra crossing"
    page.fill("#find", "no such word")
    page.wait_for_selector("text=Nothing was found")
    page.fill("#find", "")
    until(page, "document.querySelectorAll('#conversations a').length === 2")

    page.hover("#conversations li:has-text('Zebra')")
    page.click("[aria-label='Rename Zebra crossing']")
    page.fill("[aria-label='New title']", "Horses")
    page.press("[aria-label='New title']", "Enter")
    page.wait_for_selector("#conversations a >> text=Horses")
    titles = {c["title"] for c in server.call("GET", "/api/conversations")["conversations"]}
    assert titles == {"Horses", "Lions & <b>tigers</b>"}

    page.click("#conversations a >> text=Horses")
    page.wait_for_selector(".question")
    page.hover("#conversations li:has-text('Horses')")
    page.click("[aria-label='Delete Horses']")
    page.click(".removing >> text=Keep")
    assert page.locator("#conversations a").count() == 2
    page.hover("#conversations li:has-text('Horses')")
    page.click("[aria-label='Delete Horses']")
    page.click(".removing >> text='Delete'")
    until(page, "document.querySelectorAll('#conversations a').length === 1")
    assert len(server.call("GET", "/api/conversations")["conversations"]) == 1
    page.wait_for_selector("#hero")         # the open one is gone: a new one


def test_phone_width_has_a_drawer_and_never_scrolls_sideways(open_page, server):
    wide = "| a | b | c |\n|--|--|--|\n" + f"| {'word ' * 20}| {'x' * 60} | {'y' * 60} |\n" * 2
    code = f"```python\n{'x = 1; ' * 40}\n```\n\n{'unbroken' * 40}\n\n{wide}"
    id = server.conversation([{"role": "user", "content": "q" * 200}, {"role": "assistant", "content": code}],
                             "w" * 150)
    page = open_page(server, width=390, height=844, has_touch=True, is_mobile=True)

    def fits():
        return page.evaluate("document.documentElement.scrollWidth <= 390 && document.body.scrollWidth <= 390")

    assert fits() and page.is_hidden("#side")
    assert page.evaluate("parseFloat(getComputedStyle(document.getElementById('question')).fontSize)") >= 16
    page.tap("#side-open")
    page.wait_for_selector("#side")
    assert page.evaluate("document.getElementById('page').inert")
    page.tap(f"#conversations a[data-id='{id}']")
    page.wait_for_selector(".code")
    assert page.is_hidden("#side") and fits()
    assert page.evaluate("document.getElementById('scroller').scrollWidth") <= 390
    page.tap("#open-settings")
    page.wait_for_selector("#settings-dialog[open]")
    assert fits()


def test_everything_works_from_the_keyboard(open_page, server):
    page = open_page(server, settings=SHORT)
    keys = page.keyboard
    page.evaluate("document.activeElement.blur()")
    keys.press("/")
    assert page.evaluate("document.activeElement.id") == "question" and page.input_value("#question") == ""
    keys.type("line one")
    keys.press("Shift+Enter")
    keys.type("line two")
    # Enter that ends a word of an input method asks nothing
    page.evaluate("""document.getElementById('question').dispatchEvent(
        new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))""")
    assert page.input_value("#question") == "line one\nline two"
    keys.press("Enter")
    page.wait_for_selector(DONE)
    assert messages(server, page)[0]["content"] == "line one\nline two"

    keys.press("ArrowUp")       # the field is empty: the last question
    assert page.input_value("[aria-label='Edit the question']") == "line one\nline two"
    keys.press("Escape")
    assert page.locator(".edit").count() == 0 and page.evaluate("document.activeElement.id") == "question"

    page.evaluate("document.activeElement.blur()")
    keys.press("?")
    page.wait_for_selector("#help-dialog[open]")
    keys.press("Escape")
    page.wait_for_selector("#help-dialog", state="hidden")
    keys.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "find"
    keys.press("Control+Shift+O")
    page.wait_for_selector("#hero")
    assert page.evaluate("document.activeElement.id") == "question"

    # Tab reaches each control, and each shows a ring
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(300):
        keys.press("Tab")
        name, ring = page.evaluate("""() => {
            const e = document.activeElement, s = getComputedStyle(e);
            const framed = e.closest('#composer') ? getComputedStyle(e.closest('#composer')).boxShadow : '';
            const ring = s.outlineStyle !== 'none' || (e.id === 'question' && framed.includes('139, 92, 246'));
            return [e.id || e.className, ring];
        }""")
        if name:
            if name == "skip" and "skip" in reached:
                break       # once around
            reached.add(name)
            assert ring, f"{name} has no focus ring"
    assert {"skip", "new", "find", "open-settings", "model", "question", "toggle-search", "toggle-raw", "send",
            "example"} <= reached


def test_a_server_with_a_key_is_opened_with_it(open_page, make_server):
    server = make_server(api_key="open sesame")
    page = open_page(server, settings=SHORT, ready=False)
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("text=The server did not accept that key")
    page.fill("#key", "open sesame")
    page.click("text=Use this key")
    page.wait_for_selector("#model .dot[data-state=ready]")
    ask(page, "What is 1?")
    assert len(messages(server, page)) == 2
    page.reload()
    page.wait_for_selector("#model .dot[data-state=ready]")
    assert page.locator("#key-dialog[open]").count() == 0
    assert page.evaluate("sessionStorage.getItem('tryplicity.key')") == "open sesame"
    assert not page.evaluate("JSON.stringify(localStorage).includes('sesame')")


def test_without_a_model_the_page_says_so_and_search_still_works(open_page, bare):
    page = open_page(bare)
    page.wait_for_selector("#notice >> text=No model is loaded")
    ask(page, "Which clause is executed on the way out, finally?", wait=False)
    page.wait_for_selector(".problem >> text=No model is loaded, so nothing writes an answer")
    page.locator(".card").first.click()
    assert "cleanup handler" in page.inner_text(".passage")
    assert page.inner_text(".answer > .prose") == ""
    assert [m["finish"] for m in messages(bare, page)] == [None, "none"]
    assert "executed on the way out" in page.inner_text(".quoted")
    ask(page, "How to join path segments?", wait=False)      # a second question follows the first
    page.wait_for_selector(".answer:last-child .problem")
    assert [m["role"] for m in messages(bare, page)] == ["user", "assistant"] * 2
    page.reload()
    page.wait_for_selector(".answer:last-child >> text=No model was there to answer")
    page.locator(".answer").first.locator(".quoted .cite").first.click()
    assert "cleanup handler" in page.locator(".answer").first.locator(".passage").inner_text()


def test_raw_completion_writes_on_stops_and_takes_back(open_page, server):
    page = open_page(server, settings=LONG)
    page.click("#toggle-raw")
    page.fill("#raw-text", "The model reads ")
    page.press("#raw-text", "Control+Enter")
    until(page, "document.getElementById('raw-text').value.length > 40")
    page.keyboard.press("Escape")
    page.wait_for_selector("#raw-go >> text=Write")
    text = page.input_value("#raw-text")
    assert text.startswith("The model reads ") and len(text) > 40
    page.wait_for_timeout(300)
    assert page.input_value("#raw-text") == text        # it has really stopped
    page.click("text=Take back")
    assert page.input_value("#raw-text") == "The model reads "
    page.evaluate("localStorage.setItem('tryplicity.settings', JSON.stringify({max_tokens: 12, temperature: 0}))")
    page.reload()
    page.fill("#raw-text", "The model reads ")
    page.click("#raw-go")
    page.wait_for_selector("#raw-speed >> text=longest length reached")
    assert "12 tokens" in page.inner_text("#raw-speed")
    # what the page wrote is what the API writes
    same = server.call("POST", "/v1/completions", {
        "model": server.call("GET", "/api/model")["card"]["id"], "prompt": "The model reads ", "max_tokens": 12,
        "temperature": 0, "repetition_penalty": 1.1})
    assert page.input_value("#raw-text") == "The model reads " + same["choices"][0]["text"]


def test_markup_stays_text_wherever_it_comes_from(open_page, server, bare):
    answer = f"{PWN}\n\n# {PWN}\n\n- {PWN}\n\n| {PWN} |\n|--|\n| {PWN} |\n\n```html\n{PWN}\n```\n\n" \
             f"[{PWN}](javascript:window.pwned=1) [x](data:text/html,{PWN}) <javascript:alert(1)> ![i](http://evil.test/i.png)"
    source = {"number": 1, "id": "1", "title": PWN, "url": "javascript:window.pwned=1", "text": PWN}
    id = server.conversation([
        {"role": "user", "content": PWN},
        {"role": "assistant", "content": answer + " [1]", "sources": [source], "supported": True}], PWN)
    page = open_page(server, f"/#c/{id}")
    page.wait_for_selector(".code")
    assert page.inner_text(".question h2") == PWN and page.inner_text("#title") == PWN
    assert page.inner_text("#conversations a[aria-current]") == PWN and PWN in page.title()
    assert answer_text(page).count("<script>") == 8
    page.click(".card")
    assert PWN in page.inner_text(".passage-text")
    page.hover("#conversations li:has(a[aria-current])")
    page.click("#conversations li:has(a[aria-current]) [aria-label^=Rename]")
    page.keyboard.press("Escape")
    page.click("#conversations li:has(a[aria-current]) [aria-label^=Delete]")
    page.click(".removing >> text=Keep")
    hrefs = page.eval_on_selector_all("#log a", "links => links.map(link => link.href)")
    assert hrefs == ["http://evil.test/i.png"]      # a link to follow or not; the picture is not fetched
    untouched(page)

    page = open_page(bare)      # a document and its file name
    ask(page, "zebra protocol handshake", wait=False)
    page.wait_for_selector(".card")
    page.locator(".card").first.click()
    assert DOCUMENTS["hostile"][1].split(". ")[1][:30] in page.inner_text(".passage")
    untouched(page)


def untouched(page):
    page.wait_for_timeout(200)
    assert page.evaluate("window.pwned") is None
    assert page.locator("body script, iframe, #log img:not([src='/static/logo.svg'])").count() == 0


def test_what_is_too_long_to_ask_is_said_in_place_and_to_write_is_fewer(open_page, make_server):
    server = make_server(body_bytes=4000, max_tokens=50)
    page = open_page(server, settings=SHORT)
    ask(page, "x" * 5000, wait=False)
    page.wait_for_selector(".problem >> text=This is longer than the server takes")
    page.click(".problem >> text=Edit the question")
    assert page.input_value("#question") == "x" * 5000

    page.click("#new")
    page.evaluate("localStorage.setItem('tryplicity.settings', JSON.stringify({max_tokens: 90, temperature: 0}))")
    page.reload()
    ask(page, "How many?")
    (_, answer) = messages(server, page)
    assert answer["finish"] in ("length", "stop") and answer["settings"]["max_tokens"] <= 90


def test_a_busy_server_is_asked_again_after_a_countdown(open_page, make_server):
    server = make_server(active=1)
    page = open_page(server, settings=SHORT)
    body = {"model": server.call("GET", "/api/model")["card"]["id"], "prompt": "The ", "max_tokens": 1800,
            "stream": True, "temperature": 1.0, "seed": 3}
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as other:
        other.readline()        # it is being answered
        ask(page, "And me?", wait=False)
        page.wait_for_selector(".problem >> text=The server is busy")
        assert re.search(r"Trying again in \d+ s", page.inner_text(".problem"))
    page.wait_for_selector(DONE)        # by itself
    assert len(messages(server, page)) == 2


def test_an_answer_cut_by_a_dead_server_is_kept_and_can_be_had_again(open_page, make_server):
    server = make_server()
    page = open_page(server, settings=LONG)
    ask(page, "What is 5?", wait=False)
    until(page, "document.querySelector('.answer .prose')?.textContent.length > 20")
    server.stop(signal.SIGKILL)
    page.wait_for_selector(".problem >> text=The connection to the server was lost")
    assert len(answer_text(page)) > 20
    server.start().wait_until_ready()
    page.evaluate("localStorage.clear()")
    page.click(".problem >> text=Try again")
    page.wait_for_selector(".answer[aria-busy]", state="attached")
    page.keyboard.press("Escape")
    until(page, "!document.body.hasAttribute('data-busy')")
    assert [m["role"] for m in messages(server, page)][:1] == ["user"]


def test_a_conversation_that_is_gone_offers_a_new_one(open_page, bare):
    page = open_page(bare, "/#c/0123456789abcdef")
    page.wait_for_selector(".problem >> text=no longer on the server")
    page.click(".problem >> text=New conversation")
    page.wait_for_selector("#hero")


def test_settings_are_kept_and_sent(open_page, server):
    page = open_page(server)
    page.click("#open-settings")
    page.fill("#set-temperature", "0")
    page.fill("#set-max_tokens", "7")
    page.fill("#set-seed", "5")
    page.fill("#set-top_p", "3")
    page.wait_for_selector("text=Top-p goes from 0.05 to 1")
    page.click("label >> text=Search before answering")
    page.keyboard.press("Escape")
    page.reload()
    assert page.get_attribute("#toggle-search", "aria-pressed") == "false"
    ask(page, "What is 6?")
    settings = messages(server, page)[1]["settings"]
    assert settings["temperature"] == 0 and settings["max_tokens"] == 7 and settings["seed"] == 5
    assert settings["top_p"] == 0.95 and settings["search"] is False
    page.click("#open-settings")
    page.click("text=Back to the defaults")
    assert page.input_value("#set-temperature") == "0.3"


def test_export_and_import_make_the_same_conversation(open_page, make_server, tmp_path):
    server = make_server(model=False)
    content = "Some **bold** text."
    id = server.conversation([{"role": "user", "content": "Q?"}, {"role": "assistant", "content": content}], "To keep")
    page = open_page(server, f"/#c/{id}", accept_downloads=True)
    page.wait_for_selector(DONE)
    kept = {}
    for words, suffix in (("Export as Markdown", "md"), ("Export as JSON", "json")):
        page.click("#more")
        with page.expect_download() as download:
            page.click(f"text={words}")
        assert download.value.suggested_filename == f"To keep.{suffix}"
        kept[suffix] = tmp_path / f"kept.{suffix}"
        download.value.save_as(kept[suffix])
    assert content in kept["md"].read_text() and "# To keep" in kept["md"].read_text()
    server.call("DELETE", f"/api/conversations/{id}")
    page.click("#open-settings")
    page.set_input_files("#import", kept["json"])
    page.wait_for_selector("#toast >> text=Imported")
    page.keyboard.press("Escape")
    page.click("#conversations a >> text=To keep")
    page.wait_for_selector(DONE)
    assert answer_text(page) == "Some bold text."


def test_the_card_of_the_model_says_what_it_is(open_page, server):
    page = open_page(server)
    card = server.call("GET", "/api/model")["card"]
    page.click("#model")
    text = page.inner_text("#model-dialog")
    assert card["name"] in text and f"{card['context_length']:,} tokens" in text and "Ready" in text
    assert card["format"] in text and "passages" in text
    assert page.locator(".layers li").count() >= 1


def test_copying_gives_the_text_and_the_code(open_page, server):
    id = server.conversation([{"role": "user", "content": "Q"},
                              {"role": "assistant", "content": "See:\n\n```python\nprint(\"<b>\")\n```\n"}])
    page = open_page(server, f"/#c/{id}", permissions=["clipboard-read", "clipboard-write"])
    page.click("text=Copy code")
    page.wait_for_selector(".code-head >> text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == 'print("<b>")'
    page.click(".answer [aria-label=Copy]")
    until(page, "navigator.clipboard.readText().then(text => text.startsWith('See:'))")


def test_screen_readers_hear_that_an_answer_is_complete_and_not_each_token(open_page, server):
    page = open_page(server, settings=SHORT | {"max_tokens": 200})
    page.evaluate("""() => { window.said = []; new MutationObserver(() => {
        const text = document.getElementById('status').textContent; if (text) window.said.push(text); })
        .observe(document.getElementById('status'), {childList: true}) }""")
    ask(page, "What is 7?", wait=False)
    page.wait_for_selector("#log[aria-busy=true]", state="attached")
    page.wait_for_selector(DONE)
    until(page, "window.said.length > 0")
    said = page.evaluate("window.said")
    assert len(said) == 1 and said[0].startswith("Answer complete")
    assert page.get_attribute("#log", "role") == "log" and page.get_attribute("#log", "aria-busy") is None


def test_animations_rest_where_the_reader_asks_for_it(open_page, server):
    page = open_page(server, settings=LONG, reduced_motion="reduce")
    ask(page, "What is 8?", wait=False)
    page.wait_for_selector(".waiting img")
    assert page.evaluate("getComputedStyle(document.querySelector('.waiting img')).animationName") == "none"
    page.keyboard.press("Escape")
    page.wait_for_selector("text=Stopped")


def test_every_file_is_served_with_the_policy_that_forbids_the_rest(server):
    for path in ("/", "/static/app.js", "/static/style.css", "/static/logo.svg", "/static/inter.woff2"):
        with urllib.request.urlopen(server.url + path) as answer:
            policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(server.url + "/static/../server/app.py")
