"""The page's own renderers, each called in the browser: Markdown, code, server-sent events."""

import json

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(browser, bare):
    """One page for all: nothing here changes it."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(bare.url)
    page.wait_for_selector("html[data-ready]", state="attached")
    yield page
    context.close()


def html(page, text, live=False):
    return page.evaluate("""async ([text, live]) => {
        const { render } = await import('/static/markdown.js');
        const place = document.createElement('div');
        const cite = (n) => {
            if (n > 2) return null;
            const chip = document.createElement('b');
            chip.textContent = n;
            return chip;
        };
        place.append(render(text, { cite, live }));
        for (const e of place.querySelectorAll('.code')) e.replaceWith(e.querySelector('pre'));
        for (const e of place.querySelectorAll('.table')) e.replaceWith(e.firstChild);
        for (const e of place.querySelectorAll('pre')) for (const a of [...e.attributes]) e.removeAttribute(a.name);
        return place.innerHTML.replaceAll(' rel="noopener noreferrer" target="_blank"', '');
    }""", [text, live])


# What CommonMark (https://spec.commonmark.org/0.31.2/) and GitHub's tables say, except that a line break is a break,
# headings begin at the third level, and markup is text.
@pytest.mark.parametrize(("text", "expected"), [
    ("a *b* **c** ***d*** ~~e~~ `f *g*`", "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong> <del>e</del> "
     "<code>f *g*</code></p>"),
    ("snake_case_name and 2 * 3 * 4 and _x_", "<p>snake_case_name and 2 * 3 * 4 and <em>x</em></p>"),
    ("**not closed and *neither", "<p>**not closed and *neither</p>"),
    ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    ("# A\n###### B #\n#no", "<h3>A</h3><h6>B</h6><p>#no</p>"),
    ("- a\n- b\n  - c\n\n    d\n- e", "<ul><li>a</li><li>b<ul><li>c<p>d</p></li></ul></li><li>e</li></ul>"),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("The year\n1984. was", "<p>The year<br>1984. was</p>"),
    ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
    ("|a|b|\n|:-:|--:|\n|1\\|2|`3`|", '<table><thead><tr><th class="center" scope="col">a</th><th class="right" '
     'scope="col">b</th></tr></thead><tbody><tr><td class="center">1|2</td><td class="right"><code>3</code></td></tr>'
     "</tbody></table>"),
    ("a | b\nno table", "<p>a | b<br>no table</p>"),
    ("---", "<hr>"),
    ("~~~\n```\n<b>\n~~~", "<pre><code>```\n&lt;b&gt;</code></pre>"),
    ("```\nnever closed", "<pre><code>never closed</code></pre>"),
    ("[a](https://x.org/b_(c)) [m](mailto:a@b.c)", '<p><a href="https://x.org/b_(c)">a</a> '
     '<a href="mailto:a@b.c">m</a></p>'),
    ("[a](javascript:alert(1)) [b](//x.org) [c](ftp://x)", "<p><span>a</span> <span>b</span> <span>c</span></p>"),
    ("[a]( JaVaScRiPt:alert(1)) [b](java\tscript:x)", "<p><span>a</span> [b](java\tscript:x)</p>"),
    ("see https://x.org/a). And <https://y.org>", '<p>see <a href="https://x.org/a">https://x.org/a</a>). And '
     '<a href="https://y.org/">https://y.org</a></p>'),
    ("![i](https://x.org/i.png)", '<p><a href="https://x.org/i.png">i</a></p>'),
    ("a [1], b[1] [3] `[2]` [2][1]", "<p>a\u00a0<b>1</b>, b[1] [3] <code>[2]</code>\u00a0<b>2</b><b>1</b></p>"),
    ("\\*a\\* \\[1\\] c:\\dir", "<p>*a* [1] c:\\dir</p>"),
    ("<b>a</b> &amp; <!-- c -->", "<p>&lt;b&gt;a&lt;/b&gt; &amp;amp; &lt;!-- c --&gt;</p>"),
    ("", ""),
])
def test_markdown(page, text, expected):
    assert html(page, text).replace("&nbsp;", "\u00a0") == expected


DOCUMENT = """Intro with `code` and **bold** [1].

1. one
2. two
   - deep

```python
def f(x):
    # comment ```
    return x  # ``

class A: pass
```

| a | b |
|---|--:|
| 1 | 2 |

> quote
> more

Last *line* https://x.org/a?b=c."""


def test_text_that_comes_letter_by_letter_ends_as_the_whole_text(page):
    """After each frame the growing answer shows what rendering its text so far at once shows."""
    different = page.evaluate("""async (text) => {
        const { LiveMarkdown, render } = await import('/static/markdown.js');
        const place = document.createElement('div'), whole = document.createElement('div');
        const live = new LiveMarkdown(place);
        const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
        const shown = (e) => [...e.children].map((c) => c.nodeName + ':' + c.textContent.trim()).join('|');
        const different = [];
        for (let i = 0; i < text.length; i += 1) {
            live.append(text[i]);
            if (i % 3 && i < text.length - 1) continue;
            await frame(); await frame();
            whole.replaceChildren(render(text.slice(0, i + 1), { live: true }));
            const waiting = /\\n[ `~]*$/.test(text.slice(0, i + 1)); // a fence that may be closing is held back
            if (shown(place) !== shown(whole) && !waiting)
                different.push([text.slice(0, i + 1), shown(place), shown(whole)]);
        }
        return different;
    }""", DOCUMENT)
    assert different == []


def test_code_that_grows_keeps_its_element(page):
    same = page.evaluate("""async () => {
        const { LiveMarkdown } = await import('/static/markdown.js');
        const place = document.createElement('div'), live = new LiveMarkdown(place);
        const frame = () => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
        live.append('```python\\nx = 1'); await frame();
        const before = place.querySelector('code');
        live.append('\\ny = 2'); await frame();
        const during = place.querySelector('code') === before;
        live.append('\\n```\\n'); await frame();
        const numbers = place.querySelectorAll('.t-number').length;
        return [during, before.isConnected, place.querySelector('code').textContent, numbers];
    }""")
    assert same == [True, False, "x = 1\ny = 2", 2]


MARKS = ["One [1]. Two [2][1] and [3].", "Take list[0] or x[1][2], and f(x)[1].", "é[1] 語[2] _[1] 9[2] ²[1] -[2]",
         "x = [1], y =[2] z==\t[1] a. [2]", "[x][1] [9][1] [1](http://x)[2] [7](http://x)[1]",
         "`a [1]` and ``b ` [2]`` [3]",
         "(see)[1] (see) [1] [[2]] [1]]", "*[1]* **bold** [2] [1].[2],[3]", "[1000000] [999999] [0] [१] [ 1 ] [1 ]",
         "a\n[1]\nb =\n[2]", "```\n[1]\n```\n[2]", "~~~\n[1]"]


@pytest.mark.parametrize("text", MARKS)
def test_a_mark_is_one_where_the_server_says_so(page, text):
    from tryplicity.search.citations import _marks, _pieces

    expected = [str(int(mark[1])) for kind, piece in _pieces(text) if kind == "sentence" for mark in _marks(piece)]
    assert page.evaluate("""async (text) => {
        const { render } = await import('/static/markdown.js');
        const place = document.createElement('div');
        place.append(render(text, { cite: (n) => {
            const chip = document.createElement('b');
            chip.className = 'chip';
            chip.textContent = n;
            return chip;
        } }));
        return [...place.querySelectorAll('.chip')].map((each) => each.textContent);
    }""", text) == expected


@pytest.mark.parametrize("text", [
    "*" * 20000, "[" * 20000, "> " * 5000, "`" * 20001, "- " * 8000, "_a " * 8000, "<" * 20000, "**a " * 6000,
    "|" * 9000 + "\n" + "|-" * 9000, "[a](" * 6000, "http" * 6000, "\n\n" * 9000])
def test_no_text_keeps_the_page_busy(page, text):
    """Pathological inputs end, and quickly: a renderer that backtracks would need minutes."""
    length = page.evaluate(
        "async (text) => (await import('/static/markdown.js')).render(text).textContent.length", text)
    assert length <= len(text)


@pytest.mark.parametrize(("language", "code", "tokens"), [
    ("python", "def f(): # c\n    return '#' + \"\"\"d\ne\"\"\"", [
        ["keyword", "def"], ["call", "f"], ["comment", "# c"], ["keyword", "return"],
        ["string", "'#'"], ["string", '"""d\ne"""']]),
    ("py", ">>> x = 0x1F", [["prompt", ">>>"], ["number", "0x1F"]]),
    ("js", "const a = `b${c}`; // d", [["keyword", "const"], ["string", "`b${c}`"], ["comment", "// d"]]),
    ("json", '{"a": [1, true, "b"]}', [["call", '"a"'], ["number", "1"], ["constant", "true"], ["string", '"b"']]),
    ("bash", "$ ls --all $HOME # c", [["prompt", "$"], ["number", "--all"], ["constant", "$HOME"], ["comment", "# c"]]),
    ("yaml", "a: 1 # c\nb: &x true", [["call", "a"], ["number", "1"], ["comment", "# c"], ["call", "b"],
                                      ["keyword", "&x"], ["constant", "true"]]),
    ("constructor", "def", []), ("", "def", []), ("fortran", "def", []),
])
def test_highlighting(page, language, code, tokens):
    got = page.evaluate("""async ([code, language]) => {
        const { highlight } = await import('/static/highlight.js');
        const fragment = highlight(code, language);
        const spans = [...fragment.querySelectorAll('span')];
        return [fragment.textContent, spans.map((s) => [s.className.slice(2), s.textContent])];
    }""", [code, language])
    assert got == [code, tokens]


def test_events_are_the_same_wherever_the_network_cuts_them(page):
    events = [{"type": "text", "text": "a\nb: c"}, {"type": "text", "text": "ü€𝄞"}, {"type": "done"}]
    lines = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\r\n\r\n" for event in events)
    stream = f": ping\n\n{lines}data: [DONE]\n\n"
    wrong = page.evaluate("""async (stream) => {
        const { EventParser } = await import('/static/api.js');
        const bytes = new TextEncoder().encode(stream);
        const read = (cuts) => {
            const decoder = new TextDecoder(), parser = new EventParser(), all = [];
            let at = 0;
            for (const cut of [...cuts, bytes.length]) {
                all.push(...parser.feed(decoder.decode(bytes.slice(at, cut), { stream: true })));
                at = cut;
            }
            return JSON.stringify(all);
        };
        const whole = read([]), wrong = [];
        for (let i = 1; i < bytes.length; i += 1) if (read([i]) !== whole) wrong.push(i);
        if (read([...bytes.keys()].slice(1)) !== whole) wrong.push('each byte');
        return [JSON.parse(whole), wrong];
    }""", stream)
    got, cuts = wrong
    assert [json.loads(each) for each in got[:-1]] == events and got[-1] == "[DONE]" and cuts == []
