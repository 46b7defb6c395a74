// The panel: sampling fields, the system message, and whether it is open.

import { $ } from "./dom.js";
import { load, save } from "./tab.js";

function field(name) {
  return $("sampling").querySelector(`[name="${CSS.escape(name)}"]`);
}

export function parameters() {
  const result = {};
  for (const field of $("sampling").querySelectorAll("input[type=number]")) {
    if (!field.checkValidity()) {
      openPanel(true);
      field.reportValidity();
      throw new Error(`${field.parentElement.firstChild.textContent.trim()}: ${field.validationMessage}`);
    }
    if (field.value !== "") result[field.name] = Number(field.value);
  }
  if (field("no_thinking").checked) result.enable_thinking = false;
  return result;
}

export function systemMessage() {
  return field("system").value.trim();
}

export function saveSampling() {
  const values = {};
  for (const one of $("sampling").querySelectorAll("[name]")) {
    values[one.name] = one.type === "checkbox" ? one.checked : one.value;
  }
  save("sampling", values);
}

export function restoreSampling() {
  for (const [name, value] of Object.entries(load("sampling", {}))) {
    const one = field(name);
    if (!one) continue;
    if (one.type === "checkbox") one.checked = value === true;
    else one.value = value;
  }
}

export function openPanel(open) {
  document.body.classList.toggle("panel", open);
  $("panel-toggle").setAttribute("aria-expanded", String(open));
  $("panel-toggle").textContent = open ? "Chat" : "Panel";
}
