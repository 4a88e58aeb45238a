// Keys that work anywhere on the page. Single characters only count outside of fields.
import { dialogOpen } from "./dialogs.js";

const writes = (element) => element instanceof Element && element.closest("input, textarea, select, [contenteditable]") !== null;

/** `ways`: {focus(), stop(): whether there was something to stop, closeDrawer(): whether it was open, fresh(), find(), help()} */
export function listen(ways) {
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.defaultPrevented || dialogOpen()) return;
    const control = event.ctrlKey || event.metaKey;
    const key = event.key.toLowerCase();
    const does = (way) => {
      event.preventDefault();
      way();
    };
    if (key === "escape") {
      if (ways.closeDrawer() || ways.stop()) event.preventDefault();
    } else if (control && event.shiftKey && key === "o") does(ways.fresh);
    else if (control && !event.shiftKey && !event.altKey && key === "k") does(ways.find);
    else if (control || event.altKey || writes(event.target)) return;
    else if (key === "/") does(ways.focus);
    else if (key === "?") does(ways.help);
  });
}
