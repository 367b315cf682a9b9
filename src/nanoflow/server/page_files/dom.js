// Elements from code. Text is only ever set as text, so nothing that a model or a server says can become markup.

/** The element with an id of index.html. */
export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; children that are no elements become text. */
export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** The same for SVG. */
export function drawn(name, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [kind, listener] of Object.entries(value)) node.addEventListener(kind, listener);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// What is kept in this tab alone. Servers at different paths of one host have different places.
const place = (name) => `nanoflow ${location.pathname} ${name}`;

/** A kept value; null if there is none. */
export function kept(name) {
  try { return JSON.parse(sessionStorage.getItem(place(name))); } catch { return null; }
}

/** Keep a value; null removes it. A full or forbidden storage is no error: the value is gone after a reload. */
export function keep(name, value) {
  try {
    if (value === null) sessionStorage.removeItem(place(name));
    else sessionStorage.setItem(place(name), JSON.stringify(value));
  } catch { /* see above */ }
}
