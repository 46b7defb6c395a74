// Shows the conversation: its turns, and what went wrong.

import { pathOf } from "./conversation.js";
import { $, node } from "./dom.js";
import { state } from "./state.js";
import { t } from "./words.js";

const NEAR_PX = 120;  // who is closer to the end follows what comes
const MAX_WAIT_S = 120;

// Views by turn: what is shown already stays as it is, with its folds, its selection and its place.
const views = new WeakMap();

/** Returns the view of a turn that is shown. */
export const viewOf = (turn) => views.get(turn);

/** Shows the way to the leaf with `makeView(turn)`, and two answers side by side at its end. */
export function drawLog(makeView) {
  const { conversation } = state;
  const turns = pathOf(conversation), pair = conversation.pair?.map((id) => conversation.turns[id]) ?? [];
  if (pair.length) turns.pop();
  for (const turn of [...turns, ...pair]) {
    if (views.has(turn)) views.get(turn).update(true);
    else views.set(turn, makeView(turn));
  }
  const roots = [...turns, ...pair].map((turn) => views.get(turn).root);
  const wanted = new Set(roots);
  for (const old of $("log").querySelectorAll(".turn")) if (!wanted.has(old)) old.remove();
  $("empty").hidden = roots.length > 0;
  const own = roots.slice(0, turns.length);
  $("log").append(...own.filter((root) => root.parentNode !== $("log")));
  showPair(roots.slice(turns.length));
}

function showPair(roots) {
  let box = $("log").querySelector(".pair");
  if (!roots.length) { box?.remove(); return; }
  if (!box) {
    box = node("div", "pair");
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", t("compare"));
    box.append(node("p", "hint", t("compare_note")));
  }
  if (box.parentNode !== $("log") || box.nextSibling) $("log").append(box);
  for (const root of roots) if (root.parentNode !== box) box.insertBefore(root, box.lastChild);
}

/** Shows an error below the last turn, with a button that tries again. */
export function showError(text, retryAfterS, again) {
  clearErrors();
  const box = node("div", "turn error", text);
  box.setAttribute("role", "alert");
  const button = node("button", "", t("again"));
  button.type = "button";
  button.addEventListener("click", again);
  let left = Math.min(retryAfterS, MAX_WAIT_S);
  const tick = () => {
    button.textContent = left > 0 ? t("again_in", { n: left }) : t("again");
    button.disabled = left > 0;
    if (left-- > 0) setTimeout(tick, 1000);
  };
  tick();
  box.append(button);
  $("empty").hidden = true;
  $("log").append(box);
  toEnd(true);
}

export function clearErrors() {
  for (const old of $("log").querySelectorAll(".turn.error")) old.remove();
}

/** Scrolls to the end, unless the reader is elsewhere. */
export function toEnd(force) {
  const log = $("log");
  if (force || log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX) log.scrollTop = log.scrollHeight;
}
