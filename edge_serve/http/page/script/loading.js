// Loads and unloads models, where the server does that at a page's word.

import { givenKey } from "./access.js";
import { $ } from "./dom.js";
import { toast } from "./conversations.js";
import { forgetModels } from "./models.js";
import { post, reasonOf } from "./server.js";
import { t } from "./words.js";

const since = new Map();  // when each model was first seen loading, by its name
let refused = null;  // the key whose owner may not, as the server says

/** Returns what a model does now: its state, the seconds for which it has loaded, and what can be asked of it. */
export function stateOf({ id, status }) {
  const value = since.get(id)?.isAsked ? "loading" : status.value;
  if (value !== "loading") since.delete(id);
  else if (!since.has(id)) since.set(id, { at: Date.now() });
  return {
    value, seconds: value === "loading" ? Math.round((Date.now() - since.get(id).at) / 1000) : 0,
    act: refused === givenKey() || value === "loading" ? null : value === "loaded" ? "unload" : "load",
  };
}

async function ask(act, model, again) {
  const key = givenKey();
  if (act === "load") since.set(model, { at: Date.now(), isAsked: true });
  again();
  try {
    await post(`models/${act}`, { model });
  } catch (error) {
    if (error.status === 403) refused = key;
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
