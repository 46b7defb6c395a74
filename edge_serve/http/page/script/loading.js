// Loads and unloads models, where the server does that at a page's word.

import { $ } from "./dom.js";
import { toast } from "./conversations.js";
import { forgetModels } from "./models.js";
import { post, reasonOf } from "./server.js";
import { t } from "./words.js";

const since = new Map();  // when each model was first seen loading, by its name
let isAllowed = true;  // until the server says that this reader may not

/** Returns what a model does now: its state, the seconds for which it has loaded, and what can be asked of it. */
export function stateOf({ id, status }) {
  const value = since.get(id)?.isAsked ? "loading" : status.value;
  if (value !== "loading") since.delete(id);
  else if (!since.has(id)) since.set(id, { at: Date.now() });
  return {
    value, seconds: value === "loading" ? Math.round((Date.now() - since.get(id).at) / 1000) : 0,
    act: !isAllowed || value === "loading" ? null : value === "loaded" ? "unload" : "load",
  };
}

async function ask(act, model, again) {
  if (act === "load") since.set(model, { at: Date.now(), isAsked: true });
  again();
  try {
    await post(`models/${act}`, { model });
  } catch (error) {
    if (error.status === 403) isAllowed = false;
    toast(t(`${act}_failed`, { name: model, why: reasonOf(error) }));
  }
  since.delete(model);
  forgetModels();
  again();
}

/** Listens to the buttons of the list of models; `again()` reads how they are. */
export function startLoading(again) {
  $("engines").addEventListener("click", (event) => {
    const { act, model } = event.target.closest("button")?.dataset ?? {};
    if (act) ask(act, model, again);
  });
}
