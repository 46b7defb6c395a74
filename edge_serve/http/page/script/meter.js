// The context meter: how much of the model's context this chat has taken.

import { pathOf, textOf } from "./conversation.js";
import { $ } from "./dom.js";
import { chosenModel, state } from "./state.js";
import { count, t } from "./words.js";

const WARN_SHARE = 0.8;

/** Returns the tokens of a text, about: one for each ideograph and for every four other characters. */
export function estimate(text) {
  const wide = (text.match(/[\u2e80-\u9fff\uac00-\ud7af\uff00-\uffef]/g) ?? []).length;
  return wide + Math.ceil((text.length - wide) / 4);
}

/** Returns the tokens that the next prompt has, about; the last answer's figures are exact. */
export function usedTokens(path, draft, files) {
  let used = estimate(textOf({ content: draft, files }));
  for (const turn of [...path].reverse()) {
    const { figures } = turn;
    if (figures?.prompt_tokens) {
      return used + figures.prompt_tokens + figures.completion_tokens - (figures.reasoning_tokens ?? 0);
    }
    used += estimate(textOf(turn));
  }
  return used;
}

export function showMeter() {
  const limit = chosenModel()?.max_model_len;
  const path = pathOf(state.conversation), draft = $("prompt").value;
  $("meter").hidden = !limit || (!path.length && !draft && !state.files.length);
  if ($("meter").hidden) return;
  const used = usedTokens(path, draft, state.files), left = Math.max(0, limit - used);
  $("meter-bar").max = limit;
  $("meter-bar").value = Math.min(used, limit);
  const isFull = left === 0, isNear = used > WARN_SHARE * limit;
  $("meter").classList.toggle("near", isNear);
  const key = isFull ? "context_full" : isNear ? "context_near" : "context";
  $("meter-text").textContent = t(key, { used: count(used), limit: count(limit), left: count(left) });
}
