// The field where questions are written.
import { $, furnish } from "./dom.js";
import { change, onSettings, settings } from "./settings.js";

const touch = window.matchMedia("(pointer: coarse)");

/** `ways`: {ask(text), stop(), editLast()} */
export class Composer {
  #busy = false;

  constructor(ways) {
    this.field = $("question");
    this.ways = ways;
    furnish("toggle-search", "search", "Search");
    furnish("toggle-raw", "pen", "Complete a text");
    $("toggle-search").addEventListener("click", () => change({ search: !settings.search }));
    const pressed = () => $("toggle-search").setAttribute("aria-pressed", String(settings.search));
    onSettings(pressed);
    pressed();
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#busy) ways.stop();
      else this.#send();
    });
    this.field.addEventListener("input", () => this.fit());
    this.field.addEventListener("keydown", (event) => {
      if (event.isComposing) return; // Enter belongs to the input method
      if (event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.altKey && !event.metaKey) {
        event.preventDefault();
        if (!this.#busy) this.#send();
      } else if (event.key === "ArrowUp" && this.field.value === "" && ways.editLast()) event.preventDefault();
    });
    this.fit();
    this.busy = false;
  }

  #send() {
    const text = this.field.value.trim();
    if (!text) return this.focus();
    this.set("");
    if (touch.matches) this.field.blur(); // make room: put the keyboard away
    this.ways.ask(text);
  }

  set(text) {
    this.field.value = text;
    this.fit();
  }

  focus() {
    this.field.focus();
  }

  set busy(is) {
    this.#busy = is;
    furnish("send", is ? "stop" : "send");
    $("send").setAttribute("aria-label", is ? "Stop" : "Ask");
    $("send").title = is ? "Stop (Esc)" : "Ask (Enter)";
    $("send").classList.toggle("busy", is);
    document.body.toggleAttribute("data-busy", is);
    this.fit();
  }

  fit() {
    this.field.style.height = "auto";
    this.field.style.height = `${Math.min(this.field.scrollHeight, Math.round(window.innerHeight * 0.4))}px`;
    $("send").toggleAttribute("data-empty", !this.#busy && this.field.value.trim() === "");
  }
}
