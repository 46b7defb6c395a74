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
  state.served = (await getJSON("v1/models")).data.map((model) => ({ ...model, id: String(model.id) }));
  const models = state.served.filter(({ task }) => (task ?? "generate") === "generate");
  if (JSON.stringify(models) === JSON.stringify(state.models)) return;  // a menu that is open stays open
  state.models = models;
  const select = $("model"), wanted = load("model", select.value);
  select.replaceChildren(...models.map((model) => optionOf(model, wanted)));
  select.hidden = models.length === 0;
  offerSecond();
  modelChanged();
}

/** Makes a model's place in a menu; one that is not loaded can be chosen, too, and is loaded for a question. */
export function optionOf({ id, status }, wanted) {
  const isAway = ["unloaded", "failed"].includes(status?.value);
  return new Option(isAway ? t("option_unloaded", { name: id }) : id, id, false, id === wanted);
}

export function modelChanged() {
  showOwnValues(askedModels());
  showMeter();
}

export function showState(text, kind, title = text) {
  if ($("state").textContent !== text) $("state").textContent = text;
  $("state").title = title;
  $("state").className = kind;
}
