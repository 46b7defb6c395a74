// The list of models, and the line that says how the server is.

import { $ } from "./dom.js";
import { openPanel } from "./panel.js";
import { getJSON, unreachable } from "./server.js";
import { state } from "./state.js";
import { load } from "./tab.js";

export async function loadModels() {
  const select = $("model");
  try {
    const list = (await getJSON("/v1/models")).data.map((model) => String(model.id));
    const wanted = load("model", select.value);
    select.replaceChildren(...list.map((id) => new Option(id, id, false, id === wanted)));
    select.disabled = list.length === 0;
    state.models = list;
    show(list.length ? "ready" : "no model is served", list.length ? "up" : "down");
  } catch (error) {
    select.disabled = true;
    show(unreachable(error), "down");
    if (error.status === 401) { openPanel(true); $("key").focus(); }
  }
}

export function show(text, kind) {
  $("state").textContent = text;
  $("state").title = text;
  $("state").className = kind;
}
