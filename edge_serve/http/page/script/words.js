// The page's words, in the language that was chosen, or the first of the browser's that there is a catalogue for.

import en from "../lang/en.js";
import zh from "../lang/zh.js";
import { browser } from "./tab.js";

const CATALOGUES = { en, zh };
const found = [browser.load("language", ""), ...navigator.languages]
  .map((tag) => String(tag).slice(0, 2).toLowerCase()).find((tag) => Object.hasOwn(CATALOGUES, tag)) ?? "en";

export const language = found === "zh" ? "zh-Hans" : "en";

/** Returns the text of a key, with `{name}` replaced by the value of that name. */
export function t(key, values = {}) {
  const text = CATALOGUES[found][key];
  if (text === undefined) throw new Error(`no text for ${key}`);
  return text.replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

/** Returns the text of a key, or where there is none the key as words: names that the server may add to. */
export const nameOf = (key) => Object.hasOwn(CATALOGUES[found], key) ? t(key) : key.replaceAll("_", " ");

const numbers = new Intl.NumberFormat(language);
export const count = (value) => numbers.format(value);

/** Writes the words into the elements that name them. */
export function translate(root) {
  document.documentElement.lang = language;
  for (const [data, write] of [
    ["t", (one, text) => { one.textContent = text; }],
    ["tLabel", (one, text) => { one.setAttribute("aria-label", text); if (one.tagName === "BUTTON") one.title = text; }],
    ["tPlaceholder", (one, text) => one.setAttribute("placeholder", text)],
  ]) {
    const name = `data-${data.replace(/[A-Z]/, (letter) => `-${letter.toLowerCase()}`)}`;
    for (const one of root.querySelectorAll(`[${name}]`)) write(one, t(one.dataset[data]));
  }
}
