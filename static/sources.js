// The numbered cards of the passages an answer was written from, and the chips in its text that open them.
import { button, h, icon } from "./dom.js";
import { link } from "./markdown.js";

let serial = 0;

/** What it means that a mark in an answer was checked, as the server says it. */
export const checked = { means: "" };

/** Where a passage comes from, short enough for a card: the host and page of an address, the end of a path. */
function place(url) {
  if (!url) return "";
  try {
    const { protocol, hostname, pathname } = new URL(url);
    if (protocol === "http:" || protocol === "https:") return `${hostname}${pathname.length > 1 ? ` › ${pathname.split("/").filter(Boolean).pop()}` : ""}`;
  } catch { /* a path */ }
  return url.replace(/^file:\/\//, "").split("/").slice(-2).join("/");
}

/** The passage with the question's longer words marked. */
function marked(text, question) {
  const words = [...new Set((question ?? "").toLowerCase().match(/[\p{L}\p{N}_]{4,}/gu) ?? [])].slice(0, 20);
  if (words.length === 0) return [text];
  const pattern = new RegExp(`(${words.join("|")})`, "giu"); // letters, digits, underscores: nothing to escape
  return text.split(pattern).map((part, i) => (i % 2 ? h("mark", {}, part) : part));
}

export class Sources {
  #sources;
  #question;
  #cards = new Map();
  #passage;
  #open = null;
  #opener = null;

  /** `found`: what is said above passages that the answer does not cite. */
  constructor(sources, question, { found = null } = {}) {
    this.#sources = sources;
    this.#question = question;
    const id = `passage-${serial += 1}`;
    this.#passage = h("div", { class: "passage", id, role: "region", tabindex: "-1", hidden: true });
    const cards = sources.map((source) => {
      const card = h("button", { type: "button", class: "card", "aria-expanded": "false", "aria-controls": id, onclick: () => this.toggle(source.number, card) },
        h("span", { class: "card-number" }, String(source.number)),
        h("span", { class: "card-words" }, h("span", { class: "card-title" }, source.title || place(source.url) || `Source ${source.number}`),
          h("span", { class: "card-place" }, place(source.url))));
      this.#cards.set(source.number, card);
      return h("li", {}, card);
    });
    this.element = sources.length === 0 ? null : h("section", { class: "sources", "aria-label": found === null ? "Sources" : "Passages found" },
      found !== null && h("p", { class: "meta uncited" }, found), h("ol", { class: "cards" }, cards), this.#passage);
  }

  get length() {
    return this.#sources.length;
  }

  toggle(number, opener) {
    if (this.#open === number) this.#close();
    else this.#show(number, opener);
  }

  #show(number, opener) {
    const source = this.#sources.find((each) => each.number === number);
    for (const [each, card] of this.#cards) card.setAttribute("aria-expanded", String(each === number));
    this.#open = number;
    this.#opener = opener;
    const address = link(source.url, icon("out"), h("span", {}, place(source.url)));
    this.#passage.setAttribute("aria-label", `Passage ${number}: ${source.title}`);
    this.#passage.replaceChildren(
      h("div", { class: "passage-head" }, h("span", { class: "card-number" }, String(number)), h("h3", {}, source.title || `Source ${number}`),
        button("close", "Close the passage", () => this.#close(), { bare: true })),
      h("p", { class: "passage-text" }, marked(source.text ?? "", this.#question)),
      address ? h("p", { class: "passage-place" }, address) : source.url ? h("p", { class: "passage-place" }, icon("file"), h("span", {}, source.url)) : "");
    this.#passage.hidden = false;
    if (opener !== this.#cards.get(number)) this.#passage.focus({ preventScroll: true });
    this.#passage.scrollIntoView({ block: "nearest" });
  }

  #close() {
    for (const card of this.#cards.values()) card.setAttribute("aria-expanded", "false");
    this.#open = null;
    this.#passage.hidden = true;
    const opener = this.#opener?.isConnected ? this.#opener : null;
    opener?.focus({ preventScroll: true });
    opener?.scrollIntoView({ block: "nearest" });
  }

  /** The chip of mark `[number]`, or null where there is no such source. */
  cite(number) {
    const source = this.#sources.find((each) => each.number === number);
    if (!source) return null;
    const chip = h("button", { type: "button", class: "cite", "aria-label": `Source ${number}: ${source.title}`, title: source.title,
      onclick: () => this.toggle(number, chip) }, String(number));
    return chip;
  }
}
