// Shows what computes each model, and what each slot of its KV cache holds.

import { patch } from "./answer/patch.js";
import { $, node } from "./dom.js";
import { bytes } from "./figures.js";
import { stateOf } from "./loading.js";
import { count, t } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";

/**
 * Shows the models: `rows` by name from /stats, and `served` from /v1/models, which may have some that are not
 * loaded. What has not changed stays, with the reader's selection and the focus.
 */
export function showEngines(rows, served) {
  const cards = new Map(served.filter(({ status }) => status).map((card) => [card.id, card]));
  const items = [...new Set([...Object.keys(rows), ...cards.keys()])].map((name) => modelItem(name, rows[name] ?? {}, cards.get(name)));
  const fresh = document.createDocumentFragment();
  fresh.append(...items);
  patch($("engines"), fresh);
}

function modelItem(name, row, card) {
  const item = node("li"), slots = row.slots ?? [], state = card ? stateOf(card) : null;
  item.append(node("h3", "", name));
  const facts = [row.backend, row.engine, row.quantization, card?.size_bytes ? bytes(card.size_bytes) : null].filter(Boolean);
  if (facts.length || !state) item.append(node("p", "", facts.join(" · ") || t("state_unloaded")));
  if (state) item.append(stateRow(name, state));
  if (card?.status.failed) item.append(node("p", "why", card.status.failed));
  if (slots.length) item.append(slotList(slots, row.kv_capacity_tokens / slots.length));
  return item;
}

function stateRow(name, { value, seconds, act }) {
  const row = node("div", "state");
  row.append(node("span", value, t(`state_${value}`, { n: seconds })));
  if (value === "loading") row.append(node("progress"));
  if (act) {
    const button = node("button", "", t(act));
    button.type = "button";
    button.dataset.act = act;
    button.dataset.model = name;
    button.setAttribute("aria-label", `${t(act)} ${name}`);
    row.append(button);
  }
  return row;
}

function slotList(slots, capacity) {
  const list = node("ol", "slots");
  list.setAttribute("aria-label", t("slots_label", { n: count(capacity) }));
  list.append(...slots.map((slot) => {
    const item = node("li", slot.in_use ? "used" : "");
    item.append(bar(slot, capacity), node("span", "", textOf(slot)));
    return item;
  }), node("li", "legend", t("slots_label", { n: count(capacity) })));
  list.lastChild.setAttribute("aria-hidden", "true");
  return list;
}

function textOf({ in_use: inUse, rows, cached_rows: cached }) {
  if (!inUse) return rows ? t("slot_kept", { n: count(rows) }) : t("slot_free");
  return cached ? t("slot_shared", { n: count(rows), cached: count(cached) }) : t("slot_used", { n: count(rows) });
}

// The rows that are there, and in another shade those that nobody had to compute.
function bar({ rows, cached_rows: cached }, capacity) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 100 10");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  for (const [name, from, to] of [["cached", 0, cached], ["computed", cached, rows]]) {
    const rect = document.createElementNS(SVG, "rect");
    rect.setAttribute("class", name);
    rect.setAttribute("x", String(100 * from / capacity));
    rect.setAttribute("width", String(100 * (to - from) / capacity));
    rect.setAttribute("height", "10");
    svg.append(rect);
  }
  return svg;
}
