// Conversations as files: Markdown for people, JSON to be read again.

import { checked, newConversation, pathOf, picturesOf, textOf } from "./conversation.js";
import { t } from "./words.js";

const FORMAT = "edge-llm conversations";

/** Writes what is shown of a conversation as Markdown. */
export function toMarkdown(conversation) {
  const parts = [`# ${conversation.title}`];
  const beside = (conversation.pair ?? []).slice(1).map((id) => conversation.turns[id]);
  for (const turn of [...pathOf(conversation), ...beside]) {
    const model = conversation.pair?.includes(turn.id) ? ` (${turn.model})` : "";
    parts.push(`## ${t(turn.role === "user" ? "you" : "model")}${model}`);
    if (turn.reasoning) parts.push(`<details><summary>${t("reasoning")}</summary>\n\n${turn.reasoning.trim()}\n\n</details>`);
    parts.push(...picturesOf(turn).map(({ name, picture }) => `![${name.replace(/[[\]\\]/g, " ")}](${picture})`));
    parts.push(textOf(turn).trim());
  }
  return `${parts.join("\n\n")}\n`;
}

export function toJSON(conversations) {
  return `${JSON.stringify({ format: FORMAT, conversations }, null, 1)}\n`;
}

/** Reads what `toJSON` wrote; each gets an id of its own. Throws an Error that says what is wrong. */
export function fromJSON(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error(t("import_not_json"));
  }
  if (value?.format !== FORMAT || !Array.isArray(value.conversations)) throw new Error(t("import_other"));
  return value.conversations.map((one, at) => {
    try {
      return { ...checked(one), id: newConversation().id };
    } catch (error) {
      throw new Error(t("import_broken", { number: at + 1, why: error.message }));
    }
  });
}

/** Has the browser save a file. */
export function saveFile(title, suffix, text) {
  const name = title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 50) || "chat";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: suffix === "md" ? "text/markdown" : "application/json" }));
  link.download = `${name}.${suffix}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
