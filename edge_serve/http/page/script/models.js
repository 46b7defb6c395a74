// The list of models, and the line that says how the server is.

import { askedModels, offerSecond } from "./compare.js";
import { $ } from "./dom.js";
import { showMeter } from "./meter.js";
import { showOwnValues } from "./sampling.js";
import { getJSON } from "./server.js";
import { state } from "./state.js";
import { load } from "./tab.js";
import { t } from "./words.js";

/** Reads the list of models, and shows it where it has changed. */
export async function readModels() {
  const served = (await getJSON("v1/models")).data.filter(({ task }) => (task ?? "generate") === "generate");
  const models = served.map((model) => ({ ...model, id: String(model.id) }));
  showState(t(models.length ? "ready" : "no_model"), models.length ? "up" : "down");
  if (JSON.stringify(models) === JSON.stringify(state.models)) return;  // a menu that is open stays open
  state.models = models;
  const select = $("model"), wanted = load("model", select.value);
  select.replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === wanted)));
  select.hidden = models.length === 0;
  offerSecond();
  modelChanged();
}

export function modelChanged() {
  showOwnValues(askedModels());
  showMeter();
}

export function showState(text, kind) {
  if ($("state").textContent !== text) $("state").textContent = text;
  $("state").title = text;
  $("state").className = kind;
}
