// A small highlighter: one sticky pattern per kind of token, tried in order where the last one ended.

const STRING = [["string", /"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?/y]];
const NUMBER = [["number", /\b(?:0[xX][\da-fA-F_]+|0[bB][01_]+|\d[\d_]*(?:\.\d[\d_]*)?(?:[eE][+-]?\d+)?)\b/y]];
const words = (kind, list) => [kind, new RegExp(`\\b(?:${list.replaceAll(" ", "|")})\\b`, "y")];
const CALL = ["call", /[A-Za-z_$][\w$]*(?=\()/y];
const NAME = [null, /[A-Za-z_$][\w$]*/y];

const LANGUAGES = {
  python: [
    ["comment", /#.*/y],
    ["string", /[rRbBfFuU]{0,2}(?:"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$))/y],
    ["string", /[rRbBfFuU]{0,2}(?:"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?)/y],
    ["prompt", /^(?:>>>|\.\.\.)(?= |$)/my],
    ["call", /@[\w.]+/y],
    ...NUMBER,
    words("keyword", "and as assert async await break case class continue def del elif else except finally for from global if import in is lambda match nonlocal not or pass raise return try while with yield"),
    words("constant", "True False None self cls"),
    CALL, NAME,
  ],
  js: [
    ["comment", /\/\/.*|\/\*[\s\S]*?(?:\*\/|$)/y],
    ["string", /`(?:[^`\\]|\\[\s\S])*`?/y],
    ...STRING, ...NUMBER,
    words("keyword", "async await break case catch class const continue default delete do else export extends finally for from function if import in instanceof let new of return static super switch throw try typeof var void while yield interface type enum implements"),
    words("constant", "true false null undefined this NaN Infinity"),
    CALL, NAME,
  ],
  json: [["call", /"(?:[^"\\\n]|\\.)*"(?=\s*:)/y], ...STRING, ["number", /-?\b\d+(?:\.\d+)?(?:[eE][+-]?\d+)?\b/y], words("constant", "true false null"), NAME],
  bash: [
    ["comment", /(?<![\w$])#.*/y],
    ...STRING,
    ["constant", /\$(?:\{[^}\n]*\}?|\w+|[@#?$!*-])/y],
    ["prompt", /^\$(?= )/my],
    ["number", /(?<=\s)--?[\w-]+/y],
    words("keyword", "if then else elif fi for in do done while until case esac function return export local sudo cd echo exit set source"),
    [null, /[\w./-]+/y],
  ],
  yaml: [
    ["comment", /(?<![^\s])#.*/y],
    ["call", /[\w.-]+(?=\s*:(?:\s|$))/y],
    ...STRING, ...NUMBER,
    words("constant", "true false null yes no"),
    ["keyword", /[&*!][\w-]+|^---/my],
    [null, /[\w.-]+/y],
  ],
};

const ALIASES = { py: "python", python3: "python", pycon: "python", "python-repl": "python", javascript: "js", jsx: "js", ts: "js",
  typescript: "js", mjs: "js", jsonl: "json", json5: "json", sh: "bash", shell: "bash", console: "bash", zsh: "bash", yml: "yaml" };

const LONGEST = 60000; // characters; beyond, colours are not worth the wait

/** The code as a fragment: text, and spans whose class is the kind of token. An unknown language stays plain. */
export function highlight(code, language) {
  const fragment = document.createDocumentFragment();
  const name = (language ?? "").toLowerCase();
  const rules = LANGUAGES[ALIASES[name] ?? name];
  if (!Object.hasOwn(LANGUAGES, ALIASES[name] ?? name) || code.length > LONGEST) {
    fragment.append(code);
    return fragment;
  }
  let plain = 0;
  let at = 0;
  while (at < code.length) {
    let end = at;
    for (const [kind, pattern] of rules) {
      pattern.lastIndex = at;
      const match = pattern.exec(code);
      if (match === null || match[0] === "") continue;
      end = at + match[0].length;
      if (kind !== null) {
        if (plain < at) fragment.append(code.slice(plain, at));
        const span = document.createElement("span");
        span.className = `t-${kind}`;
        span.textContent = match[0];
        fragment.append(span);
        plain = end;
      }
      break;
    }
    at = end > at ? end : at + 1;
  }
  if (plain < code.length) fragment.append(code.slice(plain));
  return fragment;
}
