// Says what an answer waits for before its first word: others in the queue, or the reading of the prompt.

import { getJSON } from "./server.js";
import { t } from "./words.js";

const FIRST_MS = 700, EACH_MS = 1000;

/** Asks now and then how long the queue is, and calls `say` with a sentence; `stop()` ends it. */
export function watchQueue(model, say) {
  let ahead = Infinity, timer = setTimeout(look, FIRST_MS);

  async function look() {
    try {
      const row = (await getJSON("/stats")).models?.[model];
      if (timer === null) return;
      if (!row) return;  // a name that stands for several models
      // Whoever came later waits behind us, so the least number seen is the best bound.
      ahead = Math.min(ahead, Math.max(0, (row?.waiting ?? 0) - 1));
      say(row?.waiting ? t(ahead ? "waiting" : "waiting_next", { n: ahead }) : t("reading"));
    } catch (error) {
      console.warn("queue:", error.message);  // the answer itself will say it
    }
    if (timer !== null) timer = setTimeout(look, EACH_MS);
  }

  return { stop() { clearTimeout(timer); timer = null; } };
}
