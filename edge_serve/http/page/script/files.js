// Files that go with the next message, texts and pictures: taken, held against the context, and shown.

import { $, node } from "./dom.js";
import { bytes } from "./figures.js";
import { estimate, showMeter, usedTokens } from "./meter.js";
import { pathOf } from "./conversation.js";
import { toast } from "./conversations.js";
import { isPicture, readPicture } from "./pictures.js";
import { chosenModel, state } from "./state.js";
import { count, language, t } from "./words.js";

const MAX_BYTES_PER_TOKEN = 12;  // whatever has more than this for each token that is left is not even read
const MAX_BYTES = 8e6;  // where the context is not known
const MAX_NAME_CHARS = 100;

/** Returns the files that wait for the next message, which has them from then on. */
export function takeFiles() {
  const { files } = state;
  state.files = [];
  showFiles();
  return files;
}

/** Adds files to the next message; says why where one cannot be added. */
export async function attach(given) {
  const refused = [];
  for (const file of given) {
    try {
      if (isPicture(file)) {
        state.files.push(await readPicture(file, nameOf(file)));
        continue;
      }
      const room = roomLeft();
      const read = await readText(file, room.left);
      const tokens = estimate(read.text);
      if (tokens > room.left) throw new Error(tooLong(read.name, tokens, room));
      state.files.push(read);
    } catch (error) {
      refused.push(error.message);
    }
  }
  showFiles();
  if (refused.length) toast(refused.join(" "));
  $("prompt").focus();
}

function roomLeft() {
  const limit = chosenModel()?.max_model_len ?? Infinity;
  return { limit, left: Math.max(0, limit - usedTokens(pathOf(state.conversation), $("prompt").value, state.files)) };
}

function tooLong(name, tokens, { limit, left }) {
  return t("file_long", { name, n: count(tokens), left: count(left), limit: count(limit) });
}

const nameOf = (file) => file.name.replace(/[\p{Cc}`]+/gu, " ").slice(0, MAX_NAME_CHARS) || "file";

async function readText(file, left) {
  const name = nameOf(file);
  if (file.size > Math.min(MAX_BYTES, MAX_BYTES_PER_TOKEN * left)) {
    throw new Error(t("file_large", { name, size: bytes(file.size) }));
  }
  let data;
  try {
    data = new Uint8Array(await file.arrayBuffer());
  } catch (error) {
    throw new Error(t("file_unread", { name, why: error.message }));  // a folder, or it has gone
  }
  const text = decode(data)?.replace(/\r\n?/g, "\n");
  if (text === undefined) throw new Error(t("file_binary", { name }));
  if (!text.trim()) throw new Error(t("file_empty", { name }));
  return { name, text };
}

// UTF-8, UTF-16 with its mark, or what this reader's older programs write; undefined where that is no text.
function decode(data) {
  const marked = { "255,254": "utf-16le", "254,255": "utf-16be" }[String(data.slice(0, 2))];
  for (const encoding of marked ? [marked] : ["utf-8", language === "en" ? "windows-1252" : "gb18030"]) {
    try {
      const text = new TextDecoder(encoding, { fatal: true }).decode(data);
      return /[\0-\x08\x0e-\x1a\x1c-\x1f]/.test(text) ? undefined : text;
    } catch {
      // the next one may fit
    }
  }
  return undefined;
}

function showFiles() {
  $("files").replaceChildren(...state.files.map((file) => {
    const item = node("li", "chip"), remove = node("button", "quiet", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", t("file_remove", { name: file.name }));
    remove.addEventListener("click", () => {
      state.files = state.files.filter((one) => one !== file);
      showFiles();
      $("prompt").focus();
    });
    item.append(...labelOf(file), remove);
    return item;
  }));
  $("files").hidden = state.files.length === 0;
  showMeter();
}

const sizeOf = ({ text, picture }) => bytes(picture ? Math.floor((picture.length - picture.indexOf(",")) * 3 / 4) : new Blob([text]).size);

// What tells a file from the others: its name, its size and, of a picture, how it looks.
function labelOf(file) {
  const label = [node("span", "name", file.name), node("small", "", sizeOf(file))];
  return file.picture ? [imageOf(file, ""), ...label] : label;
}

function imageOf({ picture }, words) {
  const image = node("img");
  image.src = picture;
  image.alt = words;
  return image;
}

/** Makes the list of a message's files, each of which can be unfolded. */
export function fileList(files) {
  const list = node("ul", "files");
  list.append(...files.map((file) => {
    const item = node("li"), details = node("details", "chip"), summary = node("summary");
    summary.append(...labelOf(file));
    details.append(summary, file.picture ? imageOf(file, file.name) : textBox(file));
    item.append(details);
    return item;
  }));
  return list;
}

function textBox(file) {
  const text = node("pre", "", file.text);
  text.tabIndex = 0;  // so that the keyboard can scroll it
  return text;
}

/** Takes files from the button, from what is pasted and from what is dropped. */
export function startFiles() {
  $("attach").addEventListener("click", () => $("attach-file").click());
  $("attach-file").addEventListener("change", async () => {
    await attach([...$("attach-file").files]);
    $("attach-file").value = "";
  });
  $("prompt").addEventListener("paste", (event) => {
    const { files } = event.clipboardData;
    // Programs for tables paste a picture beside their text.
    if (!files.length || event.clipboardData.types.includes("text/plain")) return;
    event.preventDefault();
    attach([...files]);
  });
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  for (const [name, isOver] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
    document.addEventListener(name, (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();  // the browser would show the file in the place of the page
      document.body.classList.toggle("dropping", isOver && !document.body.classList.contains("locked"));
      if (name === "drop" && !document.body.classList.contains("locked")) attach([...event.dataTransfer.files]);
    });
  }
}
