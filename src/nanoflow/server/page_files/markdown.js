// The parts of Markdown that models write most, as elements. What is not understood stays text; HTML stays text too.

import { element } from "./dom.js";

// What begins a block of code: backticks that do not end on the same line, or tildes. The same alone end it.
const FENCE = /^\s*(?:(```+)(?=[^`]*$)|(~~~+))\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const MAX_INLINE = 6000;
// A text runs as its first letter does, from the left or from the right.
const AUTO = { dir: "auto" };
// Lengths are bounded, so that no text takes long to search.
const INLINE = new RegExp([
  /(`{1,9})([^`]|[^`][^]{0,2000}?[^`])\1(?!`)/, /\*\*(\S[^]{0,2000}?)\*\*/, /\*(\S[^*]{0,2000}?)\*(?!\w)/,
  /\[([^\]\n]{1,500})\]\((https?:\/\/[^\s)]{1,2000})\)/,
].map((part) => part.source).join("|"));

/** Cut a text into blocks: [{kind, text, ...}]. A block that has ended never changes as text is added after it. */
export function blocks(text) {
  const found = [];
  let lines = [];
  const close = () => {
    if (lines.length) found.push({ kind: "text", text: lines.join("\n") });
    lines = [];
  };
  const all = text.split("\n");
  for (let at = 0; at < all.length; at++) {
    const fence = FENCE.exec(all[at]);
    if (fence) {
      close();
      const code = [], mark = fence[1] ?? fence[2], isEnd = (line) => line.startsWith(mark) && !line.replaceAll(mark[0], "");
      while (++at < all.length && !isEnd(all[at].trim())) code.push(all[at]);
      found.push({ kind: "code", text: code.join("\n"), language: fence[3] });
    } else if (all[at].trim() === "") {
      close();
    } else {
      lines.push(all[at]);
    }
  }
  close();
  return found;
}

/** Show a growing text in an element: blocks that are the same as before keep their elements. */
export function render(text, into) {
  const shown = into.shown ?? (into.shown = []);
  const wanted = blocks(text);
  const sources = wanted.map((block) => JSON.stringify(block));
  let same = 0;
  while (same < shown.length && same < sources.length && shown[same] === sources[same]) same++;
  while (into.childNodes.length > same) into.lastChild.remove();
  for (const block of wanted.slice(same)) into.append(block.kind === "code" ? code(block) : prose(block.text));
  into.shown = sources;
}

function code({ text, language }) {
  const copy = element("button", { type: "button", on: { click: () => navigator.clipboard?.writeText(text) } }, "Copy");
  return element("div", { class: "block" }, element("pre", { tabindex: 0, "aria-label": `Code ${language}` },
    element("code", {}, text)), navigator.clipboard ? copy : null);
}

function prose(text) {
  const lines = text.split("\n");
  const heading = lines.length === 1 && /^(#{1,6})\s+(.*)$/.exec(lines[0]);
  if (heading) return element("h3", AUTO, ...inline(heading[2]));
  if (lines.every((line) => /^\s*>/.test(line))) {
    return element("blockquote", AUTO, ...inline(lines.map((line) => line.replace(/^\s*>\s?/, "")).join("\n")));
  }
  if (ITEM.test(lines[0])) return list(lines);
  return element("p", AUTO, ...inline(text));
}

/** A list; an indented item is one of a list inside the item before it, one level deep. */
function list(lines) {
  const kind = (mark) => (/\d/.test(mark) ? "ol" : "ul");
  const [, , mark] = ITEM.exec(lines[0]);
  const top = element(kind(mark), /\d/.test(mark) ? { ...AUTO, start: parseInt(mark, 10) } : AUTO);
  let inner = null;
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (!found) {
      (inner ?? top).lastChild.append("\n", ...inline(line.trim()));
    } else if (found[1].length >= 2 && top.lastChild) {
      if (!inner) top.lastChild.append((inner = element(kind(found[2]))));
      inner.append(element("li", {}, ...inline(found[3])));
    } else {
      inner = null;
      top.append(element("li", {}, ...inline(found[3])));
    }
  }
  return top;
}

/** Code, bold, italic and links inside a text, as text and elements. A very long one stays as it is. */
export function inline(text) {
  if (text.length > MAX_INLINE) return [text];
  const parts = [];
  for (;;) {
    const found = INLINE.exec(text);
    if (!found) return text ? [...parts, text] : parts;
    if (found.index) parts.push(text.slice(0, found.index));
    parts.push(marked(found));
    text = text.slice(found.index + found[0].length);
  }
}

function marked([, , codeText, bold, italic, label, url]) {
  if (codeText !== undefined) return element("code", {}, codeText);
  if (bold !== undefined) return element("strong", {}, ...inline(bold));
  if (italic !== undefined) return element("em", {}, ...inline(italic));
  return element("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, label);
}
