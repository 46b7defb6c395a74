// The list of models, and the line that says how the server is.

import { offerSecond } from "./compare.js";
import { $ } from "./dom.js";
import { showMeter } from "./meter.js";
import { showOwnValues } from "./sampling.js";
import { getJSON, reasonOf } from "./server.js";
import { openPanel } from "./sides.js";
import { state } from "./state.js";
import { load } from "./tab.js";
import { t } from "./words.js";

/** Reads the list of models; returns whether it is as it was. */
export async function loadModels() {
  const select = $("model"), before = state.models.map(({ id }) => id).join("\n");
  try {
    const served = (await getJSON("v1/models")).data.filter(({ task }) => (task ?? "generate") === "generate");
    state.models = served.map((model) => ({ ...model, id: String(model.id) }));
    const wanted = load("model", select.value);
    select.replaceChildren(...state.models.map(({ id }) => new Option(id, id, false, id === wanted)));
    select.disabled = state.models.length === 0;
    offerSecond();
    showState(state.models.length ? t("ready") : t("no_model"), state.models.length ? "up" : "down");
    modelChanged();
    return state.models.map(({ id }) => id).join("\n") === before;
  } catch (error) {
    select.disabled = true;
    showState(reasonOf(error), "down");
    if (error.status === 401) { openPanel(true); $("key").focus(); }
    return false;
  }
}

export function modelChanged() {
  showOwnValues();
  showMeter();
}

export function showState(text, kind) {
  $("state").textContent = text;
  $("state").title = text;
  $("state").className = kind;
}
