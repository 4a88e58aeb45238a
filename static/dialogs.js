// Dialogs: the browser's own <dialog> keeps the focus inside and closes on Escape.
import { $, button, h } from "./dom.js";

/** Open a dialog filled with what `fill` returns; a click beside it closes it. */
export function openDialog(id, title, ...content) {
  const dialog = $(id);
  const titleId = dialog.getAttribute("aria-labelledby");
  dialog.replaceChildren(h("div", { class: "dialog-head" }, h("h2", { id: titleId }, title),
    button("close", "Close", () => dialog.close(), { bare: true })), h("div", { class: "dialog-body", tabindex: "0", role: "group", "aria-labelledby": titleId }, content));
  if (!dialog.open) dialog.showModal();
  return dialog;
}

export const dialogOpen = () => document.querySelector("dialog[open]") !== null;

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => {
    if (event.target !== dialog) return;
    const box = dialog.getBoundingClientRect();
    const inside = event.clientX >= box.left && event.clientX <= box.right && event.clientY >= box.top && event.clientY <= box.bottom;
    if (!inside) dialog.close();
  });
}

const KEYS = [
  [["Enter"], "Ask"],
  [["Shift", "Enter"], "A new line in the question"],
  [["Esc"], "Stop the answer; close what is open"],
  [["/"], "To the question field"],
  [["↑"], "In an empty question field: edit the last question"],
  [["Ctrl", "Shift", "O"], "New conversation"],
  [["Ctrl", "K"], "Search conversations"],
  [["Ctrl", "Enter"], "In “Complete a text”: write"],
  [["?"], "This help"],
];

export function openHelp() {
  openDialog("help-dialog", "Help",
    h("p", {}, "Ask a question. The passages that were found come first, numbered; the answer marks which of them each sentence rests on. A number opens its passage."),
    h("h3", {}, "Keys"),
    h("dl", { class: "keys" }, KEYS.map(([keys, words]) => h("div", {},
      h("dt", {}, keys.flatMap((key, i) => (i ? ["+", h("kbd", {}, key)] : [h("kbd", {}, key)]))), h("dd", {}, words)))));
}

let asking = null;

/** The key the server wants, or null when the reader gives none. Requests that are refused together ask once. */
export function askForKey(refused) {
  asking ??= new Promise((resolve) => {
    let given = null;
    const field = h("input", { id: "key", type: "password", autocomplete: "off", required: true, spellcheck: "false",
      "aria-describedby": "key-note", "aria-invalid": refused ? "true" : null });
    const form = h("form", { class: "key-form", onsubmit: (event) => {
      event.preventDefault();
      given = field.value.trim() || null;
      if (given) dialog.close();
    } },
    h("p", { id: "key-note", class: refused ? "wrong" : null }, refused ? "The server did not accept that key. Try another."
      : "This server asks for a key. Whoever started it has it; it is kept until this tab closes."),
    h("label", { for: "key" }, "Key"), field,
    h("div", { class: "dialog-foot" }, button(null, "Not now", () => dialog.close()), h("button", { class: "primary", type: "submit" }, "Use this key")));
    const dialog = openDialog("key-dialog", "A key, please", form);
    field.focus();
    dialog.addEventListener("close", () => {
      asking = null;
      resolve(given);
    }, { once: true });
  });
  return asking;
}
