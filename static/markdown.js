// Markdown as models write it, into DOM nodes. Text goes in as text and nothing is ever parsed as HTML,
// so a tag in an answer is shown, not obeyed. What is not finished yet (a fence, a table) is shown as far as it goes.
import { button, copyFrom, h } from "./dom.js";
import { highlight } from "./highlight.js";

const DEPTH = 8; // lists in quotes in lists ...; deeper ones stay text
const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const ITEM = /^(\s{0,12})([-*+•]|\d{1,9}[.)])\s+(.*)$/;
const TABLE = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

/** `cite(number)` gives the chip of a source's mark, or null where no source has that number. */
export function render(text, { cite = () => null, live = false } = {}) {
  const fragment = document.createDocumentFragment();
  blocks(text.replaceAll("\r\n", "\n").split("\n"), fragment, { cite, live, depth: 0 });
  return fragment;
}

function blocks(lines, parent, context) {
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) parent.append(inline(h("p"), paragraph.join("\n"), context));
    paragraph = [];
  };
  for (let i = 0; i < lines.length; i += 1) {
    const line = lines[i];
    const fence = FENCE.exec(line);
    if (fence) {
      flush();
      const closes = new RegExp(`^ {0,3}${fence[2][0]}{${fence[2].length},}\\s*$`);
      let end = i + 1;
      while (end < lines.length && !closes.test(lines[end])) end += 1;
      const indent = new RegExp(`^ {0,${fence[1].length}}`);
      parent.append(code(lines.slice(i + 1, end).map((each) => each.replace(indent, "")).join("\n"), fence[3], context.live && end === lines.length));
      i = end;
      continue;
    }
    if (line.trim() === "") {
      flush();
      continue;
    }
    const heading = HEADING.exec(line);
    if (heading) {
      flush();
      parent.append(inline(h(`h${Math.min(6, heading[1].length + 2)}`), heading[2], context)); // h1: the page, h2: the question
      continue;
    }
    if (RULE.test(line)) {
      flush();
      parent.append(h("hr"));
      continue;
    }
    if (/^ {0,3}>/.test(line) && context.depth < DEPTH) {
      flush();
      let end = i;
      while (end < lines.length && /^ {0,3}>/.test(lines[end])) end += 1;
      const quote = h("blockquote");
      blocks(lines.slice(i, end).map((each) => each.replace(/^ {0,3}> ?/, "")), quote, { ...context, depth: context.depth + 1 });
      parent.append(quote);
      i = end - 1;
      continue;
    }
    const item = ITEM.exec(line);
    if (item && context.depth < DEPTH && (paragraph.length === 0 || !/^\d/.test(item[2]) || /^1[.)]$/.test(item[2]))) {
      flush();
      i = list(lines, i, parent, context) - 1;
      continue;
    }
    if (line.includes("|") && i + 1 < lines.length && lines[i + 1].includes("-") && TABLE.test(lines[i + 1]) && cells(line).length === cells(lines[i + 1]).length) {
      flush();
      let end = i + 2;
      while (end < lines.length && lines[end].includes("|") && lines[end].trim() !== "") end += 1;
      parent.append(table(lines.slice(i, end), context));
      i = end - 1;
      continue;
    }
    paragraph.push(line);
  }
  flush();
}

/** The list that begins at line `start`; gives the line after it. */
function list(lines, start, parent, context) {
  const first = ITEM.exec(lines[start]);
  const ordered = /^\d/.test(first[2]);
  const root = h(ordered ? "ol" : "ul", ordered && Number.parseInt(first[2], 10) !== 1 ? { start: Number.parseInt(first[2], 10) } : {});
  let i = start;
  while (i < lines.length) {
    const item = ITEM.exec(lines[i]);
    if (!item || item[1].length > first[1].length + 1 || item[1].length < first[1].length || /^\d/.test(item[2]) !== ordered) break;
    const inset = item[1].length + 2; // what belongs to an item is at least this deep
    const body = [item[3]];
    for (i += 1; i < lines.length; i += 1) {
      const blank = lines[i].trim() === "";
      const deep = lines[i].startsWith(" ".repeat(inset));
      const nextDeep = blank && i + 1 < lines.length && lines[i + 1].startsWith(" ".repeat(inset)) && lines[i + 1].trim() !== "";
      if (!deep && !nextDeep && (blank || ITEM.test(lines[i]) || FENCE.test(lines[i]) || HEADING.test(lines[i]) || RULE.test(lines[i]) || /^ {0,3}>/.test(lines[i]))) break;
      body.push(lines[i].replace(new RegExp(`^ {0,${item[1].length + item[2].length + 1}}`), ""));
    }
    const task = /^\[([ xX])\]\s+/.exec(body[0]);
    if (task) body[0] = body[0].slice(task[0].length);
    const element = h("li", task ? { class: "task" } : {});
    const holder = document.createDocumentFragment();
    blocks(body, holder, { ...context, depth: context.depth + 1 });
    const [only] = holder.childNodes; // a tight item has no paragraph of its own
    if (only?.nodeName === "P") only.replaceWith(...only.childNodes);
    if (task) element.append(h("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": task[1] === " " ? "To do" : "Done" }));
    element.append(holder);
    root.append(element);
    if (i < lines.length && lines[i].trim() === "" && i + 1 < lines.length) {
      const next = ITEM.exec(lines[i + 1]);
      if (next && next[1].length === first[1].length && /^\d/.test(next[2]) === ordered) i += 1;
    }
  }
  parent.append(root);
  return i;
}

/** The cells of a table's row; a bar after a backslash is a bar. */
function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(lines, context) {
  const align = cells(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null));
  const row = (line, tag) => h("tr", {}, cells(line).slice(0, align.length).map((cell, i) =>
    inline(h(tag, { class: align[i], ...(tag === "th" ? { scope: "col" } : {}) }), cell, context)));
  return h("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
    h("table", {}, h("thead", {}, row(lines[0], "th")), h("tbody", {}, lines.slice(2).map((line) => row(line, "td")))));
}

/** A block of code with its language and a button that copies it. Colours wait until the fence is closed. */
function code(text, language, open) {
  const body = h("code");
  if (open) body.append(text);
  else body.append(highlight(text, language));
  const control = button("copy", "Copy code", () => copyFrom(control, body.textContent), { kind: "quiet small" });
  return h("div", { class: "code" }, h("div", { class: "code-head" }, h("span", {}, language || "text"), control),
    h("pre", { tabindex: "0", role: "region", "aria-label": `Code${language ? `, ${language}` : ""}`, ...(open ? { "data-open": true } : {}) }, body));
}

/** Only addresses that a reader can mean to follow; everything else stays text. */
function safe(address) {
  try {
    const url = new URL(address);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

export function link(address, ...children) {
  const href = safe(address);
  return href === null ? null : h("a", { href, rel: "noopener noreferrer", target: "_blank" }, children);
}

const SPECIAL = /[\\`*_~[!<\nh$]/g;
// Formulas stay as they were written, whatever marks they hold: \( \), $$ $$, $ $ that is no price, and on lines of their
// own \[ \] with something of a formula in it, for elsewhere \[ is a bracket that begins no link.
const MATH = /^(?:\\\((?:[^\\]|\\(?!\)))+\\\)|\$\$[^$]+\$\$|\$(?![\s\d.,]+\$)[^\s$](?:[^$\n]{0,400}[^\s$])?\$(?!\d))/;
const DISPLAY = /^\\\[(?=[^\]]*(?:\\[a-zA-Z]|[\^_=]))(?:[^\\]|\\(?!\]))+\\\](?=[ \t]*(?:\n|$))/;

/** `text` with its marks, appended to `parent`, which is returned. */
function inline(parent, text, context, depth = 0) {
  let marked = -1; // where the last source's mark ended
  const missing = new Set(); // closers that are known not to come: each is looked for once
  let plain = "";
  const flush = () => {
    if (plain) parent.append(plain);
    plain = "";
  };
  const put = (node) => {
    flush();
    parent.append(node);
  };
  let at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text);
    if (next === null) break;
    plain += text.slice(at, next.index);
    at = next.index;
    const end = mark(at);
    if (end > at) at = end;
    else {
      plain += text[at];
      at += 1;
    }
  }
  plain += text.slice(at);
  flush();
  return parent;

  /** Append what begins at `i` and give its end, or give `i` where nothing does. */
  function mark(i) {
    const character = text[i];
    if (character === "\n") {
      put(h("br"));
      return i + 1;
    }
    if (character === "$" || (character === "\\" && (text[i + 1] === "(" || text[i + 1] === "["))) {
      const before = text[i - 1] ?? "\n";
      const match = !/\w/.test(before) && (MATH.exec(text.slice(i, i + 4000)) ?? (before === "\n" && DISPLAY.exec(text.slice(i, i + 4000))));
      if (match) {
        put(h("span", { class: "math" }, match[0]));
        return i + match[0].length;
      }
      if (character === "$") return i;
    }
    if (character === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      return i + 2;
    }
    if (character === "`") {
      const ticks = /^`+/.exec(text.slice(i, i + 16))[0];
      const close = find(ticks, i + ticks.length);
      if (close < 0) {
        plain += ticks;
        return i + ticks.length;
      }
      put(h("code", {}, text.slice(i + ticks.length, close).replace(/^ (.+) $/, "$1")));
      return close + ticks.length;
    }
    if (character === "*" || character === "_" || character === "~") return emphasis(i, character);
    if (character === "!" && text[i + 1] === "[") { // a picture from elsewhere is not fetched: its words become a link
      const end = bracket(i + 1);
      return end > i + 1 ? end : i;
    }
    if (character === "[") return bracket(i);
    if (character === "<") {
      const match = /^<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/.exec(text.slice(i, i + 2100));
      const node = match && link(match[1], match[1]);
      if (!node) return i;
      put(node);
      return i + match[0].length;
    }
    if (character === "h" && text.startsWith("http", i) && !/\w/.test(text[i - 1] ?? "")) {
      const match = /^https?:\/\/[^\s<>"`]{1,2000}/.exec(text.slice(i, i + 2100));
      if (!match) return i;
      const address = match[0].replace(/[.,;:!?'"*_)\]]+$/, (tail) => (tail.startsWith(")") && match[0].includes("(") ? ")" : ""));
      const node = link(address, address);
      if (!node) return i;
      put(node);
      return i + address.length;
    }
    return i;
  }

  function find(closer, from) {
    if (missing.has(closer)) return -1;
    const close = text.indexOf(closer, from);
    if (close < 0) missing.add(closer);
    return close;
  }

  function emphasis(i, character) {
    let run = 1;
    while (text[i + run] === character) run += 1;
    const size = Math.min(run, 2);
    const skip = () => {
      plain += text.slice(i, i + run);
      return i + run;
    };
    if (run > 3 || depth >= DEPTH || (character === "~" && run !== 2)) return skip();
    if (/\s/.test(text[i + run] ?? " ") || (character === "_" && /\w/.test(text[i - 1] ?? ""))) return skip();
    const closer = character.repeat(size);
    let close = find(closer, i + size);
    for (let tries = 0; close >= 0 && tries < 40; tries += 1) {
      const before = text[close - 1];
      const after = text[close + size] ?? "";
      const alone = size === 2 || (before !== character && after !== character);
      if (close > i + size && !/\s/.test(before) && alone && !(character === "_" && /\w/.test(after))) break;
      close = tries === 39 ? -1 : find(closer, close + (alone ? 1 : 2));
    }
    if (close < 0) return skip();
    while (size === 2 && text[close + 2] === character) close += 1; // ***x***: the outer two close last
    const node = h(character === "~" ? "del" : size === 2 ? "strong" : "em");
    put(inline(node, text.slice(i + size, close), context, depth + 1));
    return close + size;
  }

  /** `[words](address)`, or `[3]`, the mark of a source. As the server reads them (tryplicity/search/citations.py), a
   * mark stands by itself: not directly after a letter, digit, `_` or `)`, nor after a `]` that ends no mark, nor after
   * `=`; neither `list[0]` nor `x = [1]` is one. A link behind a mark is taken with it. */
  function bracket(i) {
    const cited = /^\[([0-9]{1,6})\](?:\([^()\s]*\))?/.exec(text.slice(i, i + 2000));
    const alone = marked === i || !(/[\p{L}\p{N}_)\]]$/u.test(text.slice(Math.max(0, i - 2), i)) || /=[ \t]*$/.test(text.slice(Math.max(0, i - 40), i)));
    const chip = cited && alone ? context.cite(Number(cited[1])) : null;
    if (cited && alone) marked = i + cited[0].length;
    if (chip) {
      if (plain.endsWith(" ")) plain = `${plain.slice(0, -1)}\u00a0`; // the chip stays with its sentence
      put(chip);
      return i + cited[0].length;
    }
    const match = /^\[([^\]\n]{1,500})\]\(\s*<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:\s+["'][^"'\n]{0,200}["'])?\s*\)/.exec(text.slice(i, i + 3000));
    if (!match || depth >= DEPTH) return i;
    const node = link(match[2]);
    if (node) put(inline(node, match[1], { ...context, cite: () => null }, DEPTH));
    else put(inline(h("span"), match[1], context, depth + 1)); // words whose address is not one to follow
    return i + match[0].length;
  }
}

/** An answer that grows. What is settled is rendered once; each frame renders only the block that is still open. */
export class LiveMarkdown {
  #element;
  #options;
  #text = "";
  #settled = 0; // characters rendered for good
  #tail = [];
  #frame = 0;

  constructor(element, options = {}) {
    this.#element = element;
    this.#options = { ...options, live: true };
    this.onrender = () => {};
    this.updates = []; // milliseconds each frame took, the last 500
  }

  get text() {
    return this.#text;
  }

  append(text) {
    this.#text += text;
    this.#frame ||= requestAnimationFrame(() => this.#update());
  }

  #update() {
    this.#frame = 0;
    const start = performance.now();
    const text = this.#text;
    const border = lastBorder(text, this.#settled);
    if (border === this.#settled && this.#growCode(text)) {
      this.#measure(start);
      return;
    }
    for (const node of this.#tail) node.remove();
    if (border > this.#settled) this.#element.append(render(text.slice(this.#settled, border), this.#options));
    this.#settled = border;
    const fragment = render(text.slice(border), this.#options);
    this.#tail = [...fragment.childNodes];
    this.#element.append(fragment);
    this.#measure(start);
  }

  #measure(start) {
    this.onrender();
    this.updates.push(performance.now() - start);
    if (this.updates.length > 500) this.updates.shift();
  }

  /** Open code only gets its new characters: no node is made anew, so a selection in it stays. */
  #growCode(text) {
    const open = this.#tail.length === 1 ? this.#tail[0].querySelector?.("pre[data-open] > code") : null;
    const tail = text.slice(this.#settled);
    const named = this.#tail[0]?.querySelector?.(".code-head > span")?.textContent === (FENCE.exec(tail.slice(0, tail.indexOf("\n")))?.[3] || "text");
    if (!open || !named || open.childNodes.length !== 1 || !/^(?:`{3,}|~{3,})[^\n]*\n/.test(tail) || /\n {0,3}(?:`{3,}|~{3,})\s*(?:\n|$)/.test(tail)) return false;
    const code = tail.slice(tail.indexOf("\n") + 1);
    if (/\n[ `~]*$/.test(code) && /[`~]$/.test(code)) return true; // perhaps the closing fence: wait
    const node = open.firstChild;
    if (code.startsWith(node.data)) node.appendData(code.slice(node.data.length));
    else node.data = code;
    return true;
  }

  /** Nothing more comes. */
  end() {
    if (this.#frame) cancelAnimationFrame(this.#frame);
    this.#frame = 0;
  }
}

/** The last blank line after `from` where a block surely ended: outside a fence, and what follows is not its continuation. */
function lastBorder(text, from) {
  let border = from;
  let fence = null;
  let at = from;
  let blank = false;
  while (at < text.length) {
    let end = text.indexOf("\n", at);
    if (end < 0) end = text.length;
    const line = text.slice(at, end);
    const mark = /^ {0,3}(`{3,}|~{3,})/.exec(line);
    if (blank && fence === null && /^\S/.test(line) && !ITEM.test(line) && !/^\d{0,9}[.)]?$|^[-*+•]$/.test(line)) border = at;
    if (mark && fence === null) fence = mark[1];
    else if (mark && mark[1].startsWith(fence) && line.trim() === mark[1]) fence = null;
    blank = line.trim() === "";
    at = end + 1;
  }
  return border;
}
