// The conversation that is open: asking, stopping, regenerating, editing, continuing.
import { api, Problem } from "./api.js";
import { AnswerView, MessageList, announceAnswer } from "./messages.js";
import { announce } from "./dom.js";
import { change, sampling, settings } from "./settings.js";

export class Chat {
  #controller = null;
  #opening = null;

  /** `hooks`: {busy(is), opened(conversation | null), changed(), overtaken(), editQuestion(text), openSettings(), fresh(), complete()} */
  constructor(hooks) {
    this.hooks = hooks;
    this.id = null;
    this.title = "";
    this.list = new MessageList({
      busy: () => this.busy,
      edit: (view, text) => this.#edit(view, text),
      regenerate: (view) => this.#regenerate(view),
      continue: (view) => this.#continue(view),
    });
  }

  get busy() {
    return this.#controller !== null;
  }

  get empty() {
    return this.id === null && this.list.messages.length === 0;
  }

  /** A new conversation; the server hears of it with the first question. */
  fresh() {
    this.#leave();
    this.id = null;
    this.title = "";
    this.list.show([]);
    this.hooks.opened(null);
  }

  async open(id) {
    this.#leave();
    this.id = id;
    const opening = this.#opening = new AbortController();
    try {
      const conversation = await api.read(id, opening.signal);
      if (opening.signal.aborted) return;
      this.title = conversation.title;
      this.list.show(conversation.messages);
      this.hooks.opened(conversation);
    } catch (error) {
      if (error.name === "AbortError" || opening.signal.aborted) return;
      this.list.show([]);
      this.title = "";
      this.hooks.opened({ id, title: "", messages: [] });
      this.list.addAnswer("").problem(error, { retry: () => this.open(id), fresh: this.hooks.fresh });
    }
  }

  #leave() {
    this.#opening?.abort();
    if (!this.busy) return;
    this.#controller.abort(); // the server keeps what it had written
    this.#controller = null;
    this.hooks.busy(false);
    this.list.busyLog(false);
  }

  /** A question at the end, whatever another tab has added meanwhile. */
  async ask(content) {
    if (this.busy) return;
    const at = this.list.messages.length;
    this.list.addQuestion({ id: null, role: "user", content });
    const view = this.list.addAnswer(content);
    await this.#run(view, at, { content }, content);
  }

  /** A question in place of message `at`: it and later messages are dropped, if nobody has gone on meanwhile. */
  async #replace(at, content) {
    if (this.busy) return;
    const after = this.list.messages[at - 1]?.id ?? null;
    const last = this.#last;
    this.list.truncate(at);
    this.list.addQuestion({ id: null, role: "user", content });
    const view = this.list.addAnswer(content);
    await this.#run(view, at, { content, after, last }, content);
  }

  /** What the server must still have as its last message. */
  get #last() {
    return this.list.messages.findLast((message) => message.id !== null)?.id ?? null;
  }

  #edit(view, text) {
    this.#replace(this.list.index(view), text);
  }

  async #regenerate(view) {
    if (this.busy) return;
    const at = this.list.index(view);
    const { id } = view.message;
    const { question } = view;
    const last = this.#last;
    this.list.truncate(at);
    const again = this.list.addAnswer(question);
    await this.#run(again, at - 1, { regenerate: id, last }, question);
  }

  async #continue(view) {
    if (this.busy) return;
    await this.#run(view, this.list.index(view) - 1, { continue: view.message.id }, view.question, view.message.content);
  }

  /** After a failure: what came of the question on the server decides what is asked again. */
  async #again(content) {
    if (this.id === null) {
      this.list.truncate(0);
      return this.ask(content);
    }
    if (!await this.#sync()) return;
    const { messages } = this.list;
    const last = messages.length - 1;
    if (messages[last]?.role === "user" && messages[last].content === content) return this.#replace(last, content);
    if (messages[last]?.role === "assistant" && messages[last - 1]?.content === content) return this.#regenerate(this.list.view(last));
    return this.ask(content);
  }

  /** Ask, and show what comes. `at`: where the question stands; `content`: what it says; `text`: of an answer gone on with. */
  async #run(view, at, body, content, text = "") {
    const controller = this.#controller = new AbortController();
    const current = () => this.#controller === controller;
    const retry = () => this.#again(content);
    const tell = (problem) => {
      view.problem(problem, { retry, edit: body.content === undefined ? null : () => this.hooks.editQuestion(body.content),
        settings: this.hooks.openSettings, fresh: this.hooks.fresh, complete: this.hooks.complete,
        plain: () => {
          change({ search: false });
          retry();
        } });
      announce("The answer failed.");
    };
    this.hooks.busy(true);
    this.list.busyLog(true);
    view.onrender = () => this.list.follow();
    view.begin(settings.search && !text ? "Searching the sources" : "Reading", text);
    let done = false;
    try {
      if (this.id === null) {
        const { id, title } = await api.create();
        if (!current()) return;
        this.id = id;
        this.title = title;
        this.hooks.opened({ id, title }, true);
      }
      for await (const event of api.ask(this.id, { ...body, search: settings.search, sampling: sampling() }, controller.signal)) {
        if (!current()) return;
        if (event.type === "question") await this.#asked(view, at, event);
        else if (event.type === "sources") {
          view.sources(event.sources);
          view.waiting("Reading");
          this.list.follow();
        } else if (event.type === "text") {
          view.waiting("Writing");
          view.append(event.text);
        } else if (event.type === "done") {
          done = true;
          this.list.renew(this.list.index(view), event.message);
          view.show(event.message);
          this.list.follow();
          announceAnswer(event.message);
        } else if (event.type === "error") {
          if (event.message) { // what was found is kept, though nothing answers
            this.list.renew(this.list.index(view), event.message);
            view.show(event.message);
          }
          throw new Problem(event.error.message, { status: 500, code: event.error.code, param: event.error.param, retryAfter: event.retry_after });
        }
      }
      if (!done) throw new Problem("The connection was lost.", { code: "connection" });
    } catch (error) {
      if (!current()) return;
      if (error.name === "AbortError") {
        await this.#settle(view);
        if (!current()) return;
      } else if (error.code === "conversation_changed") await this.#overtaken(body);
      else tell(error);
    } finally {
      if (current()) {
        this.#controller = null;
        this.hooks.busy(false);
        this.list.busyLog(false);
        this.hooks.changed();
      }
    }
  }

  stop() {
    this.#controller?.abort();
  }

  /** The server has the question. Where it follows another message than here, another tab has gone on: show that. */
  async #asked(view, at, { message, after }) {
    if ((this.list.messages[at - 1]?.id ?? null) !== after) {
      const { messages } = await api.read(this.id).catch(() => ({ messages: [] }));
      const before = messages.findIndex(({ id }) => id === message.id);
      if (before >= 0) this.list.precede(at, messages.slice(0, before));
    }
    this.list.renew(this.list.index(view) - 1, message);
  }

  /** Nothing was changed, since the conversation is longer than this page knew: show it, and keep what was typed. */
  async #overtaken(body) {
    this.#controller = null;
    this.hooks.busy(false);
    this.list.busyLog(false);
    await this.#sync();
    if (body.content !== undefined) this.hooks.editQuestion(body.content);
    this.hooks.overtaken();
  }

  /** After a stop: the server keeps what it had written; take the messages as they stand there. */
  async #settle(view) {
    view.end();
    announce("Stopped");
    for (let i = 0; i < 12; i += 1) {
      await new Promise((resolve) => setTimeout(resolve, 60 + 40 * i));
      const { messages } = await api.read(this.id).catch(() => ({ messages: [] }));
      const last = messages.at(-1);
      if (last && (last.role === "user" || last.finish !== null) && (last.role === "assistant" || i > 3)) {
        this.#controller = null; // it is not busy any more: a question without an answer may say so
        this.hooks.busy(false);
        this.list.busyLog(false);
        this.list.renewTail(messages);
        this.hooks.changed();
        return;
      }
    }
  }

  /** Show the messages as the server has them; whether it could be reached. */
  async #sync() {
    const { id } = this;
    try {
      const { messages } = await api.read(id);
      if (id === this.id && !this.busy) this.list.renewTail(messages);
      return true;
    } catch (error) {
      this.list.view(-1)?.problem?.(error, { retry: () => this.#sync(), fresh: this.hooks.fresh });
      return false;
    }
  }

  /** The reader is back on this page: another tab may have gone on. */
  async look() {
    if (this.id === null || this.busy || this.list.editing) return;
    const { id } = this;
    const conversation = await api.read(id).catch(() => null);
    if (conversation && id === this.id && !this.busy && !this.list.editing && this.list.whole) this.list.renewTail(conversation.messages);
  }

  /** Edit the last question, in place. */
  editLast() {
    if (this.busy) return false;
    const i = this.list.messages.findLastIndex((message) => message.role === "user");
    if (i < 0) return false;
    this.list.view(i)?.edit();
    return true;
  }

  /** Milliseconds the last streamed updates of the page took. */
  get updates() {
    const last = this.list.view(-1);
    return last instanceof AnswerView ? last.updates : [];
  }
}
