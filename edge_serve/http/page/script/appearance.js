// How the page looks in this browser: its colours and its language.

import { $ } from "./dom.js";
import { state } from "./state.js";
import { browser } from "./tab.js";

function showTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

/** Shows the choices that were made, and takes new ones. */
export function startAppearance() {
  for (const [name, fallback, act] of [
    ["theme", "system", showTheme],
    ["language", "", () => { state.request?.abort(); location.reload(); }],  // every word is written anew
  ]) {
    const select = $(name), kept = browser.load(name, fallback);
    select.value = kept;
    if (select.value !== kept) select.value = fallback;
    select.addEventListener("change", () => { browser.save(name, select.value); act(select.value); });
  }
  showTheme($("theme").value);
}
