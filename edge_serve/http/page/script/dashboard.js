// Shows what the server says about itself.

import { isLocked, lock, unlock } from "./access.js";
import { $, node } from "./dom.js";
import { showEngines } from "./engines.js";
import { gb, seconds } from "./figures.js";
import { followModels, forgetModels, showState } from "./models.js";
import { refusalsOf } from "./refusals.js";
import { getJSON, reasonOf } from "./server.js";
import { Sparkline } from "./sparkline.js";
import { state } from "./state.js";
import { count, nameOf, t } from "./words.js";

const POLL_S = 2, LOCKED_POLL_S = 6, HISTORY = 60;

const spell = (s) => s === null ? "–" : seconds(s * 1000);
const sum = (rows, name) => rows.reduce((total, row) => total + (row[name] ?? 0), 0);
const most = (values) => values.length ? Math.max(...values) : null;
const total = (counts) => Object.values(counts ?? {}).reduce((all, one) => all + one, 0);

// Each gauge: its name, and what it makes of a reading: [number for the curve, text, and a
// short one for the scale where it differs], or null. Those
// that are optional show only after a first reading, since not every device has them.
const GAUGES = [
  ["gauge_rate", (now) => now.rate === null ? null : [now.rate, now.rate.toFixed(1)]],
  ["gauge_ttft", (now) => latency(now, "ttft_s")],
  ["gauge_itl", (now) => latency(now, "itl_s")],
  ["gauge_total", (now) => latency(now, "total_s")],
  ["gauge_queue", ({ rows }) => [sum(rows, "waiting"), t("queue_text", {
    waiting: sum(rows, "waiting"), all: sum(rows, "queue_capacity"), running: sum(rows, "running") }),
    String(sum(rows, "waiting"))]],
  ["gauge_kv", ({ rows }) => {
    const used = sum(rows, "kv_used_tokens"), all = sum(rows, "kv_capacity_tokens");
    const percent = Math.round(100 * used / all);
    return all ? [used / all, t("kv_text", { percent, all: count(all), slots: sum(rows, "num_slots") }), `${percent} %`] : null;
  }],
  ["gauge_process", ({ device }) => device.process_rss_bytes == null ? null
    : [device.process_rss_bytes, gb(device.process_rss_bytes)], "optional"],
  ["gauge_memory", ({ device }) => {
    const all = device.memory_total_bytes, left = device.memory_available_bytes;
    return all && left != null ? [all - left, t("memory_text", { used: gb(all - left), all: gb(all) }), gb(all - left)]
      : null;
  }],
  ["gauge_gpu", ({ device }) => device.gpu_load_ratio == null ? null
    : [device.gpu_load_ratio, `${Math.round(100 * device.gpu_load_ratio)} %`], "optional"],
  ["gauge_temperature", ({ device }) => {
    const hot = most(Object.values(device.temperatures_celsius ?? {}));
    if (hot === null) return null;
    const value = `${hot.toFixed(0)} °C`;
    return [hot, device.throttled ? t("throttled", { value }) : value];
  }, "optional"],
  ["gauge_power", ({ device }) => device.module_power_watts == null ? null
    : [device.module_power_watts, `${device.module_power_watts.toFixed(1)} W`], "optional"],
  ["gauge_rejections", ({ stats }) => {
    const all = total(stats.rejections);
    return all ? [all, refusalsOf(stats.rejections).join(", "), count(all)] : null;
  }, "optional"],
  ["gauge_drift", ({ stats }) => {
    const found = Object.entries(stats.drift?.params ?? {}).filter(([, one]) => Number.isFinite(one.psi));
    const [name, worst] = found.sort(([, a], [, b]) => b.psi - a.psi)[0] ?? [];
    return worst ? [worst.psi, `${worst.psi.toFixed(2)} ${nameOf(name)}${worst.alarm ? " ⚠" : ""}`, worst.psi.toFixed(2)] : null;
  }, "optional"],
];

function latency({ rows }, name) {
  const found = rows.map((row) => row.latency?.[name]).filter((one) => one && one.count);
  if (!found.length) return null;
  const p50 = most(found.map((one) => one.p50)), p99 = most(found.map((one) => one.p99));
  return [p50, t("p99_text", { p50: spell(p50), p99: spell(p99) }), spell(p50)];
}

const gauges = GAUGES.map(([name, value, optional]) => {
  const root = node("div", "gauge"), text = node("dd", "", "–");
  root.hidden = optional !== undefined;
  const curve = new Sparkline(HISTORY);
  const gauge = { value, root, curve, last: "–", pointed: null };
  gauge.show = () => {
    text.textContent = gauge.pointed ?? gauge.last;
    root.classList.toggle("pointed", gauge.pointed !== null);
  };
  curve.onpoint = (pointed) => { gauge.pointed = pointed; gauge.show(); };
  const figure = node("dd", "figure");
  figure.append(curve.root);
  root.append(node("dt", "", t(name)), text, figure);
  $("gauges").append(root);
  return gauge;
});

let before = null;
let polls = 0;  // of which only the last one goes on: one is asked for beside the clock's

function showStats(stats) {
  const rows = Object.values(stats.models ?? {}), at = performance.now();
  const tokens = sum(rows, "completion_tokens");
  const rate = before && tokens >= before.tokens ? (tokens - before.tokens) / (at - before.at) * 1000 : null;
  before = { tokens, at };
  const now = { stats, rows, rate, device: stats.device ?? {} };
  for (const gauge of gauges) {
    const found = gauge.value(now);
    gauge.last = found ? found[1] : "–";
    gauge.show();
    if (!found) continue;
    gauge.root.hidden = false;
    gauge.curve.push(...found);
  }
  const models = Object.entries(stats.models ?? {});
  const failed = models.filter(([, row]) => row.failed).map(([name]) => name);
  const warnings = [...new Set(rows.map((row) => row.warning).filter(Boolean))];
  showEngines(stats.models ?? {}, state.served);
  const trouble = failed.length ? t("engine_failed", { names: failed.join(", ") }) : warnings.join(" ");
  note(trouble, trouble !== "");
  if (!state.models.length) showState(t("no_model"), "down");
  else if (failed.length) showState(trouble, "down");
  else showState(t(trouble ? "warned" : "ready"), trouble ? "warned" : "up", trouble || t("ready"));
}

function note(text, bad) {
  if ($("dash-note").textContent !== text) $("dash-note").textContent = text;
  $("dash-note").className = bad ? "error" : "";
}

/** Asks the server how it is, again and again while the page is seen. */
export async function poll() {
  clearTimeout(state.timer);
  const turn = ++polls;
  if (!document.hidden) {
    try {
      const stats = await getJSON("stats");
      await followModels(stats.models ?? {});
      if (turn !== polls) return;
      unlock();
      showStats(stats);
      $("gauges").hidden = false;
    } catch (error) {
      if (turn !== polls) return;
      before = null;
      forgetModels();
      if (error.status === 401) lock();
      showState(error.status === 401 ? t("key_wanted") : reasonOf(error), "down");
      note(error.status === 401 ? "" : reasonOf(error), true);
    }
  }
  state.timer = setTimeout(poll, (isLocked() ? LOCKED_POLL_S : POLL_S) * 1000);
}
