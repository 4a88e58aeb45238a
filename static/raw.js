// Completing a text: what a base model does. The text is the reader's to change at any time.
import { $, announce, copyFrom, furnish } from "./dom.js";
import { api, Problem } from "./api.js";
import { problemView } from "./problems.js";
import { sampling } from "./settings.js";

export class Raw {
  #controller = null;
  #before = null; // the text before the last writing
  #frame = 0;
  #pending = "";

  /** `hooks`: {busy(is), model(), openSettings()} */
  constructor(hooks) {
    this.hooks = hooks;
    this.field = $("raw-text");
    furnish("raw-undo", "undo", "Take back");
    furnish("raw-copy", "copy", "Copy");
    $("raw-go").addEventListener("click", () => (this.busy ? this.stop() : this.write()));
    $("raw-undo").addEventListener("click", () => this.#undo());
    $("raw-copy").addEventListener("click", (event) => copyFrom(event.currentTarget, this.field.value));
    this.field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
        event.preventDefault();
        if (!this.busy) this.write();
      }
    });
    this.#show();
  }

  get busy() {
    return this.#controller !== null;
  }

  #show() {
    furnish("raw-go", this.busy ? "stop" : "pen", this.busy ? "Stop" : "Write");
    $("raw-undo").disabled = this.busy || this.#before === null;
    this.field.readOnly = this.busy;
    this.field.toggleAttribute("aria-busy", this.busy);
  }

  async write() {
    if (this.field.value === "") return this.field.focus();
    const controller = this.#controller = new AbortController();
    this.#before = this.field.value;
    $("raw-problem").replaceChildren();
    $("raw-speed").textContent = "";
    this.hooks.busy(true);
    this.#show();
    const start = performance.now();
    let finish = null;
    let usage = null;
    try {
      const body = { model: this.hooks.model()?.id ?? "default", prompt: this.#before, stream_options: { include_usage: true }, ...sampling() };
      for await (const event of api.write(body, controller.signal)) {
        if (event.error) throw new Problem(event.error.message, { status: 500, code: event.error.code, param: event.error.param, retryAfter: event.retry_after });
        const choice = event.choices?.[0];
        if (choice?.text) this.#append(choice.text);
        finish = choice?.finish_reason ?? finish;
        usage = event.usage ?? usage;
      }
      const seconds = (performance.now() - start) / 1000;
      $("raw-speed").textContent = [usage && `${usage.completion_tokens} tokens, ${(usage.completion_tokens / seconds).toFixed(0)} a second`,
        finish === "length" && "longest length reached", finish === "stop" && "the model ended the text"].filter(Boolean).join(" · ");
      announce("Writing complete");
    } catch (error) {
      if (error.name === "AbortError") announce("Stopped");
      else $("raw-problem").replaceChildren(problemView(error, { retry: () => this.write(), settings: this.hooks.openSettings, edit: () => this.field.focus() }));
    } finally {
      this.#flush();
      this.#controller = null;
      this.hooks.busy(false);
      this.#show();
    }
  }

  #append(text) {
    this.#pending += text;
    this.#frame ||= requestAnimationFrame(() => this.#flush());
  }

  #flush() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    if (!this.#pending) return;
    const { field } = this;
    const end = field.scrollHeight - field.scrollTop - field.clientHeight < 60;
    field.setRangeText(this.#pending, field.value.length, field.value.length, "preserve");
    this.#pending = "";
    if (end) field.scrollTop = field.scrollHeight;
  }

  stop() {
    this.#controller?.abort();
  }

  #undo() {
    this.field.value = this.#before;
    this.#before = null;
    this.#show();
    this.field.focus();
  }
}
