// The page, put together. What is shown follows the address: "#" a new conversation, "#c/ID" one, "#complete" completing a text.
import { $, announce, button, count, download, furnish, h, toast } from "./dom.js";
import { api } from "./api.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { Conversations } from "./conversations.js";
import { openHelp } from "./dialogs.js";
import { listen } from "./keyboard.js";
import { menu } from "./menu.js";
import { Model } from "./model.js";
import { Raw } from "./raw.js";
import { checked } from "./sources.js";
import { limit, onSettings, openSettings, settings } from "./settings.js";

const model = new Model();
const conversations = new Conversations({
  removed: (id) => { if (id === chat.id) go(""); },
  renamed: (id, title) => { if (id === chat.id) retitle(title); },
});
const chat = new Chat({
  busy: (is) => {
    composer.busy = is;
    model.busy = is;
  },
  opened: (conversation, created = false) => {
    retitle(conversation?.title ?? "");
    conversations.current = conversation?.id ?? null;
    if (created) {
      history.pushState(null, "", `#c/${conversation.id}`);
      conversations.load();
    }
    view();
  },
  changed: async () => {
    const { id } = chat;
    await conversations.load();
    const title = await api.read(id).then((conversation) => conversation.title, () => null);
    if (title !== null && id === chat.id) retitle(title);
  },
  editQuestion: (text) => {
    composer.set(text);
    composer.focus();
  },
  overtaken: () => toast("Nothing was changed: this conversation was gone on with elsewhere. Here it is."),
  openSettings: () => settingsDialog(),
  fresh: () => go(""),
  complete: () => go("complete"),
});
const composer = new Composer({
  ask: (text) => {
    document.body.dataset.view = "chat";
    composer.fit();
    chat.ask(text);
  },
  stop: () => chat.stop(),
  editLast: () => chat.editLast(),
});
const raw = new Raw({ busy: (is) => { model.busy = is; }, model: () => model.card, openSettings: () => settingsDialog() });

function go(hash) {
  if (location.hash.replace(/^#/, "") === hash) route();
  else location.hash = hash;
}

/** The id in an address; one that is no address at all names no conversation, and the server says so. */
function idOf(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

/** Show what the address names. */
function route() {
  const hash = location.hash.slice(1);
  conversations.closeDrawer();
  if (hash.startsWith("c/")) {
    const id = idOf(hash.slice(2));
    if (id !== chat.id) chat.open(id);
  } else if (hash !== "complete" || !chat.empty) chat.fresh();
  view();
  if (!window.matchMedia("(pointer: coarse)").matches) (hash === "complete" ? raw.field : composer.field).focus();
}

function view() {
  const writing = location.hash === "#complete";
  document.body.dataset.view = writing ? "raw" : chat.empty ? "start" : "chat";
  $("raw").hidden = !writing;
  $("more").hidden = chat.id === null || writing;
  $("toggle-raw").setAttribute("aria-pressed", String(writing));
  composer.fit();
  if (writing) retitle("Complete a text");
}

function retitle(title) {
  chat.title = title;
  $("title").textContent = title || "Tryplicity";
  document.title = title ? `${title} · Tryplicity` : "Tryplicity";
}

function settingsDialog() {
  openSettings(() => conversations.load());
}

async function exported(format) {
  try {
    const name = (chat.title || "conversation").replace(/[^\p{L}\p{N} _-]+/gu, "").trim().slice(0, 60) || "conversation";
    download(`${name}.${format === "json" ? "json" : "md"}`, await api.exportOne(chat.id, format));
  } catch (error) {
    toast(`Not exported: ${error.message}`);
  }
}

/** Questions to begin with, which the index that is served can answer. */
function examples(questions) {
  const place = $("examples");
  if (place.dataset.of === questions.join("\n")) return;
  place.dataset.of = questions.join("\n");
  place.replaceChildren(...questions.map((text) => h("button", { type: "button", class: "example", onclick: () => composer.ways.ask(text) }, text)));
}

/** What the model and the search allow is said where a question is asked. */
function told() {
  const { state, card, search } = model;
  const indexing = search?.state === "loading";
  const passages = indexing ? "the search is loading" : search?.available && search.passages ? `${count(search.passages)} passages to search` : search?.available ? "search is on" : "no search";
  const notice = $("notice");
  const say = (...words) => {
    notice.replaceChildren(...words);
    notice.hidden = false;
  };
  if (state === "none") say(h("span", {}, indexing ? "No model is loaded. The passages are being made ready to search." : search?.available ? "No model is loaded. Search works: a question shows the passages that match." : "No model is loaded, and there is nothing to search."),
    h("code", {}, "tryplicity serve RUN"));
  else if (indexing && settings.search) say(h("span", {}, "The passages are being made ready to search. You can ask already: the question waits for them."));
  else if (state === "loading") say(h("span", {}, "The model is loading. You can ask already: the question waits for it."));
  else if (state === "unreachable") say(h("span", {}, "The server cannot be reached. What you see is kept; trying again."), button("again", "Try now", () => model.look(), { kind: "quiet small" }));
  else if (card && !card.chat) say(h("span", {}, "This is a base model: it has not learned to answer, only to write on from a text."), button("pen", "Complete a text", () => go("complete"), { kind: "quiet small" }));
  else notice.hidden = true;
  $("tagline").textContent = card ? `${card.name} · ${count(card.parameters)} parameters · ${passages}` : search?.available && state === "none" ? passages : "Ask, and see where the answer comes from.";
  $("toggle-search").disabled = search?.available === false && !indexing;
  limit({ max_tokens: model.limits?.max_tokens });
  examples(search?.examples ?? []);
  checked.means = search?.checked ?? "";
  $("fineprint").textContent = state === "none" ? "Only passages are shown: nothing is written without a model."
    : (search?.available === false && !indexing) || !settings.search ? "Answers come from the model alone and can be wrong."
      : "Answers can be wrong. Check the sources.";
}

furnish("new", "plus", "New conversation");
furnish("side-open", "menu");
furnish("side-close", "close");
furnish("open-settings", "settings");
furnish("open-settings-side", "settings", "Settings");
furnish("open-help", "help", "Help");
$("new").addEventListener("click", () => go(""));
$("home").addEventListener("click", (event) => {
  event.preventDefault();
  go("");
});
$("open-settings").addEventListener("click", settingsDialog);
$("open-settings-side").addEventListener("click", settingsDialog);
$("open-help").addEventListener("click", openHelp);
$("toggle-raw").addEventListener("click", () => go("complete"));
$("raw-back").addEventListener("click", () => go(""));
furnish("raw-back", "search", "Ask instead");
menu(() => [
  ["export", "Export as Markdown", () => exported("markdown")],
  ["export", "Export as JSON", () => exported("json")],
]);
listen({
  focus: () => (document.body.dataset.view === "raw" ? raw.field : composer.field).focus(),
  stop: () => {
    const busy = chat.busy || raw.busy;
    chat.stop();
    raw.stop();
    return busy;
  },
  closeDrawer: () => {
    const { drawer } = conversations;
    if (drawer) conversations.toggle(false);
    return drawer;
  },
  fresh: () => {
    go("");
    announce("New conversation");
  },
  find: () => {
    conversations.toggle(true);
    $("find").select();
  },
  help: openHelp,
});
model.onchange(told);
onSettings(told);
window.addEventListener("hashchange", route);
window.addEventListener("beforeprint", () => chat.list.all());
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  chat.look();
  conversations.load();
});
document.documentElement.dataset.ready = "true";

route();
model.look();
conversations.load();

/** For tests and the curious: milliseconds that the last streamed updates took. */
window.tryplicity = { get updates() { return chat.updates; } };
