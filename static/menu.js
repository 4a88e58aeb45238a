// The menu of the open conversation.
import { $, furnish, h, icon } from "./dom.js";

/** `items()` gives [picture, words, function] for each line, anew whenever the menu opens. */
export function menu(items) {
  const opener = $("more");
  const place = $("menu");
  furnish("more", "more");
  const close = (focus) => {
    if (place.hidden) return;
    place.hidden = true;
    opener.setAttribute("aria-expanded", "false");
    if (focus) opener.focus();
  };
  opener.addEventListener("click", () => {
    if (!place.hidden) return close(true);
    place.replaceChildren(...items().map(([picture, words, act]) => h("button", { type: "button", role: "menuitem", tabindex: "-1",
      onclick: () => {
        close(true);
        act();
      } }, icon(picture), h("span", {}, words))));
    place.hidden = false;
    opener.setAttribute("aria-expanded", "true");
    place.firstElementChild.focus();
  });
  place.addEventListener("keydown", (event) => {
    const all = [...place.children];
    const to = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (to) all[(all.indexOf(document.activeElement) + to + all.length) % all.length].focus();
    else if (event.key === "Home") all[0].focus();
    else if (event.key === "End") all.at(-1).focus();
    else if (event.key === "Escape") close(true);
    else if (event.key === "Tab") return close(false);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest(".menu-anchor")) close(false);
  });
}
