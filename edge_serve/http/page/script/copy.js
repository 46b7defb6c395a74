// Copies text, also where the page came over plain http and browsers keep their clipboard from it.

import { t } from "./words.js";

const SHOWN_MS = 2000;

async function copy(text) {
  if (window.isSecureContext && navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch (error) {
      console.warn("clipboard:", error.message);  // not allowed: the older way may be
    }
  }
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "sr";
  area.setAttribute("aria-hidden", "true");
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus({ preventScroll: true });
  return done;
}

/** Copies what `text` returns; the button says for a moment whether that worked. */
export async function copyFrom(button, text) {
  const name = button.dataset.name ??= button.textContent;
  button.textContent = t(await copy(text()) ? "copied" : "not_copied");
  setTimeout(() => { button.textContent = name; }, SHOWN_MS);
}
