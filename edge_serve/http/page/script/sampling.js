// The panel: sampling fields and the system message, and presets of them.

import { toast } from "./conversations.js";
import { $ } from "./dom.js";
import { chosenModel, modelNamed } from "./state.js";
import { dropPreset, keepPreset, loadPresets } from "./store.js";
import { openPanel } from "./sides.js";
import { load, save } from "./tab.js";
import { t } from "./words.js";

const BUILT_IN = {
  own: {}, greedy: { temperature: "0" }, precise: { temperature: "0.2", top_p: "0.9" },
  lively: { temperature: "1", min_p: "0.05" },
};

let presets = [];

const fields = () => [...$("sampling").querySelectorAll("[name]")];

// Names that stand for several models reason if all of them do, and old servers say nothing of it.
const reasons = (model) => model?.reasons !== false;

/**
 * Returns the fields that are filled in, as a request to the model of this name has them; without those
 * that it has no use for. Throws an Error at a wrong number.
 */
export function parameters(name) {
  const result = {}, model = modelNamed(name);
  for (const field of fields()) {
    if (field.type !== "number" || (field.closest("[data-reasons]") && !reasons(model))) continue;
    if (!field.checkValidity()) {
      openPanel(true);
      field.reportValidity();
      throw new Error(`${field.parentElement.firstElementChild.textContent}: ${field.validationMessage}`);
    }
    if (field.value !== "") result[field.name] = Number(field.value);
  }
  if (result.vote) result.vote = { most: result.vote, answers: $("sampling").querySelector("[name=vote_on]").value || "number" };
  const stops = $("sampling").querySelector("[name=stop]").value.split("\n").filter(Boolean);
  if (stops.length) result.stop = stops;
  if (reasons(model) && $("sampling").querySelector("[name=no_thinking]").checked) result.enable_thinking = false;
  return result;
}

export function systemMessage() {
  return $("sampling").querySelector("[name=system]").value.trim();
}

/** Shows in every field what the model itself would take, and what only models that reason have if one of `names` does. */
export function showOwnValues(names) {
  const own = chosenModel()?.sampling ?? {};
  const isShown = names.some((name) => reasons(modelNamed(name)));
  for (const label of $("sampling").querySelectorAll("[data-reasons]")) label.hidden = !isShown;
  for (const field of fields()) {
    if (field.name in own) field.placeholder = String(own[field.name]);
    else if (field.dataset.own) field.placeholder = t(field.dataset.own);
  }
}

function values() {
  return Object.fromEntries(fields().map((one) => [one.name, one.type === "checkbox" ? one.checked : one.value]));
}

function write(given) {
  for (const field of fields()) {
    const value = given[field.name];
    if (field.type === "checkbox") field.checked = value === true;
    else field.value = typeof value === "string" ? value : "";
  }
  save("sampling", values());
}

// ------------------------------------------------------------------ presets

function showPresets(selected) {
  const built = Object.keys(BUILT_IN).map((key) => new Option(t(`preset_${key}`), `built:${key}`));
  const own = presets.map(({ name }) => new Option(name, `own:${name}`));
  $("preset").replaceChildren(new Option(t("preset_choose"), ""), ...built, ...own);
  $("preset").value = selected;
  $("preset-delete").disabled = !selected.startsWith("own:");
}

// Does something with the stored presets and shows those that are there then; what is shown stays where that fails.
async function withPresets(act, selected) {
  try {
    await act();
    presets = await loadPresets();
  } catch (error) {
    toast(t("store_failed", { why: error.message }));
    return;
  }
  showPresets(selected);
}

function savePreset() {
  const name = $("preset-name").value.trim();
  if (!name) { $("preset-name").focus(); return; }
  withPresets(async () => {
    await keepPreset({ name, values: values() });
    $("preset-name").value = "";
  }, `own:${name}`);
}

function deletePreset() {
  withPresets(() => dropPreset($("preset").value.slice("own:".length)), "");
}

function choosePreset() {
  const [kind, ...rest] = $("preset").value.split(":");
  const name = rest.join(":");
  $("preset-delete").disabled = kind !== "own";
  if (kind === "built") write({ ...BUILT_IN[name], system: systemMessage() });
  if (kind === "own") write(presets.find((one) => one.name === name)?.values ?? {});
}

export async function startSampling() {
  const stored = load("sampling", {});
  write(typeof stored === "object" && stored ? stored : {});
  $("sampling").addEventListener("change", () => save("sampling", values()));
  $("preset").addEventListener("change", choosePreset);
  $("preset-save").addEventListener("submit", (event) => { event.preventDefault(); savePreset(); });
  $("preset-delete").addEventListener("click", deletePreset);
  showPresets("");
  await withPresets(() => {}, "");
}
