// The AI SDK: its own provider (which asks /v1/responses) and that for compatible servers; text, tools, an object.
import {createOpenAI} from "@ai-sdk/openai";
import {createOpenAICompatible} from "@ai-sdk/openai-compatible";
import {generateObject, generateText, streamText, tool} from "ai";
import {z} from "zod";
import {join, model, question, tell, url} from "./told.mjs";

const schema = z.object({kind: z.enum(["list", "file"])});
const look = tool({description: "What a word means.", inputSchema: z.object({word: z.string()}),
                   execute: async ({word}) => word});
const own = createOpenAI({baseURL: `${url}/v1`, apiKey: "none"});
const compatible = createOpenAICompatible({name: "tryplicity", baseURL: `${url}/v1`, apiKey: "none",
                                           supportsStructuredOutputs: true});
const answers = new Set();
for (const made of [own(model), own.chat(model), compatible(model)]) {
  const asked = {model: made, prompt: question, temperature: 0, maxOutputTokens: 16, maxRetries: 0};
  answers.add((await generateText({...asked, tools: {look}})).text);
  answers.add(await join(streamText({...asked, onError: ({error}) => { throw error; }}).textStream));
  const {object} = await generateObject({...asked, maxOutputTokens: 60, schema});
  if (!["list", "file"].includes(object.kind)) throw new Error(JSON.stringify(object));
}
const [first, second = first, ...more] = answers;
if (more.length) throw new Error(JSON.stringify([...answers]));
tell(first, second);
