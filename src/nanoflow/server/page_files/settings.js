// The settings, as fields of a request. They are kept in this tab.

import { byId, keep, kept } from "./dom.js";

const EXAMPLE = [{
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather at a place",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
}];
const NUMBERS = ["temperature", "max_tokens", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty"];
const JSON_FIELDS = {
  tools: (value) => (Array.isArray(value) ? null : "a list of tools is wanted"),
  others: (value) => (!value || typeof value !== "object" || Array.isArray(value) ? "an object is wanted"
    : (value.n ?? 1) === 1 ? null : "this page shows one answer, so n can only be 1"),
};

/** Fill the form with what was kept, and keep what is typed. */
export function startSettings() {
  const form = byId("fields");
  for (const [name, value] of Object.entries(kept("settings") ?? {})) if (form.elements[name]) form.elements[name].value = value;
  const save = () => keep("settings", Object.fromEntries(new FormData(form)));
  form.addEventListener("input", save);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { save(); Object.keys(JSON_FIELDS).forEach((name) => tell(name, null)); }));
  byId("example").addEventListener("click", () => { form.elements.tools.value = JSON.stringify(EXAMPLE, null, 1); save(); });
}

/** The fields of a request, without its messages; null if one is wrong, which is then said beside it. */
export function requestFields() {
  const form = byId("fields"), fields = {};
  for (const name of NUMBERS) {
    const input = form.elements[name];
    if (!input.checkValidity()) { byId("settings").open = true; input.reportValidity(); return null; }
    if (input.value !== "") fields[name] = Number(input.value);
  }
  for (const [name, problemOf] of Object.entries(JSON_FIELDS)) {
    const value = readJson(name, problemOf);
    if (value === undefined) return null;
    if (name === "others") Object.assign(fields, value);
    else if (value) fields[name] = value;
  }
  return fields;
}

/** The system prompt; empty if there is none. */
export const systemPrompt = () => byId("fields").elements.system.value;

/** The value of a field of JSON: null if it is empty, undefined if it is wrong. */
function readJson(name, problemOf) {
  const input = byId("fields").elements[name];
  let value = null, problem = null;
  if (input.value.trim()) {
    try {
      value = JSON.parse(input.value);
      problem = problemOf(value);
    } catch (error) {
      problem = error.message;
    }
  }
  tell(name, problem);
  if (problem === null) return value;
  byId("settings").open = true;
  input.focus();
  return undefined;
}

function tell(name, problem) {
  const place = byId(`${name}-problem`);
  place.textContent = problem ?? "";
  place.hidden = problem === null;
  byId("fields").elements[name].setAttribute("aria-invalid", String(problem !== null));
}
