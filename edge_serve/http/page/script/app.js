// Starts the page.

import { startAccess } from "./access.js";
import { startAppearance } from "./appearance.js";
import { ask, grow, openChat, refresh } from "./chat.js";
import { startCompare } from "./compare.js";
import { newConversation } from "./conversation.js";
import { showList, startList } from "./conversations.js";
import { poll } from "./dashboard.js";
import { $, isComposing } from "./dom.js";
import { startFiles } from "./files.js";
import { startLoading } from "./loading.js";
import { modelChanged } from "./models.js";
import { startSampling } from "./sampling.js";
import { isNarrow, openList, openPanel, startSides } from "./sides.js";
import { state } from "./state.js";
import { load, save } from "./tab.js";
import { translate } from "./words.js";

function show(conversation) {
  openChat(conversation ?? newConversation());
  save("current", conversation?.id ?? null);
  showList();
  if (isNarrow()) { openList(false); openPanel(false); }
  $("prompt").focus();
}

function listen() {
  $("ask").addEventListener("submit", ask);
  $("stop").addEventListener("click", () => { state.request?.abort(); $("prompt").focus(); });
  $("prompt").addEventListener("input", grow);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !isComposing(event)) ask(event);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !isComposing(event)) state.request?.abort();
  });
  $("new").addEventListener("click", () => show(null));
  for (const [id, part, open] of [["list-toggle", "list", openList], ["panel-toggle", "panel", openPanel]]) {
    $(id).addEventListener("click", () => open(!document.body.classList.contains(part)));
  }
  $("model").addEventListener("change", () => { save("model", $("model").value); modelChanged(); });
  document.addEventListener("visibilitychange", poll);
}

async function start() {
  translate(document);
  startAppearance();
  startAccess(poll);
  startLoading(poll);
  listen();
  startFiles();
  startSides();
  startCompare(modelChanged);
  try {
    await startSampling();
    openChat(await startList(show, refresh, load("current", null)) ?? state.conversation);
  } finally {
    document.body.classList.add("started");
    poll();
  }
}

start();
