// An error where it happened, in words, with a way on.
import { button, h, icon } from "./dom.js";
import { api } from "./api.js";

/** `ways`: {retry, edit, settings, fresh, plain, complete}, functions; those that do not apply are left out. */
export function problemView(problem, ways) {
  const { title, words, offers, wait } = explain(problem);
  const calm = ["no_model", "not_a_chat_model"].includes(problem.code);
  const note = h("p", { class: "problem-words" }, words);
  const foot = h("div", { class: "problem-ways" });
  const view = h("div", { class: calm ? "problem calm" : "problem", role: "alert" }, icon(calm ? "search" : "warn"),
    h("div", {}, h("p", { class: "problem-title" }, title), words && note, foot));
  let timer = 0;
  const leave = (way) => () => {
    clearInterval(timer);
    way();
  };
  const labels = { retry: ["again", "Try again"], edit: ["edit", "Edit the question"], settings: ["settings", "Settings"], fresh: ["plus", "New conversation"],
    plain: ["forward", "Ask without the search"], complete: ["pen", "Complete a text instead"] };
  for (const offer of offers) if (ways[offer]) foot.append(button(...labels[offer], leave(ways[offer]), { kind: offer === offers[0] ? "primary small" : "quiet small" }));

  if (wait === "seconds" && ways.retry) {
    let left = Math.max(1, Math.ceil(problem.retryAfter ?? 5));
    const say = () => { note.textContent = `${words} Trying again in ${left} s.`; };
    say();
    timer = setInterval(() => {
      left -= 1;
      if (!view.isConnected) clearInterval(timer);
      else if (left <= 0) leave(ways.retry)();
      else say();
    }, 1000);
  } else if (wait && ways.retry) {
    timer = setInterval(async () => {
      if (!view.isConnected) return clearInterval(timer);
      const model = await api.model().catch(() => null);
      if (model && (wait === "indexed" ? model.search.state !== "loading" : model.state === "ready") && view.isConnected) leave(ways.retry)();
    }, 2000);
  } else if (problem.code === "connection" && ways.retry) {
    window.addEventListener("online", () => { if (view.isConnected) ways.retry(); }, { once: true });
  }
  return view;
}

function explain({ status, code, message, param }) {
  if (code === "no_model") return { title: "No model is loaded, so nothing writes an answer.", words: "The search works: the passages that match are above. To have answers, start the server with a trained run: tryplicity serve RUN", offers: ["retry"] };
  if (code === "not_a_chat_model") return { title: "This is a base model: it has not learned to answer.", words: "The passages that match are above. What it can do is write on from a text.", offers: ["complete"] };
  if (code === "search_loading") return { title: "The passages are being made ready to search.", words: "The question is sent as soon as they are.", offers: ["retry", "plain"], wait: "indexed" };
  if (code === "no_search" || code === "search_failed") return { title: "The search did not work.", words: message, offers: ["retry", "plain"] };
  if (code === "conversation_busy") return { title: "An answer is being written in this conversation, perhaps in another tab.", words: "", offers: ["retry"] };
  if (code === "connection") return { title: "The connection to the server was lost.", words: "What was written so far is kept. Is the server still running?", offers: ["retry"] };
  if (status === 401) return { title: "The server asks for a key.", words: "", offers: ["retry"] };
  if (status === 404) return { title: "This conversation is no longer on the server.", words: "", offers: ["fresh"] };
  if (status === 413) return { title: "This is longer than the server takes.", words: message, offers: ["edit", "fresh"] };
  if (code === "context_length_exceeded") return { title: "The conversation no longer fits into what the model can read.", words: message, offers: ["fresh", "edit"] };
  if (status === 422 || status === 400 || code === "out_of_range") return { title: "The server could not use this.", words: message, offers: param?.startsWith("sampling") || (param && !["content", "prompt"].includes(param)) ? ["settings", "edit", "retry"] : ["edit", "settings", "retry"] };
  if (status === 429 || code === "rate_limit_exceeded") return { title: "The server is busy.", words: "Others are being answered first.", offers: ["retry"], wait: "seconds" };
  if (code === "shutting_down") return { title: "The server is shutting down.", words: "What was written is kept.", offers: ["retry"] };
  if (status === 503 || code === "model_loading") return { title: "The model is still loading.", words: "The question is sent as soon as it is ready.", offers: ["retry"], wait: "ready" };
  return { title: "That did not work.", words: message, offers: ["retry"] };
}
