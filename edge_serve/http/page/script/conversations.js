// The list of conversations.

import { become, newConversation, pathOf, textOf } from "./conversation.js";
import { $, isComposing, node } from "./dom.js";
import { state } from "./state.js";
import { dropConversation, isKept, keepConversation, loadConversation, loadConversations, tabs } from "./store.js";
import { save } from "./tab.js";
import { fromJSON, saveFile, toJSON, toMarkdown } from "./transfer.js";
import { language, t } from "./words.js";

const times = new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "short" });
const DAY_MS = 24 * 3600 * 1000;

const deleted = new WeakSet();  // an answer that is under way must not bring them back

let conversations = [];
let unfolded = null;  // the id of the one whose actions are shown
let open = () => {}, refresh = () => {};

/** Stores a conversation as it is now; the list is drawn anew unless only the text has grown. */
export async function keep(conversation, isListed = true) {
  if (deleted.has(conversation)) return;
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  if (conversation === state.conversation) save("current", conversation.id);
  if (isListed) showList();
  try {
    await keepConversation(conversation);
    tabs?.postMessage(conversation.id);
  } catch (error) {
    toast(t("not_kept", { why: error.message }));
  }
}

/**
 * Starts the list; `show(conversation)` opens one, `draw()` shows what became of the open one. Returns the
 * conversation with this id, if it is there.
 */
export async function startList(show, draw, id) {
  [open, refresh] = [show, draw];
  $("search").addEventListener("input", showList);
  $("export-all").addEventListener("click", () => saveFile("edge-llm", "json", toJSON(conversations)));
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", importFiles);
  try {
    const found = await loadConversations();
    conversations = found.conversations;
    if (found.broken) toast(t("broken", { n: found.broken }));
    else if (!await isKept()) toast(t("not_stored"));
  } catch (error) {
    toast(t("store_failed", { why: error.message }));
  }
  tabs?.addEventListener("message", ({ data }) => reread(data));
  showList();
  return conversations.find((one) => one.id === id) ?? null;
}

// Takes over what another tab has made of a conversation.
async function reread(id) {
  const found = await loadConversation(id);
  const known = conversations.find((one) => one.id === id);
  const isShown = known !== undefined && known === state.conversation;
  if (isShown && state.request) {
    known.id = newConversation().id;  // both were asked, and both are kept
    keep(known);
  } else if (known && found) {
    become(known, found);  // what is shown or renamed stays the same object
    if (isShown) refresh();
  } else if (known) {
    conversations = conversations.filter((one) => one !== known);
    if (isShown) open(null);
  }
  if (found && known?.id !== id) conversations.unshift(found);
  showList();
}

function matches(conversation, words) {
  const text = [conversation.title, ...Object.values(conversation.turns).map(textOf)].join("\n");
  return words.every((word) => text.toLowerCase().includes(word));
}

export function showList() {
  if ($("conversations").contains(document.activeElement) && document.activeElement.tagName === "INPUT") {
    return;  // somebody types a new name; the list is drawn when they are done
  }
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = conversations.filter((one) => matches(one, words)).sort((a, b) => b.updated - a.updated);
  const focused = document.activeElement?.dataset?.focus;
  let group = null;
  $("conversations").replaceChildren(...found.flatMap((one) => {
    const own = groupOf(one.updated), isFirst = own !== group;
    group = own;
    return isFirst ? [node("li", "group", t(own)), item(one)] : [item(one)];
  }));
  $("none").hidden = found.length > 0;
  $("none").textContent = t(words.length ? "none_found" : "none_yet");
  $("export-all").disabled = conversations.length === 0;
  if (focused) $("conversations").querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
}

// The key of the heading that a conversation is listed below.
function groupOf(time) {
  const ago = new Date().setHours(0, 0, 0, 0) - time;  // from the beginning of this day back
  return ago <= 0 ? "today" : ago <= DAY_MS ? "yesterday" : ago <= 7 * DAY_MS ? "week" : "older";
}

function button(className, text, focus, act) {
  const made = node("button", className, text);
  made.type = "button";
  made.dataset.focus = focus;
  made.addEventListener("click", act);
  return made;
}

function item(conversation) {
  const { id } = conversation;
  const title = conversation.title || t("untitled");
  const made = node("li");
  const row = node("div", "row");
  const main = button("open", "", `open ${id}`, () => { open(conversation); showList(); });
  main.append(node("span", "title", title));
  main.title = `${title}\n${times.format(conversation.updated)}`;
  if (conversation === state.conversation) main.setAttribute("aria-current", "true");
  const more = button("quiet more", "⋯", `more ${id}`, () => { unfolded = unfolded === id ? null : id; showList(); });
  more.setAttribute("aria-label", t("actions_for", { title }));
  more.setAttribute("aria-expanded", String(unfolded === id));
  row.append(main, more);
  made.append(row);
  if (unfolded === id) made.append(actionsOf(conversation, made));
  return made;
}

function actionsOf(conversation, place) {
  const { id } = conversation;
  const row = node("div", "actions");
  row.append(
    button("quiet rename", t("rename"), `rename ${id}`, () => rename(conversation, place)),
    button("quiet markdown", "Markdown", `markdown ${id}`,
      () => saveFile(conversation.title, "md", toMarkdown(conversation))),
    button("quiet json", "JSON", `json ${id}`, () => saveFile(conversation.title, "json", toJSON([conversation]))),
    button("quiet delete", t("delete"), `delete ${id}`, () => remove(conversation)),
  );
  return row;
}

function rename(conversation, place) {
  const field = node("input");
  field.value = conversation.title;
  field.setAttribute("aria-label", t("new_name"));
  let isOver = false;
  const end = (isTaken) => {
    if (isOver) return;
    isOver = true;
    field.remove();
    unfolded = null;
    if (isTaken && field.value.trim()) {
      conversation.title = field.value.trim();
      keep(conversation);
    } else showList();
    $("conversations").querySelector(`[data-focus="more ${CSS.escape(conversation.id)}"]`)?.focus();
  };
  field.addEventListener("keydown", (event) => {
    if (isComposing(event)) return;
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault();  // the button that gets the focus next is not meant
    event.stopPropagation();
    end(event.key === "Enter");
  });
  field.addEventListener("blur", () => end(true));
  place.replaceChildren(field);
  field.focus();
  field.select();
}

async function remove(conversation) {
  deleted.add(conversation);
  conversations = conversations.filter((one) => one !== conversation);
  unfolded = null;
  const wasOpen = conversation === state.conversation;
  if (wasOpen) open(null);
  showList();
  try {
    await dropConversation(conversation.id);
  } catch (error) {
    deleted.delete(conversation);
    conversations.push(conversation);
    showList();
    toast(t("store_failed", { why: error.message }));
    return;
  }
  tabs?.postMessage(conversation.id);
  toast(t("deleted", { title: conversation.title || t("untitled") }), t("undo"), () => {
    deleted.delete(conversation);
    keep(conversation);
    if (wasOpen && !pathOf(state.conversation).length) open(conversation);
    showList();
  });
}

async function importFiles() {
  for (const file of $("import-file").files) {
    try {
      const found = fromJSON(await file.text());
      for (const one of found) await keep(one);
      toast(t("imported", { n: found.length }));
    } catch (error) {
      toast(`${file.name}: ${error.message}`);
    }
  }
  $("import-file").value = "";
}

/** Says something at the edge of the window until it is closed or something else is said. */
export function toast(text, action, act) {
  const box = $("toast");
  const close = button("quiet close", t("close"), "close", () => { box.hidden = true; $("prompt").focus(); });
  box.replaceChildren(node("span", "", text));
  if (action) box.append(button("undo", action, "undo", () => { box.hidden = true; act(); $("prompt").focus(); }));
  box.append(close);
  box.hidden = false;
}
