// Questions and answers on the page. Old ones are made only when the reader goes up to them.
import { $, announce, button, copyFrom, h, icon } from "./dom.js";
import { LiveMarkdown, render } from "./markdown.js";
import { problemView } from "./problems.js";
import { checked, Sources } from "./sources.js";

const STEP = 30; // messages made at once
let serial = 0;

/** A question, and the form that it turns into when it is edited. `ways`: {edit(text)} */
export class QuestionView {
  constructor(message, ways) {
    this.message = message;
    this.ways = ways;
    this.element = h("article", { class: "message question" });
    this.show();
  }

  show() {
    const { content } = this.message;
    const actions = h("div", { class: "actions" }, button("edit", "Edit", () => this.edit(), { bare: true }),
      button("copy", "Copy the question", (event) => copyFrom(event.currentTarget, this.message.content), { bare: true }));
    this.element.replaceChildren(h("h2", { class: content.length > 160 ? "long" : null }, content), actions);
  }

  edit() {
    const field = h("textarea", { "aria-label": "Edit the question", rows: "1" });
    field.value = this.message.content;
    const cancel = () => {
      this.show();
      $("question").focus();
    };
    const submit = () => {
      if (field.value.trim()) this.ways.edit(this, field.value.trim());
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        submit();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      }
    });
    const later = this.element.nextElementSibling?.nextElementSibling;
    this.element.replaceChildren(h("div", { class: "edit" }, field, later && h("p", { class: "meta" }, "What comes after it is replaced."),
      h("div", { class: "edit-foot" }, button(null, "Cancel", cancel), button("send", "Ask", submit, { kind: "primary" }))));
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

const FINISH = { length: "Stopped at the longest length", cancelled: "Stopped", none: "No model was there to answer" };

/** An answer: its sources, its text as it comes, and what can be done with it. `ways`: {regenerate, continue} */
export class AnswerView {
  #sources = new Sources([]);
  #live = null;
  #frame = 0;

  constructor(message, question, ways) {
    this.message = message;
    this.question = question;
    this.found = [];
    this.updates = []; // milliseconds that the last streamed updates took
    this.ways = ways;
    this.onrender = () => {};
    this.element = h("article", { class: "message answer", "aria-label": "Answer" });
    this.cards = h("div", { class: "cards-place" });
    this.body = h("div", { class: "prose" });
    this.quoted = h("div", { class: "quoted-place" }); // what is said of its support, and a quotation
    this.foot = h("div", { class: "answer-foot" });
    this.element.append(this.cards, this.body, this.quoted, this.foot);
    if (message) this.show(message);
  }

  get #options() {
    return { cite: (number) => this.#sources.cite(number) };
  }

  sources(sources, options) {
    this.found = sources ?? [];
    this.#sources = new Sources(this.found, this.question, options);
    this.cards.replaceChildren(...(this.#sources.element ? [this.#sources.element] : []));
  }

  /** The whole message, as the server keeps it. */
  show(message) {
    this.message = message;
    this.#live?.end();
    this.#live = null;
    this.element.removeAttribute("aria-busy");
    // The cards stay as they are where the done message names the same sources: an open passage stays open.
    const key = (sources) => JSON.stringify((sources ?? []).map(({ number, id }) => [number, id]));
    const sources = message.sources ?? [];
    const unsupported = message.supported === false || message.finish === "none";
    if (unsupported) this.sources(sources, { found: message.finish === "none" ? "Found in the sources" : "Found, but the answer does not rest on them" });
    else if (key(this.found) !== key(sources)) this.sources(sources);
    this.body.replaceChildren(render(message.content, unsupported ? {} : this.#options));
    this.quoted.replaceChildren(...this.#quotation(message));
    // what helps comes first: where nothing supports the model's words, the sources' own stand above them
    this.body.before(this.quoted);
    this.foot.replaceChildren(...this.#footer(message));
  }

  /** What the sources say, where the answer rests on none: theirs, not the model's. */
  *#quotation(message) {
    if (message.supported === false) yield h("p", { class: "unsupported" }, icon("warn"), h("span", {}, message.settings?.passages === 0 && message.sources?.length
      ? "No source supports this answer: they did not fit into what the model can read" : "No source supports this answer"));
    if (!message.quotation) return;
    const written = message.content.trim() !== "";
    const id = `quoted-${serial += 1}`;
    yield h("section", { class: "quoted", "aria-labelledby": id },
      h("p", { class: "quoted-head" }, icon("quote"), h("span", { id }, "From the sources"), h("span", { class: "meta" }, message.finish === "none" ? "Quoted" : "Quoted, not the model’s words")),
      h("div", { class: "prose" }, render(message.quotation, this.#options)));
    if (written) yield h("p", { class: "meta own-words" }, "The model’s own words, which no source supports:");
  }

  *#footer(message) {
    if (message.finish === "none") {
      yield h("div", { class: "actions" }, h("span", { class: "meta" }, FINISH.none), button("again", "Answer it", () => this.ways.regenerate(this), { kind: "quiet small", "data-last": true }));
      return;
    }
    if (message.supported) {
      const means = h("p");
      yield h("details", { class: "checked", ontoggle: () => { means.textContent = checked.means; } }, h("summary", {}, icon("check"), h("span", {}, "Marks checked")), means);
    }
    const speed = message.tokens_per_second;
    yield h("div", { class: "actions" },
      button("copy", "Copy", (event) => copyFrom(event.currentTarget, this.message.content), { bare: true }),
      button("again", "Regenerate", () => this.ways.regenerate(this), { bare: true, "data-last": true }),
      ["length", "cancelled"].includes(message.finish) && button("forward", "Continue", () => this.ways.continue(this), { kind: "quiet small", "data-last": true }),
      h("span", { class: "meta" }, [FINISH[message.finish], message.content === "" && "Empty answer", speed && `${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`].filter(Boolean).join(" · ")));
  }

  /** Make ready for text that comes; `text` is what is already there. */
  begin(words, text = "") {
    this.element.setAttribute("aria-busy", "true");
    this.body.replaceChildren();
    this.quoted.replaceChildren();
    this.#live = new LiveMarkdown(this.body, this.#options);
    this.#live.onrender = () => this.onrender();
    this.updates = this.#live.updates;
    if (text) this.#live.append(text);
    this.foot.replaceChildren(h("p", { class: "waiting" }, h("img", { src: "static/logo.svg", alt: "", width: "18", height: "18" }), h("span", {}, words)));
  }

  waiting(words) {
    const place = this.foot.querySelector(".waiting span");
    if (place) place.textContent = words;
  }

  append(text) {
    this.#live.append(text);
  }

  get text() {
    return this.#live?.text ?? this.message?.content ?? "";
  }

  problem(problem, ways) {
    this.end();
    this.foot.replaceChildren(problemView(problem, ways));
    this.onrender();
  }

  /** Stopped before the server said how the message stands. */
  end() {
    const text = this.text;
    this.#live?.end();
    if (this.#live && text) this.body.replaceChildren(render(text, this.#options));
    this.#live = null;
    this.element.removeAttribute("aria-busy");
    this.foot.replaceChildren();
  }
}

/** The conversation: the newest messages first, older ones when the reader reaches the top. */
export class MessageList {
  #log = $("log");
  #scroller = $("scroller");
  #stick = true;
  #top = 0;
  #first = 0; // index of the oldest message that has been made
  #views = [];

  constructor(ways) {
    this.ways = ways;
    this.messages = [];
    this.earlier = button("again", "", () => this.#more(), { kind: "quiet earlier" });
    this.latest = $("latest");
    this.latest.append(icon("down"), h("span", {}, "Jump to the latest"));
    this.latest.addEventListener("click", () => this.toEnd(true));
    this.#scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting) && this.#first > 0) this.#more();
    }, { root: this.#scroller, rootMargin: "600px 0px 0px 0px" }).observe(this.earlier);
    new ResizeObserver(() => { if (this.#stick) this.toEnd(); }).observe(this.#scroller);
  }

  show(messages) {
    this.#log.setAttribute("aria-busy", "true"); // opening is not news: nothing of it is read out
    this.messages = [...messages];
    this.#first = Math.max(0, messages.length - STEP);
    this.#views = this.messages.map((message, i) => (i < this.#first ? null : this.#make(message, i)));
    this.#log.replaceChildren(this.earlier, ...this.#views.slice(this.#first).map((view) => view.element));
    this.#count();
    this.#loose();
    this.toEnd(true);
    requestAnimationFrame(() => {
      this.toEnd(true); // heights of what was outside the window are known now
      this.#log.removeAttribute("aria-busy");
    });
  }

  #make(message, i) {
    if (message.role === "user") return new QuestionView(message, this.ways);
    return new AnswerView(message, this.messages[i - 1]?.content ?? "", this.ways);
  }

  /** A question that was never answered offers to be. */
  #loose() {
    const last = this.messages.length - 1;
    if (last < 0 || this.messages[last].role !== "user" || this.ways.busy()) return;
    const view = this.#views[last];
    view.element.append(h("p", { class: "loose meta" }, "This question has no answer. ",
      button("again", "Answer it", () => this.ways.edit(view, view.message.content), { kind: "quiet small" })));
  }

  #count() {
    this.earlier.hidden = this.#first === 0;
    this.earlier.replaceChildren(h("span", {}, `${this.#first} earlier messages`));
  }

  #more() {
    const start = Math.max(0, this.#first - STEP);
    const made = [];
    for (let i = start; i < this.#first; i += 1) {
      this.#views[i] = this.#make(this.messages[i], i);
      made.push(this.#views[i].element);
    }
    const below = this.#scroller.scrollHeight - this.#scroller.scrollTop;
    this.#scroller.classList.add("no-anchor"); // we keep the place ourselves: not every browser does
    this.#log.setAttribute("aria-busy", "true");
    this.earlier.after(...made);
    this.#first = start;
    this.#count();
    this.#scroller.scrollTop = this.#scroller.scrollHeight - below;
    this.#top = this.#scroller.scrollTop;
    this.#scroller.classList.remove("no-anchor");
    requestAnimationFrame(() => this.#log.removeAttribute("aria-busy"));
  }

  /** While an answer is written nothing is read out; what changed is, once it is done. */
  busyLog(is) {
    if (is) this.#log.setAttribute("aria-busy", "true");
    else this.#log.removeAttribute("aria-busy");
  }

  /** Message `i` as the server now has it. */
  renew(i, message) {
    this.messages[i] = message;
    if (this.#views[i] instanceof QuestionView) {
      this.#views[i].message = message;
    }
  }

  index(view) {
    return this.#views.indexOf(view);
  }

  view(i) {
    return this.#views.at(i);
  }

  /** Drop message `start` and what comes after it. */
  truncate(start) {
    for (const view of this.#views.slice(start)) view?.element.remove();
    this.#views.length = Math.min(this.#views.length, start);
    this.messages.length = Math.min(this.messages.length, start);
    this.#first = Math.min(this.#first, start);
    this.#count();
    this.#log.querySelector(".loose")?.remove();
  }

  addQuestion(message) {
    const view = new QuestionView(message, this.ways);
    this.messages.push(message);
    this.#put(view);
    return view;
  }

  addAnswer(question) {
    const view = new AnswerView(null, question, this.ways);
    this.messages.push({ id: null, role: "assistant", content: "" });
    this.#put(view);
    return view;
  }

  #put(view) {
    this.#views.push(view);
    this.#log.append(view.element);
    this.toEnd(true);
  }

  /** The messages as the server has them; what is shown of them already stays as it is. */
  renewTail(messages) {
    const known = this.messages.findIndex((message, i) => message.id === null || message.id !== messages[i]?.id || message.finish !== messages[i].finish);
    const start = known < 0 ? this.messages.length : known;
    if (start === messages.length && start === this.messages.length) return;
    const stick = this.#stick;
    this.truncate(start);
    for (const message of messages.slice(start)) {
      this.messages.push(message);
      const view = this.#make(message, this.messages.length - 1);
      this.#views.push(view);
      this.#log.append(view.element);
    }
    this.#loose();
    if (stick) this.toEnd();
  }

  /** What stands before message `at`, as the server has it; what is at `at` and behind it stays. */
  precede(at, messages) {
    const [kept, views] = [this.messages.slice(at), this.#views.slice(at)];
    for (const view of this.#views.slice(0, at)) view?.element.remove();
    this.messages = [...messages, ...kept];
    this.#first = Math.max(0, messages.length - STEP);
    const made = messages.map((message, i) => (i < this.#first ? null : this.#make(message, i)));
    this.#views = [...made, ...views];
    this.earlier.after(...made.slice(this.#first).map((view) => view.element));
    this.#count();
    this.toEnd(true);
  }

  /** Whether a question is being edited in place. */
  get editing() {
    return this.#log.querySelector(".edit") !== null;
  }

  /** Whether every message shown is the server's: no answer has failed here. */
  get whole() {
    return this.messages.every((message) => message.id !== null);
  }

  /** Make every message, for printing. */
  all() {
    while (this.#first > 0) this.#more();
  }

  follow() {
    if (this.#stick) this.toEnd();
    else this.latest.hidden = false;
  }

  toEnd(force = false) {
    if (force) this.#stick = true;
    this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#top = this.#scroller.scrollTop;
    this.latest.hidden = true;
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.#scroller;
    const end = scrollHeight - scrollTop - clientHeight < 60;
    if (end) this.#stick = true;
    else if (scrollTop < this.#top - 2) this.#stick = false; // only the reader goes up
    this.#top = scrollTop;
    this.latest.hidden = end || this.#stick;
  }
}

export function announceAnswer(message) {
  const sources = message.sources?.length ?? 0;
  announce(`Answer complete${message.finish === "length" ? ", at its longest length" : ""}. ${sources === 0 ? "No sources" : sources === 1 ? "1 source" : `${sources} sources`}.${message.supported === false ? " No source supports it." : ""}`);
}
