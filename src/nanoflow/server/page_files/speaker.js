// What screen readers are told of an answer that grows: whole sentences, each once.

/** Adds to an aria-live region. */
export class Speaker {
  constructor(region) {
    this.region = region;
    this.length = 0;
  }

  /** An answer begins. */
  begin() {
    this.region.replaceChildren();
    this.length = 0;
  }

  /** Tell what has become whole. */
  say(text) {
    const fresh = text.slice(this.length);
    const ends = [...fresh.matchAll(/[.!?:]\s|\n/g)];
    if (ends.length) this.tell(fresh.slice(0, ends.at(-1).index + 1));
  }

  /** The answer has ended: tell the rest, and how. */
  end(text, note) {
    this.tell(text.slice(this.length));
    if (note) this.region.append(paragraph(note));
  }

  tell(text) {
    this.length += text.length;
    if (text.trim()) this.region.append(paragraph(text));
  }
}

function paragraph(text) {
  const node = document.createElement("p");
  node.textContent = text;
  return node;
}
