// Draws the turns of the conversation.

import { $, node } from "./dom.js";
import { state } from "./state.js";
import { save } from "./tab.js";

function fill(target, text) {
  // Fenced code keeps its shape, code within a line its type; all else is plain text.
  const parts = text.split(/^```[^\n]*\n?/m);
  target.replaceChildren(...parts.map((part, at) => {
    if (at % 2) return node("pre", "", part.replace(/\n$/, ""));
    const block = node("div");
    if (at) part = part.replace(/^\n+/, "");  // the code's own margins are enough
    if (at + 1 < parts.length) part = part.replace(/\n+$/, "");
    const pieces = part.split(/`([^`\n]+)`/);
    block.append(...pieces.map((piece, index) => index % 2 ? node("code", "", piece) : piece));
    return block;
  }));
}

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
  }
  root.append(view.body, view.facts);
  $("empty").hidden = true;
  $("log").append(root);
  update(view, turn);
  return view;
}

export function update(view, turn) {
  fill(view.body, turn.content);
  if (view.details && turn.reasoning) {
    view.details.hidden = false;
    view.reasoning.textContent = turn.reasoning;
  }
  if (turn.facts) view.facts.replaceChildren(...turn.facts.map((fact) => node("span", "", fact)));
  if (turn.role === "assistant" && turn.content && turn.facts) {
    const copy = node("button", "quiet", "Copy");
    copy.type = "button";
    copy.addEventListener("click", () => copyText(copy, turn.content));
    view.facts.append(copy);
  }
}

async function copyText(button, text) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Copying is not allowed here";  // no clipboard without HTTPS
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
