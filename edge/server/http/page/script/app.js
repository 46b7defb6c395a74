// Starts the page.

import { $ } from "./dom.js";
import { ask, fail, grow } from "./chat.js";
import { poll } from "./dashboard.js";
import { loadModels } from "./models.js";
import { openPanel, restoreSampling, saveSampling } from "./panel.js";
import { state } from "./state.js";
import { load, save } from "./tab.js";
import { bottom, redraw } from "./turns.js";

$("ask").addEventListener("submit", ask);
$("stop").addEventListener("click", () => state.request?.abort());
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.request?.abort();
});
$("new").addEventListener("click", () => {
  state.request?.abort();
  state.turns = [];
  redraw();
  openPanel(false);
  $("prompt").focus();
});
$("panel-toggle").addEventListener("click", () => openPanel(!document.body.classList.contains("panel")));
$("model").addEventListener("change", () => save("model", $("model").value));
$("key").addEventListener("change", () => {
  save("key", $("key").value.trim());
  loadModels();
});
$("sampling").addEventListener("change", saveSampling);
document.addEventListener("visibilitychange", poll);

$("key").value = load("key", "");
restoreSampling();
state.turns = load("turns", []);
redraw();
if (state.turns.at(-1)?.role === "user") fail("This message was not answered.", 0);
bottom(true);
loadModels().then(poll);
