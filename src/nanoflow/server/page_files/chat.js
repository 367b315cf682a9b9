// A conversation: its messages, the answer that grows, and what can be done with them.

import { Failure, streamed } from "./api.js";
import { byId, keep, kept } from "./dom.js";
import { Speaker } from "./speaker.js";
import { requestFields, systemPrompt } from "./settings.js";
import { ModelTurn, turn } from "./turns.js";

// An answer is drawn at most so often.
const DRAW_MS = 60;

// Refusals after which the same request may be answered.
const TRY_AGAIN = [408, 429];

/** The conversation of this tab. `askForKey` resolves to true once the reader has given a key; `showModels` lists models. */
export class Chat {
  constructor(askForKey, showModels) {
    Object.assign(this, { askForKey, showModels });
    this.log = byId("log");
    this.speaker = new Speaker(byId("spoken"));
    this.messages = kept("messages") ?? [];
    this.abort = null;
    this.growing = null; // the message of an answer that grows
    this.redraw();
    this.changed();
  }

  get isBusy() { return this.abort !== null; }

  /** Ask the model; does nothing while it answers. False if the message is not taken. */
  send(text) {
    if (this.isBusy || !text.trim()) return false;
    const fields = requestFields();
    if (!fields) return false;
    this.closeCalls();
    this.push({ role: "user", content: text });
    this.answer(fields);
    return true;
  }

  /** Drop the last answer and ask for another one. */
  retry() {
    if (this.isBusy) return;
    const fields = requestFields();
    if (!fields) return;
    while (this.messages.at(-1)?.role === "assistant") this.messages.pop();
    if (!this.messages.length) return;
    this.redraw();
    this.answer(fields);
  }

  /** End the answer that grows; what there is of it stays. */
  stop() { this.abort?.abort(); }

  /** Begin anew. */
  reset() {
    this.stop();
    this.abort = this.growing = null;
    this.messages = [];
    this.redraw();
    this.changed();
  }

  /** Tools that were called and got no answer get an empty one: a conversation cannot go on without. */
  closeCalls() {
    const last = this.messages.at(-1);
    for (const form of this.log.querySelectorAll(".answers")) form.remove();
    if (last?.role === "assistant") for (const call of last.tool_calls ?? []) this.push(toolAnswer(call, ""));
  }

  push(message) {
    this.messages.push(message);
    this.log.append(turn(message));
    this.toEnd();
  }

  redraw() {
    this.tell(null);
    this.log.replaceChildren(...this.messages.map((message) => (message.role === "assistant" ? whole(message) : turn(message))));
    const last = this.messages.at(-1);
    if (last?.tool_calls?.length) this.askForAnswers(last, this.log.lastChild);
    this.toEnd();
  }

  /** Ask for the next message of the model and show it as it grows. */
  async answer(fields) {
    const abort = (this.abort = new AbortController()), shown = new ModelTurn();
    const message = (this.growing = { role: "assistant", content: "", reasoning: "", tool_calls: [] });
    this.tell(null);
    this.log.append(shown.node);
    this.changed();
    this.speaker.begin();
    let failure = null;
    const times = { start: performance.now(), first: null, usage: null };
    try {
      await this.grow(message, shown, fields, abort.signal, times);
    } catch (error) {
      failure = error;
    }
    if (this.abort !== abort) return; // a new conversation has begun
    this.abort = this.growing = null;
    this.finish(message, shown, failure, times);
    if (failure instanceof Failure) this.react(failure);
  }

  /** What a failure asks for: a key, another model, or another message. */
  async react({ status }) {
    if (status === 401) return await this.askForKey() && this.retry();
    if (status === 404) this.showModels();
    if (status >= 400 && status < 500 && !TRY_AGAIN.includes(status)) this.giveBack();
  }

  /** Give a message that the server refuses back to its field: every message after it would be refused with it. */
  giveBack() {
    if (this.messages.at(-1)?.role !== "user") return;
    const prompt = byId("prompt"), { content } = this.messages.pop();
    this.log.lastChild.remove();
    prompt.value = prompt.value ? `${content}\n${prompt.value}` : content;
    this.changed();
  }

  async grow(message, shown, fields, signal, times) {
    let isDue = true;
    const draw = () => {
      isDue = true;
      if (this.abort?.signal !== signal) return; // it has ended, and another one may have begun
      const isAtEnd = this.isAtEnd();
      shown.show(message, { isBusy: true });
      this.speaker.say(message.content);
      if (isAtEnd) this.toEnd();
    };
    draw();
    for await (const chunk of streamed(this.body(fields), signal)) {
      times.usage = chunk.usage ?? times.usage;
      if (!chunk.choices?.length) continue;
      const { delta, finish_reason } = chunk.choices[0];
      add(message, delta);
      times.end = finish_reason ?? times.end;
      if (delta.content || delta.reasoning || delta.tool_calls) times.first ??= performance.now();
      if (isDue) { isDue = false; setTimeout(draw, DRAW_MS); }
    }
  }

  finish(message, shown, failure, times) {
    shown.show(message, { isBusy: false });
    const wasStopped = failure?.name === "AbortError", isEmpty = !message.content && !message.reasoning;
    shown.note(wasStopped ? "stopped" : failure ? "incomplete" : noted(times));
    this.speaker.end(message.content, wasStopped ? "Stopped." : "");
    if (wasStopped || failure) message.tool_calls = [];
    if (isEmpty && !message.tool_calls.length && failure) shown.node.remove();
    else this.messages.push(message);
    if (failure && !wasStopped) this.tell(failure);
    if (message.tool_calls.length) this.askForAnswers(message, shown);
    this.changed();
    this.toEnd();
  }

  askForAnswers(message, shown) {
    const at = shown instanceof ModelTurn ? shown : shown.turn;
    at.askForAnswers(message.tool_calls, (answers) => {
      const fields = requestFields();
      if (!fields) return false;
      message.tool_calls.forEach((call, place) => this.push(toolAnswer(call, answers[place])));
      this.answer(fields);
      return true;
    }).focus();
  }

  body(fields) {
    const system = systemPrompt().trim();
    const turns = this.messages.map(({ name, ...message }) => sent(message));
    return {
      model: byId("model").value || undefined,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...turns],
      stream_options: { include_usage: true },
      ...fields,
    };
  }

  tell(failure) {
    const place = byId("problem");
    place.textContent = failure === null ? "" : failure instanceof Failure ? String(failure) : `the page failed: ${failure}`;
    place.hidden = failure === null;
  }

  changed() {
    const focused = document.activeElement?.id;
    byId("send").disabled = this.isBusy;
    byId("stop").disabled = !this.isBusy;
    byId("retry").disabled = this.isBusy || !this.messages.length;
    // A button that can no longer be pressed passes the focus on.
    if (this.isBusy && (focused === "send" || focused === "retry")) byId("stop").focus();
    if (!this.isBusy && focused === "stop") byId(this.messages.length ? "retry" : "prompt").focus();
    this.save();
  }

  /** Keep the conversation, with what there is of an answer that grows; its calls are not whole. */
  save() {
    const grown = this.growing, hasText = grown?.content || grown?.reasoning;
    const messages = hasText ? [...this.messages, { ...grown, tool_calls: [] }] : this.messages;
    keep("messages", messages.length ? messages : null);
  }

  isAtEnd() { return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40; }

  toEnd() { this.log.scrollTop = this.log.scrollHeight; }
}

/** Add what is new to a message. */
export function add(message, delta) {
  message.content += delta.content ?? "";
  message.reasoning += delta.reasoning ?? delta.reasoning_content ?? "";
  for (const part of delta.tool_calls ?? []) {
    const call = (message.tool_calls[part.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    call.id = part.id ?? call.id;
    call.function.name += part.function?.name ?? "";
    call.function.arguments += part.function?.arguments ?? "";
  }
}

/** A message as a request has it: without what is empty. */
function sent(message) {
  const entries = Object.entries(message).filter(([key, value]) => key === "content" || (value && value.length !== 0));
  return Object.fromEntries(entries);
}

function whole(message) {
  const shown = new ModelTurn();
  shown.show({ reasoning: "", tool_calls: [], ...message }, { isBusy: false });
  shown.node.turn = shown;
  return shown.node;
}

function toolAnswer(call, content) {
  return { role: "tool", name: call.function.name, tool_call_id: call.id, content };
}

function noted({ start, first, usage, end }) {
  const parts = [];
  if (usage) {
    parts.push(`${usage.completion_tokens} tokens`);
    const span = (performance.now() - (first ?? start)) / 1000;
    if (usage.completion_tokens > 1 && span > 0.01) parts.push(`${((usage.completion_tokens - 1) / span).toFixed(1)} tokens/s`);
  }
  if (first) parts.push(`first after ${((first - start) / 1000).toFixed(2)} s`);
  if (end === "length") parts.push("ended at its longest length");
  return parts.join(" · ");
}
