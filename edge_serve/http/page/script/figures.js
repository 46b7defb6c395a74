// Writes figures for people.

import { count, t } from "./words.js";

export const seconds = (ms) => ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
/** Returns how long the model thought; a whole thought may come in one read. */
export const thinkingTime = (ms) => ms < 100 ? t("a_moment") : seconds(ms);
export const gb = (bytes) => `${(bytes / 1e9).toFixed(1)} GB`;
export const bytes = (n) => n < 1000 ? `${n} B` : n < 1e6 ? `${(n / 1e3).toFixed(1)} KB` : n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : gb(n);

/** Returns what stands under an answer; `isNamed` where the model's name stands above it. */
export function factsOf(turn, isNamed) {
  const { figures = {}, ended } = turn;
  const list = [];
  if (figures.counted) list.push(t(figures.decided === false ? "n_agree_open" : "n_agree", { n: count(figures.agreed), all: count(figures.counted) }));
  if (figures.completion_tokens) list.push(t("n_tokens", { n: count(figures.completion_tokens) }));
  if (figures.completion_tokens > 1 && figures.decode_ms > 0) {
    const rate = (figures.completion_tokens - 1) / figures.decode_ms * 1000;
    list.push(t("n_per_second", { n: rate < 100 ? rate.toFixed(1) : count(Math.round(rate)) }));
  }
  if (figures.ttft_ms) list.push(t("first_after", { time: seconds(figures.ttft_ms) }));
  if (figures.prompt_tokens) {
    list.push(t(figures.cached_tokens ? "prompt_cached" : "prompt_tokens",
      { n: count(figures.prompt_tokens), cached: count(figures.cached_tokens ?? 0) }));
  }
  if (turn.model && !isNamed) list.push(turn.model);
  if (ended === "length") list.push(t("cut"));
  if (ended === "stopped") list.push(t("stopped"));
  if (ended === "failed" || !ended) list.push(t("incomplete"));
  return list;
}
