// Makes elements of Markdown: the parser's tokens become nodes, one by one, and no text becomes HTML.

import MarkdownIt from "../../vendor/markdown-it/markdown-it.esm.min.mjs";
import { node } from "../dom.js";
import { codeBlock, languageOf } from "./code_block.js";
import { mathNode, mathRules } from "./math.js";

const TAGS = new Set(["p", "ul", "ol", "li", "blockquote", "table", "thead", "tbody", "tr", "th", "td", "em",
  "strong", "s", "h1", "h2", "h3", "h4", "h5", "h6"]);
const HEADING_OFFSET = 2;  // the page has headings of its own above
const LINK = /^(?:https?:\/\/|mailto:)/i;

const md = new MarkdownIt({ html: false, linkify: true, breaks: true });
md.use(mathRules);

/** Parses Markdown; returns the tokens of each block of the top level. */
export function blocksOf(text, env) {
  const blocks = [];
  let open = null;
  for (const token of md.parse(text, env)) {
    if (!open) blocks.push(open = []);
    open.push(token);
    if (token.level === 0 && token.nesting <= 0) open = null;
  }
  return blocks;
}

/** Makes the one element of a block. */
export function elementOf(block) {
  const root = document.createDocumentFragment();
  const stack = [root];
  for (const token of block) {
    const top = stack.at(-1);
    if (token.type === "inline") inline(token.children, top);
    else if (token.nesting === 1) stack.push(token.hidden ? top : opened(token, top));
    else if (token.nesting === -1) stack.pop();
    else top.append(single(token));
  }
  return root.firstChild ?? node("p");
}

function opened(token, parent) {
  const heading = /^h([1-6])$/.exec(token.tag);
  const tag = heading ? `h${Math.min(6, Number(heading[1]) + HEADING_OFFSET)}` : token.tag;
  if (!TAGS.has(tag)) return parent;
  const made = node(tag);
  if (heading) made.dataset.level = heading[1];
  const start = tag === "ol" && Number(token.attrGet("start"));
  if (start) made.start = start;
  const align = /text-align:(left|center|right)/.exec(token.attrGet("style") ?? "");
  if (align) made.dataset.align = align[1];
  if (tag !== "table") {
    parent.append(made);
    return made;
  }
  const frame = node("div", "table");
  frame.tabIndex = 0;  // so that the keyboard can scroll it
  frame.setAttribute("role", "group");
  frame.append(made);
  parent.append(frame);
  return made;
}

function single(token) {
  switch (token.type) {
    case "fence": return codeBlock(token.content, languageOf(token.info));
    case "code_block": return codeBlock(token.content, "");
    case "math_block": return mathNode(token);
    case "hr": return node("hr");
    default: return document.createTextNode(token.content);
  }
}

function inline(tokens, parent) {
  const stack = [parent];
  for (const token of tokens) {
    const top = stack.at(-1);
    switch (token.type) {
      case "text": top.append(top.firstChild || top.tagName !== "LI" && top.parentNode?.tagName !== "LI"
        ? token.content : ticked(token.content)); break;
      case "softbreak": case "hardbreak": top.append(node("br")); break;
      case "code_inline": top.append(node("code", "", token.content)); break;
      case "math_inline": top.append(mathNode(token)); break;
      case "image": top.append(picture(token)); break;
      case "link_open": stack.push(link(token.attrGet("href"), top)); break;
      default:
        if (token.nesting === 1) stack.push(opened(token, top));
        else if (token.nesting === -1) stack.pop();
        else top.append(token.content);
    }
  }
}

function ticked(text) {
  return text.replace(/^\[ \] /, "☐ ").replace(/^\[[xX]\] /, "☑ ");
}

function link(href, parent) {
  if (!LINK.test(href ?? "")) return parent;  // only its text: it would lead into this server
  const made = node("a");
  made.href = href;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  parent.append(made);
  return made;
}

// A picture is never loaded: asking for it would tell another machine what is talked about here.
function picture(token) {
  const box = node("span");
  link(token.attrGet("src"), box).append(token.content || token.attrGet("src") || "");
  return box;
}
