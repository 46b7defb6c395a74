// Asks for the API key of a server that wants one; it is kept for as long as the tab lives.

import { $ } from "./dom.js";
import { isNarrow, openList, openPanel } from "./sides.js";
import { load, save } from "./tab.js";
import { t } from "./words.js";

let key = load("key", "");

/** Returns the key; empty where none was given. */
export const givenKey = () => key;

/** Whether the server let nobody in when it was last asked. */
export const isLocked = () => !$("access").hidden;

/** Shows the card, in the place of the field to write in; a key that was given is not known there. */
export function lock() {
  if (isLocked() && key === "") return;  // somebody may be typing
  $("key-note").textContent = t(key ? "key_unknown" : "key_kept");
  $("key-note").classList.toggle("bad", key !== "");
  use("");
  $("access").hidden = false;
  document.body.classList.add("locked");
  if (isNarrow()) { openList(false); openPanel(false); }
  $("key").focus();
  $("key").select();
}

/** Hides the card: the server has answered. */
export function unlock() {
  $("key-forget").hidden = key === "";
  if (!isLocked()) return;
  $("access").hidden = true;
  $("key").value = "";
  document.body.classList.remove("locked");
  $("prompt").focus();
}

function use(given) {
  key = given;
  save("key", key);
  $("key-forget").hidden = key === "";
}

/** Starts the card; `again()` asks the server once more. */
export function startAccess(again) {
  $("access").addEventListener("submit", (event) => {
    event.preventDefault();
    const given = $("key").value.trim();
    if (!given) { $("key").focus(); return; }
    use(given);
    again();
  });
  $("key-forget").addEventListener("click", () => { use(""); again(); });
}
