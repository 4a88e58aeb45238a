// What every script is told, and how it tells what it got.
export const [url, model, question] = process.argv.slice(2);
export const tell = (answer, streamed) => console.log(JSON.stringify({answer, streamed}));
export async function join(stream) {
  let text = "";
  for await (const part of stream) text += part;
  return text;
}
