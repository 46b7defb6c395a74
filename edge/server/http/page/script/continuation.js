// Has the model go on with an answer that broke off: the prompt is the chat's tokens and the answer's.

import { messagesOf } from "./conversation.js";
import { getJSON, postJSON } from "./server.js";

const THINK = "<think>", THINK_END = "</think>";

/** Returns the body of a completion that goes on with this turn; only the model's name is set. */
export async function continuationOf(conversation, turn, model, system) {
  const encode = async (text) => text === "" ? []
    : (await postJSON("/tokenize", { model, prompt: text, add_special_tokens: false })).tokens;
  const messages = messagesOf(conversation, turn.parent, system);
  const [{ tokens: head }, info] = await Promise.all([
    postJSON("/tokenize", { model, messages }),
    getJSON(`/tokenizer_info?model=${encodeURIComponent(model)}`),
  ]);
  const begin = info.control_tokens[THINK], end = info.control_tokens[THINK_END];
  // Some templates begin the reasoning themselves, and then it has to be ended.
  const isBegun = begin !== undefined && head.slice(-3).includes(begin);
  const prompt = [...head];
  if (end !== undefined && (isBegun || turn.reasoning)) {
    if (!isBegun) prompt.push(begin, ...await encode("\n"));
    prompt.push(...await encode((turn.reasoning ?? "").trimStart()));
    if (turn.content) prompt.push(end, ...await encode("\n\n"));
  }
  prompt.push(...await encode(turn.content));
  return { model, prompt: [prompt] };
}
