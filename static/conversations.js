// The side bar: conversations on the server, found, renamed and removed in place.
import { $, announce, button, h } from "./dom.js";
import { api } from "./api.js";

const narrow = window.matchMedia("(max-width: 860px)");

export class Conversations {
  #all = [];
  #current = null;
  #asked = null;
  #timer = 0;
  #drawn = "";

  /** `ways`: {removed(id), renamed(id, title)} */
  constructor(ways) {
    this.ways = ways;
    this.place = $("conversations");
    $("find").addEventListener("input", () => {
      clearTimeout(this.#timer);
      this.#timer = setTimeout(() => this.load(true), 180);
    });
    $("find").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && $("find").value) {
        event.stopPropagation();
        $("find").value = "";
        this.load();
      }
    });
    $("side-open").addEventListener("click", () => this.toggle(true));
    $("side-close").addEventListener("click", () => this.toggle(false));
    $("shade").addEventListener("click", () => this.toggle(false));
    narrow.addEventListener("change", () => this.toggle(!narrow.matches, false));
    this.toggle(!narrow.matches, false);
  }

  get open() {
    return document.body.hasAttribute("data-side");
  }

  /** On a narrow page the side bar is a drawer over it. */
  get drawer() {
    return narrow.matches && this.open;
  }

  toggle(open, focus = true) {
    document.body.toggleAttribute("data-side", open);
    $("side").inert = !open;
    $("page").inert = open && narrow.matches;
    $("shade").hidden = !(open && narrow.matches);
    $("side-open").setAttribute("aria-expanded", String(open));
    if (focus) (open ? $("find") : $("side-open")).focus();
  }

  closeDrawer() {
    if (this.drawer) this.toggle(false, false);
  }

  set current(id) {
    this.#current = id;
    for (const link of this.place.querySelectorAll("a")) {
      if (link.dataset.id === id) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }

  async load(say = false) {
    this.#asked?.abort();
    const asked = this.#asked = new AbortController();
    const query = $("find").value.trim();
    try {
      const { conversations } = await api.conversations(query, asked.signal);
      this.#all = conversations;
      this.#draw(query);
      if (say) announce(conversations.length === 1 ? "1 conversation" : `${conversations.length} conversations`);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.#drawn = "";
      this.place.replaceChildren(h("p", { class: "side-note" }, "The conversations could not be read. ", error.message),
        button("again", "Try again", () => this.load(), { kind: "quiet small" }));
    }
  }

  #draw(query) {
    const drawn = JSON.stringify([query, this.#all.map(({ id, title }) => [id, title]), new Date().toDateString()]);
    if (drawn === this.#drawn || this.place.querySelector(".renaming, .removing")) return;
    this.#drawn = drawn;
    if (this.#all.length === 0) {
      this.place.replaceChildren(h("p", { class: "side-note" }, query ? `Nothing was found for “${query}”.` : "What you ask is kept here."));
      return;
    }
    const groups = new Map();
    for (const conversation of this.#all) {
      const name = when(conversation.updated);
      groups.set(name, [...(groups.get(name) ?? []), conversation]);
    }
    this.place.replaceChildren(...[...groups].flatMap(([name, members]) =>
      [h("h2", {}, name), h("ul", {}, members.map((each) => this.#item(each)))]));
  }

  #item(conversation) {
    const item = h("li");
    const show = () => {
      item.className = "";
      item.replaceChildren(
        h("a", { href: `#c/${conversation.id}`, "data-id": conversation.id, title: conversation.title,
          "aria-current": conversation.id === this.#current ? "page" : null }, conversation.title),
        h("span", { class: "item-actions" },
          button("edit", `Rename ${conversation.title}`, rename, { bare: true }),
          button("bin", `Delete ${conversation.title}`, remove, { bare: true })));
    };
    const back = () => {
      show();
      item.querySelector("a").focus();
    };
    const failed = (error) => {
      show();
      item.append(h("p", { class: "side-note wrong", role: "alert" }, error.message));
    };
    const rename = () => {
      const field = h("input", { type: "text", maxlength: "200", "aria-label": "New title" });
      field.value = conversation.title;
      let over = false;
      const finish = async (keep) => {
        if (over) return;
        over = true;
        const title = field.value.trim();
        if (!keep || !title || title === conversation.title) return back();
        try {
          const renamed = await api.rename(conversation.id, title);
          conversation.title = renamed?.title ?? title;
          this.ways.renamed(conversation.id, conversation.title);
          back();
          announce("Renamed");
        } catch (error) {
          failed(error);
        }
      };
      field.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && !event.isComposing) finish(true);
        else if (event.key === "Escape") {
          event.stopPropagation();
          finish(false);
        }
      });
      field.addEventListener("blur", () => finish(true));
      item.className = "renaming";
      item.replaceChildren(field);
      field.focus();
      field.select();
    };
    const remove = () => {
      const keep = button(null, "Keep", back, { kind: "quiet small" });
      item.className = "removing";
      item.replaceChildren(h("p", {}, `Delete “${conversation.title}”?`), h("span", {}, keep,
        button("bin", "Delete", async () => {
          try {
            await api.remove(conversation.id);
          } catch (error) {
            if (error.status !== 404) return failed(error);
          }
          item.remove();
          this.#drawn = "";
          announce("Deleted");
          this.ways.removed(conversation.id);
          this.load();
          this.place.focus();
        }, { kind: "danger small" })));
      item.addEventListener("keydown", (event) => {
        if (event.key !== "Escape" || item.className !== "removing") return;
        event.stopPropagation();
        back();
      });
      keep.focus();
    };
    show();
    return item;
  }
}

function when(seconds) {
  const midnight = new Date();
  midnight.setHours(0, 0, 0, 0);
  const days = Math.ceil((midnight.getTime() / 1000 - seconds) / 86400);
  return days <= 0 ? "Today" : days === 1 ? "Yesterday" : days <= 7 ? "This week" : "Earlier";
}
