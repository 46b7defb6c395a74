// Two models side by side: whether one question goes to both, and to which.

import { $ } from "./dom.js";
import { optionOf } from "./models.js";
import { state } from "./state.js";
import { load, save } from "./tab.js";

let isOn = false;

function show(on) {
  isOn = on;
  $("compare").setAttribute("aria-pressed", String(on));
  $("model-b").hidden = !on;
}

/** Returns the models that the next question goes to: one, or two. */
export function askedModels() {
  return isOn ? [$("model").value, $("model-b").value] : [$("model").value];
}

/** Offers the models as the second one, too; where there is only one, comparing is not offered. */
export function offerSecond() {
  const wanted = load("model-b", $("model-b").value);
  const names = state.models.map(({ id }) => id);
  const chosen = names.includes(wanted) ? wanted : names.find((name) => name !== $("model").value);
  $("model-b").replaceChildren(...state.models.map((model) => optionOf(model, chosen)));
  $("compare").hidden = names.length < 2;
  show(names.length > 1 && load("compare", false));
}

/** Starts the button; `changed()` is told when other models will be asked. */
export function startCompare(changed) {
  $("compare").addEventListener("click", () => {
    show(!isOn);
    save("compare", isOn);
    if (isOn) $("model-b").focus();
    changed();
  });
  $("model-b").addEventListener("change", () => { save("model-b", $("model-b").value); changed(); });
}
