// Shows Markdown that grows. Blocks that are complete are never touched again; only the last one is
// parsed anew, and a block of code that is still open is only added to.

import { node } from "../dom.js";
import { codeBlock, codeOf, extend, finish, languageOf, refresh } from "./code_block.js";
import { blocksOf, elementOf } from "./elements.js";
import { patch } from "./patch.js";

const MAX_BLOCK_CHARS = 20000;  // a longer block is no prose: it is shown as plain text
const FENCE = /^(`{3,}|~{3,})([^\n]*)\n/m;
const CONTAINERS = new Set(["P", "UL", "OL", "LI", "BLOCKQUOTE", "H3", "H4", "H5", "H6", "FIGURE", "PRE", "CODE",
  "SPAN", "EM", "STRONG", "S", "A", "DIV", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD"]);

export class MarkdownView {
  /** Args: the element to show it in, which has nothing else in it. */
  constructor(root) {
    this.root = root;
    root.classList.add("md");
    this.caret = node("span", "caret");
    this.caret.setAttribute("aria-hidden", "true");
    this.reset();
  }

  reset() {
    this.text = "";
    this.done = 0;  // characters whose elements are final
    this.num = 0;  // such elements
    this.fence = null;  // the block of code that is open
    this.plain = null;
    this.final = false;
    this.env = {};
    this.root.replaceChildren();
  }

  /** Shows a text that the one before begins; `final` once nothing more will come. */
  update(given, final) {
    const text = given.includes("\r") ? given.replace(/\r\n?/g, "\n") : given;
    const goesOn = this.final && (!final || text !== this.text);
    if (goesOn || !text.startsWith(this.text) || (final && this.plain && !this.final)) this.reset();
    this.caret.remove();
    this.text = text;
    this.final = final;
    if (!this.plain) {
      while ((!this.fence || this.#extendFence(final)) && this.#parse(final));
    }
    if (this.plain) this.#extendPlain();
    if (!final) this.#placeCaret();
  }

  /** Returns whether there is more to do. */
  #parse(final) {
    const tail = this.text.slice(this.done);
    if (tail.length <= MAX_BLOCK_CHARS) return this.#show(tail, final);
    const fence = FENCE.exec(tail.slice(0, MAX_BLOCK_CHARS));
    if (fence?.index === 0) {
      this.#beginFence(fence[1], fence[2], this.done + fence[0].length);
      return true;
    }
    // Long texts are parsed in pieces that end where a block does.
    const cut = fence ? fence.index : tail.lastIndexOf("\n\n", MAX_BLOCK_CHARS) + 1;
    if (!cut) return this.#beginPlain();
    this.#show(tail.slice(0, cut), true);
    this.done += cut;
    return true;
  }

  #show(tail, final) {
    const env = { references: { ...this.env.references }, unfinished: !final };
    const blocks = blocksOf(final ? tail : completed(tail), env);
    const made = document.createDocumentFragment();
    const fence = final || !blocks.length ? null : openFence(blocks.at(-1), tail);
    if (fence) blocks.pop();
    made.append(...blocks.map(elementOf));
    patch(this.root, made, this.root.childNodes[this.num] ?? null);
    if (final || fence) this.num += blocks.length;
    if (final) {
      if (this.done + tail.length === this.text.length) this.done = this.text.length;
      return false;
    }
    this.env.references = env.references;
    if (fence) {
      this.#beginFence(fence.marker, fence.info, this.done + fence.at);
      return true;
    }
    if (blocks.length > 1) {
      this.num += blocks.length - 1;
      this.done += offsetOfLine(tail, blocks.at(-1)[0].map[0]);
    }
    return false;
  }

  #beginFence(marker, info, at) {
    const block = codeBlock("", languageOf(info));
    codeOf(block).isGrowing = true;
    while (this.root.childNodes.length > this.num) this.root.lastChild.remove();
    this.root.append(block);
    const end = new RegExp(`^ {0,3}${marker[0]}{${marker.length},}[ \\t]*$`, "gm");
    this.fence = { block, end, at };
  }

  /** Adds what has come to the open block of code; returns whether it has ended. */
  #extendFence(final) {
    const fence = this.fence, code = codeOf(fence.block);
    fence.end.lastIndex = fence.at;
    const found = fence.end.exec(this.text);
    const closed = found && (final || this.text[fence.end.lastIndex] === "\n");
    let to = closed ? found.index : this.text.length;
    if (!closed && !final) {
      // The begin of a last line that may become the end of the block is held back.
      const line = this.text.lastIndexOf("\n", to - 1) + 1;
      if (line >= fence.at && /^ {0,3}[`~]*[ \t]*$/.test(this.text.slice(line))) to = line;
    }
    if (to > fence.at) {
      extend(code, this.text.slice(fence.at, to));
      fence.at = to;
      if (!closed) refresh(fence.block);
    }
    if (!closed && !final) return false;
    code.isGrowing = false;
    finish(fence.block);
    this.done = closed ? Math.min(this.text.length, fence.end.lastIndex + 1) : this.text.length;
    this.num += 1;
    this.fence = null;
    return true;
  }

  #beginPlain() {
    this.plain = { element: node("div", "plain"), at: this.done };
    while (this.root.childNodes.length > this.num) this.root.lastChild.remove();
    this.root.append(this.plain.element);
    return false;
  }

  #extendPlain() {
    extend(this.plain.element, this.text.slice(this.plain.at));
    this.plain.at = this.text.length;
  }

  #placeCaret() {
    let place = this.root;
    for (let last = place.lastElementChild; last && CONTAINERS.has(last.tagName); last = place.lastElementChild) {
      if (last !== place.lastChild && place.lastChild.nodeValue?.trim()) break;
      if (last.classList.contains("math")) break;
      place = last;
    }
    place.append(this.caret);
  }
}

function openFence(block, tail) {
  const [token] = block;
  if (token.type !== "fence") return null;
  const begin = offsetOfLine(tail, token.map[0]);
  const head = FENCE.exec(tail.slice(begin));
  if (head?.index !== 0) return null;  // indented, or its first line is not complete
  const rest = tail.slice(begin + head[0].length);
  const end = new RegExp(`^ {0,3}${head[1][0]}{${head[1].length},}[ \\t]*\\n`, "m");
  return end.test(rest) ? null : { marker: head[1], info: head[2], at: begin + head[0].length };
}

function offsetOfLine(text, line) {
  let at = 0;
  for (let left = line; left > 0; left -= 1) at = text.indexOf("\n", at) + 1;
  return at;
}

// Marks that are still open would be seen as such and vanish a moment later.
function completed(tail) {
  const last = tail.slice(tail.lastIndexOf("\n\n") + 1);
  if (/^\s*(?:```|~~~)/m.test(last) || last.includes("$")) return tail;
  const count = (mark) => last.split(mark).length - 1;
  if (count("`") % 2) return `${tail}\``;
  if (count("**") % 2 && /\S$/.test(tail)) return tail.endsWith("**") ? tail.slice(0, -2) : `${tail}**`;
  return tail;
}
