// What stands beside the chat, or in its place where the window is narrow: the list and the panel.

import { $ } from "./dom.js";
import { load, save } from "./tab.js";
import { t } from "./words.js";

const narrow = matchMedia("(max-width: 64rem)");

/** Whether there is room for one part of the page only. */
export const isNarrow = () => narrow.matches;

export function openList(open) {
  document.body.classList.toggle("list", open);
  if (open && isNarrow()) openPanel(false);
  $("list-toggle").setAttribute("aria-expanded", String(open));
}

export function openPanel(open) {
  document.body.classList.toggle("panel", open);
  if (open && isNarrow()) openList(false);
  $("panel-toggle").setAttribute("aria-expanded", String(open));
  $("panel-toggle").textContent = t(open && isNarrow() ? "chat" : "panel");
  if (!isNarrow()) save("panel", open);
}

/** Shows what there is room for, also when that changes. */
export function startSides() {
  narrow.addEventListener("change", showWhatFits);
  showWhatFits();
}

function showWhatFits() {
  openList(!isNarrow());
  $("prompt").placeholder = t(isNarrow() ? "message" : "message_hint");
  openPanel(!isNarrow() && load("panel", matchMedia("(min-width: 90rem)").matches));
}
