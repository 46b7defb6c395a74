// Shows what computes each model, and what each slot of its KV cache holds.

import { $, node } from "./dom.js";
import { count, t } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";

const SHOWN = ["backend", "engine", "quantization", "kv_capacity_tokens", "slots"];

let shown = "";

/** Shows the models of an answer of /stats; what has not changed stays, with the reader's selection. */
export function showEngines(models) {
  const now = JSON.stringify(Object.entries(models).map(([name, row]) => [name, SHOWN.map((key) => row[key])]));
  if (now === shown) return;
  shown = now;
  $("engines").replaceChildren(...Object.entries(models).map(([name, row]) => {
    const item = node("li"), slots = row.slots ?? [];
    item.append(node("h3", "", name));
    const facts = [row.backend, row.engine, row.quantization].filter(Boolean);
    item.append(node("p", "", facts.join(" · ") || t("not_loaded")));
    if (slots.length) item.append(slotList(slots, row.kv_capacity_tokens / slots.length));
    return item;
  }));
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
