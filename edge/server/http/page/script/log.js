// Shows the conversation: its turns, and what went wrong.

import { pathOf } from "./conversation.js";
import { $, node } from "./dom.js";
import { state } from "./state.js";
import { t } from "./words.js";

const NEAR_PX = 120;  // who is closer to the end follows what comes
const MAX_WAIT_S = 120;

// Views by turn: what is shown already stays as it is, with its folds, its selection and its place.
const views = new WeakMap();

/** Shows the way to the leaf with `makeView(turn)`; returns the view of the last turn. */
export function drawLog(makeView) {
  const path = pathOf(state.conversation).map((turn) => {
    const known = views.get(turn);
    if (known) known.update(true);
    else views.set(turn, makeView(turn));
    return views.get(turn);
  });
  const wanted = new Set(path.map((view) => view.root));
  for (const old of $("log").querySelectorAll(".turn")) if (!wanted.has(old)) old.remove();
  $("empty").hidden = path.length > 0;
  $("log").append(...path.map((view) => view.root).filter((root) => !root.isConnected));
  return path.at(-1) ?? null;
}

/** Shows an error below the last turn, with a button that tries again. */
export function showError(text, retryAfterS, again) {
  clearErrors();
  const box = node("div", "turn error", text);
  box.setAttribute("role", "alert");
  const button = node("button", "", t("again"));
  button.type = "button";
  button.addEventListener("click", () => { box.remove(); again(); });
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
