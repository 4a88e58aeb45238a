// Elements are made here, never from markup: whatever a model, a document or a person wrote stays text.

export const $ = (id) => document.getElementById(id);

/** An element: attributes (`onclick` and the like listen), then children; null, undefined and false are left out. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else element.setAttribute(name, String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const PATHS = {
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  menu: "M4 7h16M4 12h16M4 17h10",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  check: "M5 12.5l4.5 4.5L19 7.5",
  again: "M20 11a8 8 0 1 0-2.3 6.3M20 5v6h-6",
  edit: "M4 20l4.2-1L19.5 7.7a2.1 2.1 0 0 0-3-3L5.2 16z",
  bin: "M5 7h14M10 7V4.5h4V7M7 7l1 13h8l1-13",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  down: "M12 5v14M6 13l6 6 6-6",
  forward: "M5 6l7 6-7 6zM13 6l7 6-7 6z",
  settings: "M4 7h9M19 7h1M4 17h1M11 17h9M16 4.5v5M8 14.5v5M13 7h3M5 17h3",
  help: "M9.2 9.2a2.9 2.9 0 1 1 4.3 2.5c-1 .6-1.5 1.2-1.5 2.3M12 17.5h.01",
  search: "M10.5 17a6.5 6.5 0 1 0 0-13 6.5 6.5 0 0 0 0 13zM20 20l-4.7-4.7",
  pen: "M4 6h16M4 12h10M4 18h6",
  quote: "M10 6c-3.5 1-5 3.5-5 7v4.5h5V13H5M20 6c-3.5 1-5 3.5-5 7v4.5h5V13h-5",
  warn: "M12 4l9 16H3zM12 10v4M12 17h.01",
  file: "M7 3h7l5 5v13H7zM14 3v5h5",
  export: "M12 4v11M7 11l5 5 5-5M5 20h14",
  undo: "M9 7L4 12l5 5M4 12h10a5 5 0 0 1 0 10",
  out: "M14 4h6v6M20 4l-9 9M18 14v6H4V6h6",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A button with a picture and, unless `bare`, its words beside it; bare ones carry the words as their label. */
export function button(picture, words, onclick, { kind = "quiet", bare = false, ...attributes } = {}) {
  return h("button", { type: "button", class: bare ? "icon-button" : kind, onclick, ...attributes,
    ...(bare ? { "aria-label": words, title: words } : {}) }, picture && icon(picture), !bare && h("span", {}, words));
}

/** Fill a button that index.html declares. */
export function furnish(id, picture, words) {
  $(id).replaceChildren(icon(picture), ...(words ? [h("span", {}, words)] : []));
}

export async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  // Plain http on another machine has no clipboard API.
  const area = h("textarea", { class: "hidden", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("the browser did not allow copying");
}

/** Say on the button itself that its text was copied. */
export async function copyFrom(control, text) {
  const before = [...control.childNodes];
  try {
    await copy(text);
    control.replaceChildren(icon("check"), ...(control.classList.contains("icon-button") ? [] : [h("span", {}, "Copied")]));
    announce("Copied");
  } catch (error) {
    toast(`Not copied: ${error.message}`);
    return;
  }
  setTimeout(() => control.replaceChildren(...before), 1500);
}

/** For screen readers: one short line when something is done, never one for each token. */
export function announce(words) {
  const status = $("status");
  status.textContent = "";
  requestAnimationFrame(() => { status.textContent = words; });
}

let toastTimer = 0;
export function toast(words) {
  const place = $("toast");
  place.textContent = words;
  place.hidden = false;
  announce(words);
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { place.hidden = true; }, 4000);
}

/** Hand the reader a file. */
export function download(name, blob) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** 9400000000 -> "9.4 B"; 2786304 -> "2.8 M". */
export function count(number) {
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "K"]]) {
    if (number >= size) return `${(number / size).toFixed(number / size < 10 ? 1 : 0)} ${unit}`;
  }
  return String(number);
}

export function bytes(number) {
  for (const [size, unit] of [[1e9, "GB"], [1e6, "MB"], [1e3, "KB"]]) {
    if (number >= size) return `${(number / size).toFixed(number / size < 10 ? 1 : 0)} ${unit}`;
  }
  return `${number} B`;
}
