// Finds LaTeX in Markdown, and renders it as MathML.

import { node } from "../dom.js";

const MAX_CHARS = 4000;  // of one formula; longer ones are shown as source
const MAX_DOLLAR_CHARS = 400;  // between single dollars, which are mostly money
const ENVIRONMENT = /^\\begin\{((?:equation|align|alignat|gather|multline|cases|array|[bBpvV]?matrix|split)\*?)\}/;
const CACHE_SIZE = 300;

const cache = new Map();
const ahead = new WeakMap();  // by the state of a parse: where each close was looked for, and found

/** Teaches a markdown-it about `\(..\)`, `\[..\]`, `$..$`, `$$..$$`, `\boxed{..}` and environments. */
export function mathRules(md) {
  md.inline.ruler.before("escape", "math_inline", inlineRule);
  md.block.ruler.before("fence", "math_block", blockRule, { alt: ["paragraph", "blockquote", "list"] });
}

function inlineRule(state, silent) {
  const first = state.src[state.pos];
  if (first !== "\\" && first !== "$") return false;
  const ahead = state.src.slice(state.pos, Math.min(state.posMax, state.pos + MAX_CHARS));
  const found = first === "$" ? dollars(ahead) : backslashed(ahead);
  if (!found) return false;
  if (!silent) {
    const token = state.push("math_inline", "math", 0);
    token.content = found.tex;
    token.meta = { display: found.display };
  }
  state.pos += found.length;
  return true;
}

function between(text, open, close, display) {
  const end = text.indexOf(close, open.length);
  const tex = text.slice(open.length, end).trim();
  return end < 0 || !tex ? null : { tex, display, length: end + close.length };
}

function backslashed(text) {
  if (text.startsWith("\\(")) return between(text, "\\(", "\\)", false);
  if (text.startsWith("\\[")) return between(text, "\\[", "\\]", true);
  if (!text.startsWith("\\boxed{")) return null;
  let depth = 0;
  for (let at = "\\boxed".length; at < text.length; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "{") depth += 1;
    else if (text[at] === "}" && --depth === 0) {
      return { tex: text.slice(0, at + 1), display: false, length: at + 1 };
    }
  }
  return null;
}

function dollars(text) {
  if (text.startsWith("$$")) return between(text, "$$", "$$", true);
  if (/^\$\s/.test(text)) return null;
  // "$5 and $10" is no formula: the last dollar follows a space, or a digit follows it.
  for (let at = 1; at < Math.min(text.length, MAX_DOLLAR_CHARS); at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "$") {
      if (at === 1 || /\s/.test(text[at - 1]) || /\d/.test(text[at + 1] ?? "")) return null;
      return { tex: text.slice(1, at), display: false, length: at + 1 };
    }
  }
  return null;
}

// Where the next `close` is from a position on, or -1; looked for once, as every line may begin a formula.
function nextClose(state, close, from) {
  if (!ahead.has(state)) ahead.set(state, new Map());
  const known = ahead.get(state).get(close);
  if (known && known.from <= from && (known.at < 0 || from <= known.at)) return known.at;
  const at = state.src.indexOf(close, from);
  ahead.get(state).set(close, { from, at });
  return at;
}

function blockRule(state, startLine, endLine, silent) {
  const begin = (line) => state.bMarks[line] + state.tShift[line];
  const first = state.src.slice(begin(startLine), state.eMarks[startLine]);
  const environment = ENVIRONMENT.exec(first);
  const open = environment ? "" : first.startsWith("\\[") ? "\\[" : first.startsWith("$$") ? "$$" : null;
  if (open === null) return false;
  const close = environment ? `\\end{${environment[1]}}` : open === "$$" ? "$$" : "\\]";
  const end = nextClose(state, close, begin(startLine) + open.length);
  const closed = end >= 0 && end < state.eMarks[endLine - 1];
  if (!closed && !state.env.unfinished) return false;
  const after = closed ? state.src.indexOf("\n", end) : -1;
  if (closed && state.src.slice(end + close.length, after < 0 ? undefined : after).trim()) return false;
  let line = startLine;
  while (closed ? state.eMarks[line] <= end : line < endLine - 1) {
    line += 1;
    if (state.sCount[line] < state.blkIndent && begin(line) < state.eMarks[line]) return false;  // left the block
  }
  if (silent) return true;
  const lines = [];
  for (let at = startLine; at <= line; at += 1) {
    const to = closed && at === line ? end + (environment ? close.length : 0) : state.eMarks[at];
    lines.push(state.src.slice(begin(at) + (at === startLine ? open.length : 0), to));
  }
  const token = state.push("math_block", "math", 0);
  token.block = true;
  token.content = lines.join("\n").trim();
  token.map = [startLine, line + 1];
  token.meta = { display: true, unfinished: !closed };
  state.line = line + 1;
  return true;
}

/** Makes the element of a formula; what Temml cannot read stays visible as its source. */
export function mathNode(token) {
  const { display, unfinished } = token.meta;
  const tex = token.content;
  if (unfinished || tex.length > MAX_CHARS) return node(display ? "pre" : "code", "tex", tex);
  const key = `${display} ${tex}`;
  if (!cache.has(key)) {
    if (cache.size >= CACHE_SIZE) cache.delete(cache.keys().next().value);
    cache.set(key, render(tex, display));
  }
  return cache.get(key).cloneNode(true);
}

function render(tex, display) {
  const holder = node(display ? "div" : "span", "math");
  try {
    globalThis.temml.render(tex, holder, {
      displayMode: display, throwOnError: true, trust: false, maxSize: [20, 20], maxExpand: 500,
    });
  } catch (error) {
    const source = node(display ? "pre" : "code", "tex", tex);
    source.title = String(error.message).slice(0, 200);
    return source;
  }
  return holder;
}
