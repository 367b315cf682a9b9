// Puts the page together: buttons, keys of the keyboard, the API key and the names of the model.

import { read } from "./api.js";
import { Chat } from "./chat.js";
import { byId, element, keep, kept } from "./dom.js";
import { startPanel } from "./panel.js";
import { startSettings } from "./settings.js";

// Characters that a key may have (docs/access.md).
const KEY = /^[\x21-\x7e]*$/;
const isPhone = matchMedia("(max-width: 52rem)").matches;
const isTouched = matchMedia("(pointer: coarse)").matches;

/** Ask the reader for the API key; true once one is given. */
function askForKey(why = null) {
  const dialog = byId("keys"), text = byId("keys-text");
  if (why) byId("keys-why").textContent = why;
  if (!dialog.open) {
    text.value = "";
    dialog.showModal();
    text.focus();
  }
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "given"), { once: true }));
}

function startKeys() {
  const dialog = byId("keys");
  byId("keys-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = byId("keys-text").value.trim();
    if (!KEY.test(key)) { byId("keys-why").textContent = "This is no key: keys have letters, digits and signs of ASCII alone."; return; }
    keep("key", key || null);
    byId("keys-text").value = "";
    dialog.close("given");
    showModels();
  });
  dialog.addEventListener("cancel", () => { dialog.returnValue = ""; });
  byId("keys-cancel").addEventListener("click", () => dialog.close(""));
  byId("key").addEventListener("click", () => askForKey());
}

/** List the names of the model; without a key that is needed, ask for it once. */
async function showModels() {
  const select = byId("model");
  try {
    const { data } = await read("v1/models");
    select.replaceChildren(...data.map(({ id }) => element("option", { value: id }, id)));
  } catch (failure) {
    select.replaceChildren();
    if (failure.status === 401 && !byId("keys").open) {
      await askForKey(kept("key") ? "The server does not know this key." : "This server needs a key. It is kept in this tab alone.");
    } else if (failure.status !== 401) {
      chat.tell(failure);
    }
  }
}

function startComposer() {
  const prompt = byId("prompt");
  const send = () => { if (chat.send(prompt.value)) prompt.value = ""; };
  byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouched) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !byId("keys").open) chat.stop(); });
  byId("stop").addEventListener("click", () => chat.stop());
  byId("retry").addEventListener("click", () => chat.retry());
  byId("new").addEventListener("click", () => { chat.reset(); prompt.focus(); });
}

if (isPhone) for (const name of ["live", "plan"]) byId(name).open = false;
byId("hint").hidden = isTouched;
if (!isTouched) byId("prompt").focus();
startSettings();
startKeys();
const chat = new Chat(() => askForKey("The server does not know this key, or none was given."), showModels);
startComposer();
showModels();
startPanel();
addEventListener("pagehide", () => chat.save());
