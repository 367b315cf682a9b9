// How the messages of a conversation are shown.

import { element } from "./dom.js";
import { render } from "./markdown.js";

const WHO = { user: "You", assistant: "Model", tool: "Answer of a tool" };

/** Show a message that does not grow. */
export function turn(message) {
  const text = element("div", { class: "text", dir: "auto" }, message.content);
  const who = message.role === "tool" && message.name ? `Answer of ${message.name}` : WHO[message.role];
  return element("article", { class: `turn ${message.role}` }, element("h2", {}, who), text);
}

/** Shows a message of the model, which grows. */
export class ModelTurn {
  constructor() {
    this.node = element("article", { class: "turn assistant" }, element("h2", {}, WHO.assistant));
    this.reasoningText = element("div", { dir: "auto" });
    this.reasoning = element("details", { class: "reasoning", hidden: true }, element("summary", {}, "Reasoning"), this.reasoningText);
    this.content = element("div", { class: "rendered" });
    this.calls = element("div");
    this.foot = element("small", { class: "foot" });
    this.node.append(this.reasoning, this.content, this.calls, this.foot);
  }

  /** Show what there is of the message now. */
  show(message, { isBusy }) {
    this.node.classList.toggle("busy", isBusy);
    this.node.setAttribute("aria-busy", String(isBusy));
    this.reasoning.hidden = !message.reasoning;
    if (this.reasoningText.textContent !== message.reasoning) this.reasoningText.textContent = message.reasoning;
    render(message.content, this.content);
    this.calls.replaceChildren(...message.tool_calls.map(call));
  }

  /** Show a line below the message. */
  note(text) { this.foot.textContent = text; }

  /** Ask the reader for the answers of the tools that were called; `answer` is given them in order, true if it takes them. */
  askForAnswers(calls, answer) {
    const texts = calls.map(() => element("textarea", { rows: 2, class: "code", required: true, dir: "auto" }));
    const submit = (event) => {
      event.preventDefault();
      if (answer(texts.map((text) => text.value))) form.remove();
    };
    const form = element("form", { class: "fields answers", on: { submit } },
      ...calls.map((each, at) => element("label", {}, `Answer of ${each.function.name}`, texts[at])),
      element("div", { class: "row" }, element("button", { type: "submit", class: "main" }, "Send the answers")));
    this.node.append(form);
    return texts[0];
  }
}

function call({ function: { name, arguments: given } }) {
  let shown = given;
  try { shown = JSON.stringify(JSON.parse(given), null, 1); } catch { /* it is not whole yet, or no JSON */ }
  return element("div", { class: "call", role: "group", "aria-label": `Call of ${name}` },
    element("strong", {}, `Calls ${name}`), element("pre", { tabindex: 0, "aria-label": "Arguments" }, shown));
}
