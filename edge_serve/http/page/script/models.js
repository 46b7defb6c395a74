// The list of models, and the line that says how the server is.

import { askedModels, offerSecond } from "./compare.js";
import { $ } from "./dom.js";
import { showMeter } from "./meter.js";
import { showOwnValues } from "./sampling.js";
import { getJSON } from "./server.js";
import { state } from "./state.js";
import { load } from "./tab.js";
import { t } from "./words.js";

const READ_EVERY = 15;  // figures

let seen = null, isSettled = false, reads = 0;  // what /stats said of the models when the list was read, and since then

/** Forgets what is known of the models: they are read with the next figures. */
export function forgetModels() { seen = null; }

/**
 * Reads the list of models where these figures of theirs differ from the last ones, where one is loading, and now and
 * then: a server writes a line into its log for each time.
 */
export async function followModels(rows) {
  const now = JSON.stringify(Object.entries(rows).map(([name, { loaded, failed, bundle }]) => [name, loaded, failed, bundle]));
  reads = now === seen && isSettled ? reads + 1 : 0;
  if (reads % READ_EVERY) return;
  isSettled = await readModels() && state.models.length > 0 && !state.served.some(({ status }) => status?.value === "loading");
  seen = now;
}

// Shows the list of models where it has changed; returns whether it is as it was.
async function readModels() {
  state.served = (await getJSON("v1/models")).data.map((model) => ({ ...model, id: String(model.id) }));
  const models = state.served.filter(({ task }) => (task ?? "generate") === "generate");
  if (JSON.stringify(models) === JSON.stringify(state.models)) return true;  // a menu that is open stays open
  state.models = models;
  const select = $("model"), wanted = load("model", select.value);
  select.replaceChildren(...models.map((model) => optionOf(model, wanted)));
  select.hidden = models.length === 0;
  offerSecond();
  modelChanged();
  return false;  // names of splits come a little later
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
