// What can be done in a conversation: ask, answer again, edit, go on, stop.

import { addTurn, messagesOf, pathOf, removeLeaf } from "./conversation.js";
import { continuationOf } from "./continuation.js";
import { keep } from "./conversations.js";
import { $ } from "./dom.js";
import { clearErrors, drawLog, showError, toEnd } from "./log.js";
import { showMeter } from "./meter.js";
import { completionParameters, parameters, systemMessage } from "./sampling.js";
import { post, reasonOf } from "./server.js";
import { state } from "./state.js";
import { readInto } from "./stream.js";
import { TurnView } from "./turn_view.js";
import { watchQueue } from "./waiting.js";
import { t } from "./words.js";

// However long an answer gets, most of the time is left for the reader.
const REST_SHARE = 3, MAX_REST_MS = 1000;
const KEEP_MS = 3000;

const actions = {
  regenerate: (turn) => answer(turn.parent),
  go_on: (turn) => answer(turn.parent, turn),
  edit: (turn, text) => {
    if (state.request) return;
    answer(addTurn(state.conversation, turn.parent, "user", text).id);
  },
  show: (leaf) => {
    if (state.request) return;
    state.conversation.leaf = leaf;
    keep(state.conversation);
    redraw();
  },
};

/** Shows the conversation that is open; returns the view of its last turn. */
export function redraw() {
  const view = drawLog((turn) => new TurnView(state.conversation, turn, actions));
  showMeter();
  return view;
}

/** Shows a conversation from its end, and what it waits for. */
export function openChat(conversation) {
  state.request?.abort();
  state.conversation = conversation;
  redraw();
  const last = pathOf(conversation).at(-1);
  if (last?.role === "user") showError(t("unanswered"), 0, () => answer(last.id));
  toEnd(true);
}

export function ask(event) {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || state.request) return;
  const { conversation } = state;
  const last = pathOf(conversation).at(-1);
  if (last?.role === "user") last.content += `\n\n${text}`;  // it was never answered
  else addTurn(conversation, last?.id ?? null, "user", text);
  $("prompt").value = "";
  grow();
  answer(conversation.leaf);
}

/** Fits the field to its text. */
export function grow() {
  const box = $("prompt");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, innerHeight * 0.4)}px`;
  showMeter();
}

/** Answers the turn `parent`, in a turn of its own or by going on with `broken`. */
async function answer(parent, broken = null) {
  if (state.request) return;
  clearErrors();
  const { conversation } = state;
  const model = $("model").value;
  conversation.leaf = broken?.id ?? parent;
  keep(conversation);
  let sampling;
  try {
    sampling = broken ? completionParameters() : parameters();
  } catch (error) {
    redraw();
    showError(error.message, 0, () => answer(parent, broken));
    return;
  }
  const turn = broken ?? addTurn(conversation, parent, "assistant", "");
  turn.model = model;
  delete turn.ended;
  const run = new Run(conversation, turn);
  try {
    const options = { stream: true, stream_options: { include_usage: true }, ...sampling };
    const [path, body] = broken
      ? ["/v1/completions", await continuationOf(conversation, turn, model, systemMessage())]
      : ["/v1/chat/completions", { model, messages: messagesOf(conversation, parent, systemMessage()) }];
    await run.read(await post(path, { ...body, ...options }, run.request.signal));
    run.finish(null);
  } catch (error) {
    run.finish(error);
  }
}

/** One answer that is under way. */
class Run {
  constructor(conversation, turn) {
    this.conversation = conversation;
    this.turn = turn;
    this.request = state.request = new AbortController();
    this.startedAt = performance.now();
    this.keptAt = this.startedAt;
    this.isDrawing = false;
    this.restMs = 0;
    this.view = redraw();
    this.view.begin();
    busy(true);
    toEnd(true);
    this.queue = watchQueue(turn.model, (text) => this.view.wait(text));
    this.view.update(false);
  }

  async read(response) {
    await readInto(response, this.turn, this.startedAt, () => {
      this.queue.stop();
      if (!this.isDrawing) {
        this.isDrawing = true;
        setTimeout(() => requestAnimationFrame(() => this.#draw()), this.restMs);
      }
    });
  }

  #draw() {
    this.isDrawing = false;
    if (this.isOver) return;
    const began = performance.now();
    this.view.update(false);
    if (state.conversation === this.conversation) toEnd(false);
    this.restMs = Math.min(MAX_REST_MS, REST_SHARE * (performance.now() - began));
    if (began - this.keptAt > KEEP_MS) {
      this.keptAt = began;
      keep(this.conversation, false);
    }
  }

  finish(error) {
    const { conversation, turn } = this;
    const wasStopped = error?.name === "AbortError";
    this.isOver = true;
    this.queue.stop();
    if (state.request === this.request) state.request = null;
    busy(state.request !== null);
    if (error) turn.ended = wasStopped ? "stopped" : "failed";
    const isEmpty = !turn.content && !turn.reasoning;
    if (isEmpty) removeLeaf(conversation, turn);
    if (Object.keys(conversation.turns).length) keep(conversation);
    if (state.conversation !== conversation) return;  // another one is shown by now
    redraw();
    toEnd(false);
    const again = () => answer(turn.parent);
    if (error && !wasStopped) showError(reasonOf(error), error.retryAfterS ?? 0, again);
    else if (isEmpty) showError(t(wasStopped ? "stopped" : "no_answer"), 0, again);
  }
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("log").setAttribute("aria-busy", String(on));
  document.body.classList.toggle("answering", on);
}

