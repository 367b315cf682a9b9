// The official Node client: completions, chats, streams, models, request ids and errors. `node ask_openai.mjs ROOT_URL KEY`.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [rootUrl, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${rootUrl}/v1`, apiKey, maxRetries: 0 });

const models = await client.models.list();
const model = models.data[0].id;
assert.equal((await client.models.retrieve(model)).id, model);

const greedy = { model, prompt: "import ", max_tokens: 8, temperature: 0 };
const whole = await client.completions.create(greedy);
assert.equal(whole.usage.completion_tokens, 8);
let text = "";
for await (const chunk of await client.completions.create({ ...greedy, stream: true })) text += chunk.choices[0].text;
assert.equal(text, whole.choices[0].text);

const asked = { model, messages: [{ role: "user", content: "def " }], max_completion_tokens: 8, temperature: 0 };
const { data: chat, response } = await client.chat.completions
  .create(asked, { headers: { "x-request-id": "mine" } })
  .withResponse();
assert.equal(response.headers.get("x-request-id"), "mine");
assert.equal(chat._request_id, "mine");
text = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(text, chat.choices[0].message.content);

const refused = (fields) => client.completions.create({ model, prompt: "a", ...fields });
await assert.rejects(refused({ model: "no-such-model" }), OpenAI.NotFoundError);
await assert.rejects(refused({ temperature: -1 }), (error) => {
  return error instanceof OpenAI.BadRequestError && error.param === "temperature";
});
await assert.rejects(refused({ prompt: new Array(100000).fill(7) }), (error) => {
  return error.code === "context_length_exceeded" && /maximum context length/.test(error.message);
});
await assert.rejects(client.withOptions({ apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError);
