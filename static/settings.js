// What the reader chose about sampling and search, kept in this browser.
import { $, announce, button, download, h, toast } from "./dom.js";
import { api } from "./api.js";
import { openDialog } from "./dialogs.js";

const PLACE = "tryplicity.settings";

const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.3, note: "0 always takes the likeliest token." },
  { name: "top_p", label: "Top-p", min: 0.05, max: 1, step: 0.05, value: 0.95, note: "Choose among the likeliest of this mass." },
  { name: "top_k", label: "Top-k", min: 0, max: 1000, step: 1, value: 0, note: "Choose among this many; 0 is all." },
  { name: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01, value: 0, note: "Drop what is less likely than this share of the likeliest." },
  { name: "repetition_penalty", label: "Repetition penalty", min: 1, max: 2, step: 0.05, value: null, empty: "the model's", note: "1 is none; empty is what suits the model." },
  { name: "max_tokens", label: "Longest answer, in tokens", min: 1, max: 1048576, step: 1, value: 256 },
  { name: "seed", label: "Seed", min: 0, max: 4294967295, step: 1, value: null, note: "The same seed writes the same text; empty is a new one each time." },
];
const DEFAULTS = { search: true, ...Object.fromEntries(FIELDS.map(({ name, value }) => [name, value])) };

function valid({ min, max, step }, value) {
  return typeof value === "number" && value >= min && value <= max && (step !== 1 || Number.isInteger(value));
}

function load() {
  const settings = { ...DEFAULTS };
  try {
    const kept = JSON.parse(localStorage.getItem(PLACE) ?? "{}");
    for (const field of FIELDS) if (valid(field, kept[field.name])) settings[field.name] = kept[field.name];
    if (typeof kept.search === "boolean") settings.search = kept.search;
  } catch { /* storage is closed or holds something else: the defaults */ }
  return settings;
}

export const settings = load();

/** What this server allows; a value beyond it is brought down to it. */
export function limit(most) {
  for (const field of FIELDS) {
    if (!most[field.name] || field.max === most[field.name]) continue;
    field.max = most[field.name];
    if (settings[field.name] !== null && settings[field.name] > field.max) settings[field.name] = field.max;
  }
}

const listeners = new Set();
export const onSettings = (listener) => listeners.add(listener);

export function change(values) {
  Object.assign(settings, values);
  try {
    localStorage.setItem(PLACE, JSON.stringify(settings));
  } catch { /* storage is closed: it holds until the page is left */ }
  for (const listener of listeners) listener(settings);
}

/** What a request says about sampling; no seed where none was chosen. */
export function sampling() {
  return Object.fromEntries(FIELDS.map(({ name }) => [name, settings[name]]).filter(([, value]) => value !== null));
}

function row(field) {
  const { name, label, min, max, step, note } = field;
  const ranged = max <= 2;
  const id = `set-${name}`;
  const number = h("input", { id, type: "number", inputmode: step === 1 ? "numeric" : "decimal", min, max, step: step === 1 ? 1 : "any",
    value: settings[name], placeholder: field.value === null ? field.empty ?? "random" : null, "aria-describedby": `${id}-note` });
  const slider = ranged ? h("input", { type: "range", min, max, step, value: settings[name] ?? min, "aria-label": `${label}, slider` }) : null;
  const hint = h("p", { id: `${id}-note`, class: "field-note" }, note ?? "");
  const take = (text) => {
    const value = text.trim() === "" ? field.value : Number(text);
    const good = value === null || valid(field, value);
    number.toggleAttribute("aria-invalid", !good);
    hint.classList.toggle("wrong", !good);
    hint.textContent = good ? note ?? "" : `${label} goes from ${min} to ${max}${step === 1 ? ", in whole numbers" : ""}.`;
    if (!good) return;
    change({ [name]: value });
    if (slider && value !== null) slider.value = value;
  };
  number.addEventListener("input", () => take(number.value));
  slider?.addEventListener("input", () => {
    number.value = slider.value;
    take(slider.value);
  });
  return h("div", { class: "field" }, h("label", { for: id }, label), h("div", { class: "field-values" }, slider, number), hint);
}

async function importFrom(file, done) {
  try {
    await api.importAll(JSON.parse(await file.text()));
    toast("Imported");
    done();
  } catch (error) {
    toast(error instanceof SyntaxError ? "Not imported: this file is not JSON." : `Not imported: ${error.message}`);
  }
}

export function openSettings(imported = () => {}) {
  const search = h("input", { id: "set-search", type: "checkbox", checked: settings.search, role: "switch", onchange: () => change({ search: search.checked }) });
  const chosen = h("input", { id: "import", type: "file", accept: "application/json,.json", class: "hidden", tabindex: "-1", "aria-label": "File with conversations",
    onchange: () => { if (chosen.files[0]) importFrom(chosen.files[0], imported); } });
  openDialog("settings-dialog", "Settings",
    h("div", { class: "field switch" }, h("label", { for: "set-search" }, "Search before answering"), search),
    FIELDS.map(row),
    h("div", { class: "dialog-foot" }, button("undo", "Back to the defaults", () => {
      change(DEFAULTS);
      openSettings(imported);
      announce("Defaults are back");
      $("settings-dialog").querySelector(".dialog-body").focus();
    })),
    h("h3", {}, "All conversations"),
    h("div", { class: "dialog-row" },
      button("export", "Export", async () => {
        try {
          download("conversations.json", await api.exportAll());
        } catch (error) {
          toast(`Not exported: ${error.message}`);
        }
      }), button("plus", "Import", () => chosen.click()), chosen));
}
