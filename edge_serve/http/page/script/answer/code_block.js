// A block of code: its language, its text, and a button that copies it.

import { copyFrom } from "../copy.js";
import { node } from "../dom.js";
import { t } from "../words.js";
import { colour } from "./highlight.js";
import { patch } from "./patch.js";

const CHUNK_LINES = 200, MAX_CHUNK_CHARS = 50000;
const MAX_COLOURED_WHILE_WRITTEN = 8000;

export function languageOf(info) {
  return (/^[\w+#.-]{1,20}/.exec(info.trim()) ?? [""])[0];
}

/** Makes a block with this code in it. */
export function codeBlock(text, language) {
  const block = node("figure", "code");
  block.dataset.language = language;
  const caption = node("figcaption");
  const copy = node("button", "quiet", t("copy"));
  copy.type = "button";
  caption.append(node("span", "", language || "text"), copy);
  const pre = node("pre"), code = node("code");
  pre.tabIndex = 0;  // so that the keyboard can scroll it
  pre.append(code);
  block.append(caption, pre);
  extend(code, text);
  finish(block);
  return block;
}

export function codeOf(block) {
  return block.querySelector("code");
}

/** Adds text. In chunks, of which the browser lays out only those in view: a million lines are quick. */
export function extend(code, text) {
  code.size = (code.size ?? 0) + text.length;
  for (let at = 0; at < text.length;) {
    let chunk = code.lastChild;
    if (!chunk || chunk.left <= 0) {
      chunk = node("span", "chunk");
      chunk.append("");
      chunk.left = CHUNK_LINES;
      code.append(chunk);
    }
    const { end, lines } = nextLines(text, at, chunk.left);
    chunk.firstChild.appendData(text.slice(at, end));
    chunk.left = chunk.firstChild.length < MAX_CHUNK_CHARS ? chunk.left - lines : 0;
    chunk.style.setProperty("--lines", String(Math.max(1, CHUNK_LINES - chunk.left)));
    at = end;
  }
}

function nextLines(text, at, most) {
  let end = at, lines = 0;
  while (lines < most) {
    const next = text.indexOf("\n", end);
    if (next < 0 || next - at > MAX_CHUNK_CHARS) return { end: Math.min(text.length, at + MAX_CHUNK_CHARS), lines };
    end = next + 1;
    lines += 1;
  }
  return { end, lines };
}

/** Colours a block that is still being written, where that is quick. */
export function refresh(block) {
  const code = codeOf(block);
  const isShort = code.size <= MAX_COLOURED_WHILE_WRITTEN;
  const made = isShort ? colour(code, block.dataset.language) : null;
  if (made) {
    const whole = document.createDocumentFragment();
    whole.append(node("span", "chunk"));
    whole.firstChild.append(made);
    patch(code, whole);
    code.lastChild.left = 0;
  } else if (!isShort && code.firstElementChild?.firstElementChild) {
    rewrite(code);  // too long to be coloured time and again
  }
}

/** Colours a block that is complete. */
export function finish(block) {
  const code = codeOf(block);
  const made = colour(code, block.dataset.language);
  if (made) code.replaceChildren(made);
}

function rewrite(code) {
  const text = code.textContent;
  code.replaceChildren();
  code.size = 0;
  extend(code, text);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("figure.code figcaption button");
  if (button) copyFrom(button, () => codeOf(button.closest("figure")).textContent);
});
