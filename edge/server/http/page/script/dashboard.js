// Shows what the server says about itself.

import { $, node, seconds } from "./dom.js";
import { loadModels, show } from "./models.js";
import { getJSON, unreachable } from "./server.js";
import { state } from "./state.js";

const POLL_MS = 2000, HISTORY = 60;

const spell = (s) => s === null ? "–" : seconds(s * 1000);

const gib = (bytes) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;

const sum = (rows, name) => rows.reduce((total, row) => total + (row[name] ?? 0), 0);

const most = (values) => values.length ? Math.max(...values) : null;

// Each gauge: a name, and what it makes of an answer of /stats: [number for the curve, text]; true
// where not every device has it, so that it shows only after a first reading.
const GAUGES = [
  ["Tokens per second", (now) => now.rate === null ? null : [now.rate, now.rate.toFixed(1)]],
  ["Time to first token", (now) => latency(now, "ttft_s")],
  ["Time between tokens", (now) => latency(now, "itl_s")],
  ["Whole request", (now) => latency(now, "total_s")],
  ["Queue", ({ rows }) => [sum(rows, "waiting"),
    `${sum(rows, "waiting")} of ${sum(rows, "queue_capacity")}, ${sum(rows, "running")} running`]],
  ["KV cache", ({ rows }) => {
    const used = sum(rows, "kv_used_tokens"), all = sum(rows, "kv_capacity_tokens");
    return all ? [used / all, `${Math.round(100 * used / all)} % of ${all} tokens`] : null;
  }],
  ["Memory", ({ device }) => {
    const all = device.memory_total_bytes, left = device.memory_available_bytes;
    return all && left != null ? [all - left, `${gib(all - left)} of ${gib(all)}`] : null;
  }],
  ["GPU load", ({ device }) => device.gpu_load_ratio == null ? null
    : [device.gpu_load_ratio, `${Math.round(100 * device.gpu_load_ratio)} %`], true],
  ["Temperature", ({ device }) => {
    const hot = most(Object.values(device.temperatures_celsius ?? {}));
    return hot === null ? null : [hot, `${hot.toFixed(0)} °C${device.throttled ? ", throttled" : ""}`];
  }, true],
  ["Power", ({ device }) => device.module_power_watts == null ? null
    : [device.module_power_watts, `${device.module_power_watts.toFixed(1)} W`], true],
];

function latency({ rows }, name) {
  const found = rows.map((row) => row.latency?.[name]).filter((one) => one && one.count);
  if (!found.length) return null;
  const p50 = most(found.map((one) => one.p50)), p99 = most(found.map((one) => one.p99));
  return [p50, `${spell(p50)}, P99 ${spell(p99)}`];
}

const gauges = GAUGES.map(([name, value, optional]) => {
  const root = node("div", "gauge");
  root.hidden = Boolean(optional);
  const text = node("dd", "", "–");
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 30");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  svg.append(line);
  root.append(node("dt", "", name), text, svg);
  $("gauges").append(root);
  return { value, text, line, root, points: [] };
});

function curve(points) {
  const top = Math.max(...points), low = Math.min(0, ...points);
  return points.map((value, at) => {
    const x = 100 * (HISTORY - points.length + at) / (HISTORY - 1);
    const y = 28 - 26 * (top > low ? (value - low) / (top - low) : 0);
    return `${x.toFixed(1)},${y.toFixed(1)}`;
  }).join(" ");
}

let before = null;

function showStats(stats) {
  const rows = Object.values(stats.models ?? {}), at = performance.now();
  const tokens = sum(rows, "completion_tokens");
  const rate = before && tokens >= before.tokens ? (tokens - before.tokens) / (at - before.at) * 1000 : null;
  before = { tokens, at };
  const now = { rows, rate, device: stats.device ?? {} };
  for (const gauge of gauges) {
    const found = gauge.value(now);
    gauge.text.textContent = found ? found[1] : "–";
    if (!found) continue;
    gauge.root.hidden = false;
    gauge.points.push(found[0]);
    if (gauge.points.length > HISTORY) gauge.points.shift();
    gauge.line.setAttribute("points", curve(gauge.points));
  }
  const models = Object.entries(stats.models ?? {});
  const failed = models.filter(([, row]) => row.failed).map(([name]) => name);
  const warnings = [...new Set(rows.map((row) => row.warning).filter(Boolean))];
  const backends = models.filter(([, row]) => row.backend).map(([name, row]) => `${name}: ${row.backend}`);
  $("engine").textContent = backends.join(", ");
  note(failed.length ? `The engine of ${failed.join(", ")} has failed.` : warnings.join(" "),
    failed.length > 0 || warnings.length > 0);
}

function note(text, bad) {
  $("dash-note").textContent = text;
  $("dash-note").className = bad ? "error" : "";
}

export async function poll() {
  clearTimeout(state.timer);
  if (!document.hidden) {
    try {
      showStats(await getJSON("/stats"));
      if (!state.models.length) await loadModels();
      else show("ready", "up");
    } catch (error) {
      before = null;
      note(unreachable(error), true);
      show(unreachable(error), "down");
    }
  }
  state.timer = setTimeout(poll, POLL_MS);
}
