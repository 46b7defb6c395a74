// Draws the turns of the conversation.

import { MarkdownView } from "./answer/markdown_view.js";
import { copyFrom } from "./copy.js";
import { $, node } from "./dom.js";
import { state } from "./state.js";
import { save } from "./tab.js";

export function draw(turn) {
  const root = node("div", `turn ${turn.role}`);
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", turn.role === "user" ? "You" : "Model");
  const view = { root, body: node("div", "body"), facts: node("div", "facts") };
  if (turn.role === "assistant") {
    view.details = node("details");
    view.summary = node("summary", "", "Reasoning");
    view.reasoning = node("div", "reasoning");
    view.details.append(view.summary, view.reasoning);
    view.details.hidden = true;
    root.append(view.details);
    view.answer = new MarkdownView(view.body);
    view.thought = new MarkdownView(view.reasoning);
  }
  root.append(view.body, view.facts);
  $("empty").hidden = true;
  $("log").append(root);
  update(view, turn);
  return view;
}

export function update(view, turn) {
  const final = turn.facts !== null;
  if (!view.answer) view.body.textContent = turn.content;
  else if (turn.content || !turn.reasoning || final) view.answer.update(turn.content, final);
  if (view.thought && turn.reasoning) {
    view.details.hidden = false;
    view.thought.update(turn.reasoning, final || turn.content !== "");
  }
  if (turn.facts) view.facts.replaceChildren(...turn.facts.map((fact) => node("span", "", fact)));
  if (turn.role === "assistant" && turn.content && turn.facts) {
    const copy = node("button", "quiet", "Copy");
    copy.type = "button";
    copy.addEventListener("click", () => copyFrom(copy, () => turn.content));
    view.facts.append(copy);
  }
}

export function bottom(force) {
  const log = $("log");
  if (force || log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

export function redraw() {
  for (const old of document.querySelectorAll(".turn")) old.remove();
  $("empty").hidden = state.turns.length > 0;
  state.turns.forEach(draw);
  save("turns", state.turns);
}
