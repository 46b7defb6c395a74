// Colours code. A language's grammar is loaded when it is first met.

import hljs from "../../vendor/highlight/core.min.js";
import { node } from "../dom.js";

const MAX_CHARS = 60000;  // longer code stays without colour

// Every file of vendor/highlight/languages, and the other names that fences give it.
const NAMES = {
  bash: "sh zsh", c: "h", cpp: "c++ cc hpp", csharp: "c# cs", css: "", diff: "patch", dockerfile: "docker",
  go: "golang", ini: "toml", java: "", javascript: "js jsx mjs", json: "jsonc", kotlin: "kt", latex: "tex",
  lua: "", makefile: "make", markdown: "md", matlab: "", php: "", powershell: "ps1 pwsh", python: "py python3",
  r: "", ruby: "rb", rust: "rs", shell: "console", sql: "", swift: "", typescript: "ts tsx",
  xml: "html svg xhtml", yaml: "yml",
};
const GRAMMARS = new Map();
for (const [name, others] of Object.entries(NAMES)) {
  for (const one of [name, ...others.split(" ")]) if (one) GRAMMARS.set(one, name);
}

const loading = new Map();

/** Returns the coloured text of an element that holds nothing but code; null where it cannot, or not yet. */
export function colour(code, language) {
  const grammar = GRAMMARS.get(language.toLowerCase());
  if (!grammar || !code.size || code.size > MAX_CHARS) return null;
  if (hljs.getLanguage(grammar)) return coloured(code.textContent, grammar);
  load(grammar).then(() => {
    // One that is still written is coloured when more of it comes.
    const made = code.isConnected && !code.isGrowing && coloured(code.textContent, grammar);
    if (made) code.replaceChildren(made);
  });
  return null;
}

function load(grammar) {
  if (!loading.has(grammar)) {
    loading.set(grammar, import(`../../vendor/highlight/languages/${grammar}.min.js`).then(
      (module) => hljs.registerLanguage(grammar, module.default),
      (error) => console.warn("no colours:", error.message),
    ));
  }
  return loading.get(grammar);
}

function coloured(text, grammar) {
  if (!hljs.getLanguage(grammar) || text.length > MAX_CHARS) return null;
  // The tree that the library makes its HTML from: elements can be made from it as well.
  const tree = hljs.highlight(text, { language: grammar, ignoreIllegals: true })._emitter.root;
  const made = document.createDocumentFragment();
  append(made, tree.children);
  return made;
}

function append(parent, children) {
  for (const child of children) {
    if (typeof child === "string") { parent.append(child); continue; }
    const span = node("span", `hl-${String(child.scope ?? "").split(".")[0]}`);
    append(span, child.children);
    parent.append(span);
  }
}
