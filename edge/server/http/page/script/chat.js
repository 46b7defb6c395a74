// Sends what was written and reads the answer.

import { $, node, seconds } from "./dom.js";
import { openPanel, parameters, systemMessage } from "./panel.js";
import { Refusal, events, headers, refusal, unreachable } from "./server.js";
import { state } from "./state.js";
import { save } from "./tab.js";
import { bottom, draw, redraw, update } from "./turns.js";

const REST_SHARE = 3, MAX_REST_MS = 1000;

export function fail(text, retryAfter) {
  const box = node("div", "turn error", text);
  box.setAttribute("role", "alert");
  const again = node("button", "", "Try again");
  again.type = "button";
  again.addEventListener("click", () => { box.remove(); answer(); });
  if (retryAfter > 0) {
    again.disabled = true;
    let left = Math.min(retryAfter, 120);
    const tick = () => {
      again.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      again.disabled = left > 0;
      if (left-- > 0) setTimeout(tick, 1000);
    };
    tick();
  }
  box.append(again);
  $("log").append(box);
  bottom(true);
}

function messages() {
  const system = systemMessage();
  const past = state.turns.map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...past] : past;
}

export async function ask(event) {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || state.request) return;
  for (const old of document.querySelectorAll(".error.turn")) old.remove();
  const last = state.turns.at(-1);
  if (last && last.role === "user") last.content += `\n\n${text}`;  // it was never answered
  else state.turns.push({ role: "user", content: text });
  $("prompt").value = "";
  grow();
  redraw();
  bottom(true);
  await answer();
}

async function answer() {
  if (state.request || state.turns.at(-1)?.role !== "user") return;
  let body;
  try {
    body = {
      model: $("model").value, messages: messages(), stream: true,
      stream_options: { include_usage: true }, ...parameters(),
    };
  } catch (error) {
    fail(error.message, 0);
    return;
  }
  const request = new AbortController(), turns = state.turns;
  state.request = request;
  busy(true);
  const turn = { role: "assistant", content: "", reasoning: "", facts: null };
  const view = draw(turn);
  const clock = { start: performance.now(), first: 0, answer: 0 };
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers({ "Content-Type": "application/json" }),
      body: JSON.stringify(body), signal: request.signal,
    });
    if (!response.ok) throw await refusal(response);
    await read(response, turn, view, clock);
  } catch (error) {
    if (error.name === "AbortError") turn.facts = ["stopped"];
    else ended(view, turn, error);
  } finally {
    finish(view, turn, turns);
  }
}

async function read(response, turn, view, clock) {
  let reason = null, usage = null, complete = false, drawing = false, rest = 0;
  const paint = () => {
    drawing = false;
    if (turn.facts) return;
    const began = performance.now();
    update(view, turn);
    rest = Math.min(MAX_REST_MS, REST_SHARE * (performance.now() - began));
    // Open while it reasons, folded once it answers; in between the reader may do as they like.
    const phase = turn.content ? "answer" : turn.reasoning ? "reasoning" : "";
    if (phase !== view.phase) view.details.open = phase === "reasoning";
    view.phase = phase;
    bottom(false);
  };
  for await (const data of events(response.body)) {
    if (data === "[DONE]") { complete = true; break; }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(String(chunk.error.message), 0, 0);
    usage = chunk.usage ?? usage;
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    reason = choice.finish_reason ?? reason;
    const reasoning = choice.delta?.reasoning_content ?? choice.delta?.reasoning ?? "";
    const text = choice.delta?.content ?? "";
    if (!reasoning && !text) continue;
    const now = performance.now();
    clock.first ||= now;
    if (text) clock.answer ||= now;
    turn.reasoning += reasoning;
    turn.content += text;
    if (!drawing) {
      drawing = true;
      // However long an answer gets, most of the time is left for the reader.
      setTimeout(() => requestAnimationFrame(paint), rest);
    }
  }
  if (!complete) throw new Refusal("The connection ended before the answer did.", 0, 0);
  turn.facts = facts(clock, usage, reason);
  if (turn.reasoning) view.summary.textContent = `Reasoning, ${seconds((clock.answer || performance.now()) - clock.first)}`;
}

function facts(clock, usage, reason) {
  const list = [];
  const took = performance.now() - clock.first;
  if (usage) {
    list.push(`${usage.completion_tokens} tokens`);
    if (clock.first && took > 0 && usage.completion_tokens > 1) {
      list.push(`${((usage.completion_tokens - 1) / took * 1000).toFixed(1)} tokens/s`);
    }
  }
  if (clock.first) list.push(`first after ${seconds(clock.first - clock.start)}`);
  if (reason === "length") list.push("cut at the token limit");
  return list;
}

function ended(view, turn, error) {
  if (!turn.content && !turn.reasoning) view.root.remove();
  else turn.facts = ["incomplete"];
  fail(unreachable(error), error.retryAfter ?? 0);
}

function finish(view, turn, turns) {
  state.request = null;
  busy(false);
  if (state.turns !== turns) return;  // a new chat has begun meanwhile
  if (turn.content || turn.reasoning) {
    turns.push(turn);
    update(view, turn);
    if (view.phase !== "answer") view.details.open = !turn.content;
  } else if (view.root.isConnected) {
    view.root.remove();
    fail(turn.facts?.includes("stopped") ? "Stopped." : "The model gave no answer.", 0);
  }
  save("turns", turns);
  bottom(false);
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("log").setAttribute("aria-busy", String(on));
  for (const old of document.querySelectorAll(".busy")) old.classList.remove("busy");
  if (on) requestAnimationFrame(() => {
    if (state.request) document.querySelector(".turn.assistant:last-child .body")?.classList.add("busy");
  });
}

export function grow() {
  const box = $("prompt");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, innerHeight * 0.4)}px`;
}
