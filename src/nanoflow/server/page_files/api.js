// Requests to the server. URLs are relative to the page, so that it works behind a proxy that adds a prefix.

import { kept } from "./dom.js";

const CUT_OFF = "the connection ended before the answer did";

/** The server refused a request, or could not be reached. */
export class Failure extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
  }

  /** What to tell the reader. */
  toString() {
    const where = this.param ? ` (field ${this.param})` : "";
    return `${this.status ? `${this.status}: ` : ""}${this.message}${where}`;
  }
}

async function failureOf(answer) {
  let error = null;
  try { error = (await answer.json()).error; } catch { /* a proxy may answer with something else */ }
  return new Failure(error?.message || answer.statusText || "no reason was given",
    { status: answer.status, param: error?.param });
}

async function ask(path, { body = null, signal = null } = {}) {
  const key = kept("key");
  const headers = { ...(key ? { authorization: `Bearer ${key}` } : {}),
    ...(body ? { "content-type": "application/json" } : {}) };
  const request = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("the server cannot be reached");
  }
  if (!answer.ok) throw await failureOf(answer);
  return answer;
}

/** The JSON document at a path. */
export async function read(path) {
  const answer = await ask(path);
  try { return await answer.json(); } catch { throw new Failure("the answer is no whole JSON document"); }
}

/** Yield the chunks of a streamed chat completion. */
export async function* streamed(body, signal) {
  const answer = await ask("v1/chat/completions", { body: { ...body, stream: true }, signal });
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Failure(chunk.error.message, { param: chunk.error.param });
    yield chunk;
  }
  throw new Failure(CUT_OFF);
}

/** Yield the data of each server-sent event; an event ends with an empty line. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => { throw error.name === "AbortError" ? error : new Failure(CUT_OFF); });
      if (done) return;
      text += value;
      const whole = text.split("\n\n");
      text = whole.pop();
      for (const event of whole) {
        const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
        if (data.length) yield data.join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
