// Texts from JSON on standard input, rendered; answers with what each became. `node hostile.mjs FOLDER < texts.json`
import { pathToFileURL } from "node:url";
import { readFileSync } from "node:fs";
import { elements } from "./dom.mjs";

const { render } = await import(pathToFileURL(`${process.argv[2]}/markdown.js`));
const { highlight } = await import(pathToFileURL(`${process.argv[2]}/highlight.js`));
const cite = (number) => (number < 4 ? Object.assign(document.createElement("b"), { textContent: String(number) }) : null);
const holder = () => document.createDocumentFragment();

const said = JSON.parse(readFileSync(0, "utf8")).map((text) => {
  const start = process.cpuUsage(); // not the clock: other processes do not count
  const place = holder();
  place.append(render(text, { cite }));
  const live = holder();
  live.append(render(text, { cite, live: true }));
  const code = holder();
  code.append(highlight(text, "python"));
  const used = process.cpuUsage(start);
  const milliseconds = (used.user + used.system) / 1000;
  const found = [...elements(place), ...elements(live), ...elements(code)];
  return {
    milliseconds, text: place.textContent, code: code.textContent, tags: [...new Set(found.map((e) => e.nodeName))],
    attributes: [...new Set(found.flatMap((e) => Object.keys(e.attributes)))],
    addresses: found.flatMap((e) => ["href", "src"].filter((name) => name in e.attributes).map((name) => e.attributes[name])),
    listeners: [...new Set(found.filter((e) => e.nodeName !== "BUTTON").flatMap((e) => e.listeners))],
  };
});
process.stdout.write(JSON.stringify(said));
