// The model's card and how it is doing.
import { $, bytes, count, h } from "./dom.js";
import { api } from "./api.js";
import { openDialog } from "./dialogs.js";

const EVERY = { busy: 1000, open: 1000, loading: 2000, indexing: 2000, unreachable: 4000, idle: 20000 }; // milliseconds between looks
const STATES = { ready: "Ready", loading: "Loading", none: "No model is loaded", unreachable: "The server cannot be reached" };

export class Model {
  #listeners = new Set();
  #timer = 0;
  #busy = false;
  #looking = false;
  #dialog = $("model-dialog");

  constructor() {
    this.state = null; // ready, loading, none, unreachable
    this.card = null;
    this.statistics = {};
    this.search = { available: true, name: null, passages: null };
    $("model").addEventListener("click", () => this.open());
    this.#dialog.addEventListener("close", () => this.#plan());
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.look(); });
  }

  onchange(listener) {
    this.#listeners.add(listener);
  }

  set busy(is) {
    this.#busy = is;
    this.look();
  }

  async look() {
    if (this.#looking) return;
    this.#looking = true;
    clearTimeout(this.#timer);
    try {
      Object.assign(this, await api.model());
    } catch (error) {
      // Any answer of the server is a sign of life; what it refuses is told where it was asked for.
      if (error.status === 0) this.state = "unreachable";
      else this.state ??= "none";
    } finally {
      this.#looking = false;
    }
    this.#show();
    for (const listener of this.#listeners) listener(this);
    this.#plan();
  }

  #plan() {
    clearTimeout(this.#timer);
    if (document.hidden) return;
    const pace = this.#dialog.open ? "open" : this.#busy ? "busy" : this.search?.state === "loading" ? "indexing" : EVERY[this.state] ? this.state : "idle";
    this.#timer = setTimeout(() => this.look(), EVERY[pace]);
  }

  get speed() {
    const speed = this.statistics?.tokens_per_second;
    return typeof speed === "number" && speed > 0 ? `${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s` : "";
  }

  #show() {
    document.querySelector("#model .dot").dataset.state = this.state;
    $("model-name").textContent = this.card?.name ?? STATES[this.state] ?? "";
    $("model-speed").textContent = this.#busy ? this.speed : "";
    $("model").setAttribute("aria-label", `Model: ${this.card?.name ?? "none"}, ${STATES[this.state] ?? this.state}`);
    if (this.#dialog.open) {
      const live = this.#dialog.querySelector(".live");
      live?.replaceChildren(...this.#live());
    }
  }

  open() {
    openDialog("model-dialog", "Model", ...this.#panel());
    this.look();
  }

  #live() {
    const { running, waiting, slots, tokens_total: total } = this.statistics ?? {};
    return [
      fact("State", h("span", { class: "state" }, h("span", { class: "dot", "data-state": this.state }), STATES[this.state] ?? this.state)),
      fact("Speed now", this.speed || "at rest"),
      running !== undefined && fact("Being answered", `${running}${slots === undefined ? "" : ` of ${slots}`}${waiting ? `, ${waiting} waiting` : ""}`),
      total !== undefined && fact("Tokens written", total.toLocaleString("en")),
      this.kernels && fact("Slow because", this.kernels),
    ].filter(Boolean);
  }

  #panel() {
    const { card, search } = this;
    const parts = [h("dl", { class: "facts live" }, this.#live())];
    if (card) {
      parts.push(h("h3", {}, card.name), h("dl", { class: "facts" },
        fact("Parameters", count(card.parameters)),
        card.active_parameters && card.active_parameters !== card.parameters && fact("Of them at work on a token", count(card.active_parameters)),
        card.packed_bytes && fact("Size, packed", `${bytes(card.packed_bytes)}${card.parameters ? `, ${(8 * card.packed_bytes / card.parameters).toFixed(1)} bits a parameter` : ""}`),
        card.format && fact("Format", card.format),
        card.context_length && fact("Reads at most", `${card.context_length.toLocaleString("en")} tokens`),
        fact("Learned to", card.chat ? "answer questions" : "write on from a text (a base model)")));
      if (card.layers?.length) parts.push(h("h3", {}, "Layers"), layers(card.layers));
    } else if (this.state === "none") {
      parts.push(h("p", {}, "Start the server with a trained run to have answers:"), h("pre", { tabindex: "0" }, h("code", {}, "tryplicity serve RUN")));
    }
    parts.push(h("h3", {}, "Search"), h("dl", { class: "facts" },
      fact("Available", search?.state === "loading" ? "loading" : search?.available ? "yes" : "no"),
      search?.name && fact("Retriever", search.name),
      search?.passages != null && fact("Passages", search.passages.toLocaleString("en"))));
    return parts;
  }
}

const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));

/** Equal layers that follow one another are one line. */
function layers(names) {
  const list = h("ol", { class: "layers" });
  for (let i = 0; i < names.length;) {
    let end = i;
    while (end < names.length && names[end] === names[i]) end += 1;
    list.append(h("li", {}, h("span", { class: "layer-index" }, end - i > 1 ? `${i}–${end - 1}` : String(i)), h("span", {}, names[i])));
    i = end;
  }
  return list;
}
