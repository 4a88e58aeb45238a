// openai: models, chat, responses.
import OpenAI from "openai";
import {model, question, tell, url} from "./told.mjs";

const client = new OpenAI({baseURL: `${url}/v1`, apiKey: "none"});
const ids = [];
for await (const each of client.models.list()) ids.push(each.id);
if (!ids.includes(model)) throw new Error(ids.join());
const asked = {model, messages: [{role: "user", content: question}], temperature: 0, max_tokens: 16};
const answer = (await client.chat.completions.create(asked)).choices[0].message.content;
const responses = await client.responses.create({model, input: question, temperature: 0, max_output_tokens: 16});
if (responses.output_text !== answer) throw new Error(responses.output_text);
let streamed = "";
for await (const chunk of await client.chat.completions.create({...asked, stream: true}))
  streamed += chunk.choices[0]?.delta?.content ?? "";
tell(answer, streamed);
