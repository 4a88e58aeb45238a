// The conversation that is open: asking, stopping, regenerating, editing, continuing.
import { api, Problem } from "./api.js";
import { AnswerView, MessageList, announceAnswer } from "./messages.js";
import { announce } from "./dom.js";
import { change, sampling, settings } from "./settings.js";

export class Chat {
  #controller = null;
  #opening = null;

  /** `hooks`: {busy(is), opened(conversation | null), changed(), editQuestion(text), openSettings(), fresh()} */
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

  /** Ask after message `at` - 1; later messages are replaced. */
  async ask(content, at = this.list.messages.length) {
    if (this.busy) return;
    const after = at > 0 ? this.list.messages[at - 1].id ?? undefined : null; // left out after an answer that failed: it comes last
    this.list.truncate(at);
    this.list.addQuestion({ id: null, role: "user", content });
    const view = this.list.addAnswer(content);
    await this.#run(view, at, { content, after }, () => this.ask(content, at));
  }

  #edit(view, text) {
    if (!this.busy) this.ask(text, this.list.index(view));
  }

  async #regenerate(view) {
    if (this.busy) return;
    const at = this.list.index(view);
    const { id } = view.message;
    const { question } = view;
    this.list.truncate(at);
    const again = this.list.addAnswer(question);
    await this.#run(again, at, { regenerate: id }, () => this.#resync(at - 1));
  }

  async #continue(view) {
    if (this.busy) return;
    const at = this.list.index(view);
    await this.#run(view, at, { continue: view.message.id }, () => this.#resync(at - 1), view.message.content);
  }

  async #run(view, at, body, retry, text = "") {
    const controller = this.#controller = new AbortController();
    const current = () => this.#controller === controller;
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
        if (event.type === "question") this.list.renew(at, event.message);
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
        await this.#settle(view, at);
        if (!current()) return;
      } else tell(error);
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

  /** After a stop: the server keeps what it had written; take the messages as they stand there. */
  async #settle(view, at) {
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
        this.list.replaceTail(at, messages.slice(at));
        this.hooks.changed();
        return;
      }
    }
  }

  /** After an answer that failed half-way: what the server has from message `at` on. */
  async #resync(at) {
    try {
      const { messages } = await api.read(this.id);
      this.list.replaceTail(Math.max(0, at), messages.slice(Math.max(0, at)));
    } catch (error) {
      this.list.view(-1)?.problem?.(error, { retry: () => this.#resync(at), fresh: this.hooks.fresh });
    }
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
