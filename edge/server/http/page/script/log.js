// Shows the conversation: its turns, and what went wrong.

import { pathOf } from "./conversation.js";
import { $, node } from "./dom.js";
import { state } from "./state.js";
import { t } from "./words.js";

const NEAR_PX = 120;  // who is closer to the end follows what comes
const MAX_WAIT_S = 120;

/** Shows the way to the leaf with `makeView(turn)`; returns the view of the last turn. */
export function drawLog(makeView) {
  for (const old of $("log").querySelectorAll(".turn")) old.remove();
  const views = pathOf(state.conversation).map(makeView);
  $("empty").hidden = views.length > 0;
  $("log").append(...views.map((view) => view.root));
  return views.at(-1) ?? null;
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
