// Reads a streamed answer into a turn.

import { Refusal, events } from "./server.js";
import { t } from "./words.js";

/**
 * Reads to the end; the turn gets its figures also where that is an error.
 *
 * Args: the response; the turn that grows; `onPiece`, called after each piece; `onProgress`, called
 * with what the server says of the prompt before the first one.
 */
export async function readInto(response, turn, startedAt, { onPiece, onProgress }) {
  let usage = null, reason = null, complete = false, firstAt = 0, answerAt = 0, pieces = 0, thoughts = 0, vote = null;
  const before = { ...turn.figures };
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") { complete = true; break; }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refusal(String(chunk.error.message), 0, 0);
      if (chunk.prompt_progress) onProgress(chunk.prompt_progress);
      usage = chunk.usage ?? usage;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      vote = choice.delta?.vote ?? vote;
      const reasoning = choice.delta?.reasoning_content ?? choice.delta?.reasoning ?? "";
      const text = choice.delta?.content ?? "";
      if (!reasoning && !text) continue;
      const now = performance.now();
      firstAt ||= now;
      pieces += 1;
      if (text) answerAt ||= now;
      else thoughts += 1;
      if (reasoning) turn.reasoning = (turn.reasoning ?? "") + reasoning;
      turn.content += turn.content ? text : text.trimStart();
      onPiece();
    }
    if (!complete) throw new Refusal(t("ended_early"), 0, 0);
    turn.ended = reason === "length" ? "length" : "stop";
  } finally {
    const now = performance.now(), begun = before.completion_tokens ?? 0;
    if (turn.reasoning) turn.thought_ms = (turn.thought_ms ?? 0) + ((answerAt || now) - (firstAt || now));
    // What broke off has no usage: its pieces are about its tokens, and its prompt is known once it goes on.
    usage ??= { completion_tokens: pieces, completion_tokens_details: { reasoning_tokens: thoughts } };
    const prompt = Math.max(0, (usage.prompt_tokens ?? 0) - begun);
    const cached = Math.min(prompt, usage.prompt_tokens_details?.cached_tokens ?? 0);
    turn.figures = {
      ttft_ms: before.ttft_ms || (firstAt ? firstAt - startedAt : 0),
      decode_ms: (before.decode_ms ?? 0) + (firstAt ? now - firstAt : 0),
      prompt_tokens: before.prompt_tokens || prompt,
      cached_tokens: before.prompt_tokens ? before.cached_tokens : cached,
      completion_tokens: begun + (usage.completion_tokens ?? 0),
      reasoning_tokens: (before.reasoning_tokens ?? 0) + (usage.completion_tokens_details?.reasoning_tokens ?? 0),
      ...(vote && { agreed: vote.agreed, counted: vote.counted, decided: vote.decided }),
    };
  }
}
