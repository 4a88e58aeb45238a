// What the page asks of its server, and nothing of anyone else.
import { askForKey } from "./dialogs.js";

const KEY = "tryplicity.key";

/** An answer that is an error. `status` 0: the server was not reached. */
export class Problem extends Error {
  constructor(message, { status = 0, code = null, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }
}

/** Server-sent events out of text that comes in pieces: what is incomplete waits for the next piece. */
export class EventParser {
  #rest = "";
  #data = [];

  /** The data of every event that is complete now. */
  feed(text) {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop();
    const events = [];
    for (const raw of lines) {
      const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
      if (line === "") {
        if (this.#data.length) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      } // A comment (": ping") or a field that this page has no use for.
    }
    return events;
  }
}

async function problemOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch { /* not JSON: the status says enough */ }
  const retryAfter = Number.parseFloat(response.headers.get("Retry-After"));
  return new Problem(error.message || `The server answered ${response.status}.`, {
    status: response.status, code: error.code ?? null, param: error.param ?? null,
    retryAfter: Number.isFinite(retryAfter) ? retryAfter : null,
  });
}

async function send(method, path, body, signal) {
  for (let attempt = 0; ; attempt += 1) {
    const key = sessionStorage.getItem(KEY);
    let response;
    try {
      response = await fetch(path, {
        method, signal, cache: "no-store",
        headers: { ...(body === undefined ? {} : { "Content-Type": "application/json" }), ...(key ? { Authorization: `Bearer ${key}` } : {}) },
        body: body === undefined ? undefined : JSON.stringify(body),
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server cannot be reached.", { code: "connection" });
    }
    if (response.ok) return response;
    const problem = await problemOf(response);
    if (response.status !== 401) throw problem;
    const given = await askForKey(key !== null || attempt > 0);
    if (given === null) throw problem;
    sessionStorage.setItem(KEY, given);
  }
}

export async function request(method, path, body, signal) {
  const response = await send(method, path, body, signal);
  return response.status === 204 ? null : response.json();
}

export async function file(path) {
  return (await send("GET", path)).blob();
}

/** The events of a stream, each parsed; `[DONE]` ends it. */
export async function* events(path, body, signal) {
  const response = await send("POST", path, body, signal);
  const reader = response.body.getReader();
  const decoder = new TextDecoder(); // { stream: true } below: a character may be cut between two pieces
  const parser = new EventParser();
  try {
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new Problem("The connection was lost.", { code: "connection" });
      }
      const complete = parser.feed(piece.done ? `${decoder.decode()}\n\n` : decoder.decode(piece.value, { stream: true }));
      for (const data of complete) {
        if (data === "[DONE]") return;
        let event;
        try {
          event = JSON.parse(data);
        } catch { // only a stream cut in the middle of an event leaves half a one
          throw new Problem("The connection was lost.", { code: "connection" });
        }
        yield event;
      }
      if (piece.done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const conversation = (id) => `api/conversations/${encodeURIComponent(id)}`;

export const api = {
  model: () => request("GET", "api/model"),
  conversations: (query = "", signal) => request("GET", `api/conversations${query ? `?q=${encodeURIComponent(query)}` : ""}`, undefined, signal),
  create: () => request("POST", "api/conversations", {}),
  read: (id, signal) => request("GET", conversation(id), undefined, signal),
  rename: (id, title) => request("PATCH", conversation(id), { title }),
  remove: (id) => request("DELETE", conversation(id)),
  ask: (id, body, signal) => events(`${conversation(id)}/ask`, body, signal),
  write: (body, signal) => events("v1/completions", { ...body, stream: true }, signal),
  exportOne: (id, format) => file(`${conversation(id)}/export?format=${format}`),
  exportAll: () => file("api/conversations/export"),
  importAll: (content) => request("POST", "api/conversations/import", content),
};
