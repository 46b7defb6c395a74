// What can be done in a conversation: ask, answer again, edit, go on, stop.

import { askedModels } from "./compare.js";
import {
  addPair, addTurn, continuationOf, goTo, leafBelow, messagesOf, pathOf, removeLeaf,
} from "./conversation.js";
import { keep, toast } from "./conversations.js";
import { $ } from "./dom.js";
import { takeFiles } from "./files.js";
import { clearErrors, drawLog, showError, toEnd, viewOf } from "./log.js";
import { showMeter } from "./meter.js";
import { forgetModels } from "./models.js";
import { parameters, systemMessage } from "./sampling.js";
import { post, reasonOf } from "./server.js";
import { modelNamed, state } from "./state.js";
import { readInto } from "./stream.js";
import { TurnView } from "./turn_view.js";
import { count, t } from "./words.js";

// However long an answer gets, most of the time is left for the reader.
const REST_SHARE = 3, MAX_REST_MS = 1000;
const KEEP_MS = 3000;
const PATIENT_MS = 400;  // what is over sooner is not worth a word

const actions = {
  regenerate: (turn) => answer(turn.parent),
  go_on: (turn) => answer(turn.parent, { broken: turn }),
  edit: (turn, text) => {
    if (!isFree()) return false;
    answer(addTurn(state.conversation, turn.parent, "user", text, turn.files).id, { models: askedModels });
    return true;
  },
  show: (turn, name) => {
    if (state.request) return;
    goTo(state.conversation, leafBelow(state.conversation, turn.id));
    keep(state.conversation);
    redraw();
    const { root } = viewOf(turn);
    (root.querySelector(`.${name}:enabled`) ?? root.querySelector(".previous:enabled, .next:enabled")).focus();
  },
};

// Whether something can be asked now; says why not.
function isFree() {
  const why = state.request ? t("answering")
    : $("model").value ? null : t("no_model_yet", { why: $("state").textContent });
  if (why) toast(why);
  return !why;
}

/** Shows the conversation that is open. */
export function redraw() {
  drawLog((turn) => new TurnView(state.conversation, turn, actions));
  showMeter();
}

/** Shows what another tab has made of the conversation, unless a message of it is being edited. */
export function refresh() {
  if ($("log").querySelector(".editing")) return;
  clearErrors();
  redraw();
  toEnd(false);
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
  if ((!text && !state.files.length) || !isFree()) return;
  const { conversation } = state;
  if (conversation.pair) { toast(t("keep_first")); return; }
  const last = pathOf(conversation).at(-1), files = takeFiles();
  if (last?.role === "user") {  // it was never answered
    last.content = [last.content, text].filter(Boolean).join("\n\n");
    if (files.length) last.files = [...last.files ?? [], ...files];
  } else addTurn(conversation, last?.id ?? null, "user", text, files);
  $("prompt").value = "";
  grow();
  $("prompt").focus();  // the button that was clicked goes away
  answer(conversation.leaf, { models: askedModels });
}

/** Fits the field to its text. */
export function grow() {
  const box = $("prompt");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, innerHeight * 0.4)}px`;
  showMeter();
}

/**
 * Answers the turn `parent`: in a turn of its own, in two side by side where `models()` are two, or by
 * going on with `broken`.
 */
async function answer(parent, { broken = null, models = () => [$("model").value] } = {}) {
  if (!isFree()) return;
  clearErrors();
  const { conversation } = state;
  const shown = conversation.leaf;
  const again = () => answer(parent, { broken, models });
  keep(conversation);
  const names = models();
  let sampling;
  try {
    sampling = names.map(parameters);
    if (broken?.reasoning) delete sampling[0].enable_thinking;  // it has begun
  } catch (error) {
    redraw();
    showError(error.message, 0, again);
    return;
  }
  if (broken) goTo(conversation, broken.id);
  const turns = broken ? [broken]
    : names.length > 1 ? addPair(conversation, parent) : [addTurn(conversation, parent, "assistant", "")];
  for (const [at, turn] of turns.entries()) {
    turn.model = names[at];
    delete turn.ended;
  }
  const request = state.request = new AbortController();
  redraw();
  busy(true);
  const runs = turns.map((turn) => new Run(conversation, turn, request.signal));
  toEnd(true);
  const options = { stream: true, stream_options: { include_usage: true }, return_progress: true };
  await Promise.all(runs.map((run, at) => run.read(async () => {
    const { turn } = run;
    const asked = broken ? continuationOf(conversation, turn, systemMessage())
      : { messages: messagesOf(conversation, parent, systemMessage()) };
    return post("v1/chat/completions", { model: turn.model, ...asked, ...options, ...sampling[at] }, request.signal);
  })));
  if (state.request === request) state.request = null;
  busy(state.request !== null);
  finish(conversation, runs, shown, broken ? () => answer(parent, { models }) : again);
}

// Tidies up after answers that have ended, and says what went wrong; `shown` was the leaf before.
function finish(conversation, runs, shown, again) {
  const isPair = runs.length > 1;
  for (const { turn } of runs) if (isEmpty(turn)) removeLeaf(conversation, turn, shown);
  if (Object.keys(conversation.turns).length) keep(conversation);
  if (state.conversation !== conversation) return;  // another one is shown by now
  redraw();
  toEnd(false);
  const said = [];
  for (const { turn, error, wasStopped } of runs) {
    const what = error && !wasStopped ? reasonOf(error)
      : isEmpty(turn) ? t(wasStopped ? "stopped" : "no_answer") : null;
    if (what !== null) said.push(isPair ? `${turn.model}: ${what}` : what);
  }
  const after = Math.max(0, ...runs.map(({ error }) => error?.retryAfterS ?? 0));
  if (said.length) showError([...new Set(said)].join("\n"), after, again);
}

const isEmpty = (turn) => !turn.content && !turn.reasoning;

/** One answer that is under way. */
class Run {
  constructor(conversation, turn, signal) {
    this.conversation = conversation;
    this.turn = turn;
    this.signal = signal;
    this.error = null;
    this.startedAt = performance.now();
    this.keptAt = this.startedAt;
    this.isDrawing = false;
    this.restMs = 0;
    this.progress = null;
    this.view = viewOf(turn);
    this.view.begin();
  }

  get wasStopped() { return this.error?.name === "AbortError"; }

  /** Reads what `send` returns the response of; an error is kept, not thrown. */
  async read(send) {
    const patience = setTimeout(() => this.#wait(), PATIENT_MS);
    try {
      await readInto(await send(), this.turn, this.startedAt, {
        onPiece: () => {
          if (this.isDrawing) return;
          this.isDrawing = true;
          setTimeout(() => requestAnimationFrame(() => this.#draw()), this.restMs);
        },
        onProgress: (progress) => { this.progress = progress; this.#wait(); },
      });
    } catch (error) {
      this.error = error;
      this.turn.ended = this.wasStopped ? "stopped" : "failed";
    }
    clearTimeout(patience);
    this.isOver = true;
    if (!isEmpty(this.turn)) this.view.update(true);
  }

  // Says what the answer waits for: its model, others in the queue, or its prompt.
  #wait() {
    const { progress, turn } = this;
    const status = modelNamed(turn.model)?.status?.value ?? "loaded";
    if (isEmpty(turn) && !progress && status !== "loaded") {
      this.view.wait(t("loading_model"));
      forgetModels();  // the next look finds it loading
    }
    if (!isEmpty(turn) || !progress || performance.now() - this.startedAt < PATIENT_MS) return;
    const { ahead, processed, total } = progress;
    if (ahead !== undefined) this.view.wait(t(ahead ? "waiting" : "waiting_next", { n: count(ahead) }));
    else this.view.wait(t("reading", { n: count(processed), all: count(total) }), processed / total);
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
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("log").setAttribute("aria-busy", String(on));
  document.body.classList.toggle("answering", on);
}
