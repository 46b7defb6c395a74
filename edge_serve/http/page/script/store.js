// Keeps conversations and presets in this browser (IndexedDB); in memory where it lets nothing be kept.

import { checked } from "./conversation.js";

const NAME = "edge-llm", VERSION = 1;
const memory = { conversations: new Map(), presets: new Map() };
let opened = null;

/** Hears from the other tabs of this page; null where the browser lets nothing be kept. */
export const tabs = channel();

function channel() {
  try {
    return new BroadcastChannel(NAME);
  } catch (error) {
    console.warn("other tabs are not heard:", error.message);
    return null;
  }
}

function open() {
  opened ??= new Promise((resolve) => {
    let request;
    try {
      request = indexedDB.open(NAME, VERSION);
    } catch (error) {
      console.warn("nothing is kept:", error.message);
      resolve(null);
      return;
    }
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("presets", { keyPath: "name" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => {
      console.warn("nothing is kept:", request.error?.message);
      resolve(null);
    };
  });
  return opened;
}

/** Whether what is written outlives this page. */
export async function isKept() {
  return await open() !== null;
}

// Browsers end the connections of pages in the background, often without a word: then it is tried on a new one.
async function work(store, mode, act) {
  try {
    return await transact(store, mode, act);
  } catch (error) {
    if (!["InvalidStateError", "UnknownError"].includes(error.name)) throw error;
    const ended = opened;
    opened = null;
    if (await isKept()) return transact(store, mode, act);
    opened = ended;  // memory must not take the place of what was kept until now
    throw error;
  }
}

async function transact(store, mode, act) {
  const base = await open();
  return new Promise((resolve, reject) => {
    const transaction = base.transaction(store, mode);
    const request = act(transaction.objectStore(store));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error ?? request.error);
  });
}

// Returns the values; undefined in the place of each that cannot be read.
async function all(store) {
  if (!await isKept()) return [...memory[store].values()];
  try {
    return await work(store, "readonly", (there) => there.getAll());
  } catch (error) {
    console.warn("values are read one by one:", error.message);  // one whose file is lost fails all
  }
  const keys = await work(store, "readonly", (there) => there.getAllKeys());
  const found = await Promise.allSettled(keys.map((key) => work(store, "readonly", (there) => there.get(key))));
  return found.map(({ value }) => value);
}

async function put(store, key, value) {
  if (!await isKept()) memory[store].set(key, structuredClone(value));
  else await work(store, "readwrite", (there) => there.put(value));
}

async function remove(store, key) {
  memory[store].delete(key);
  if (await isKept()) await work(store, "readwrite", (there) => there.delete(key));
}

/** Returns the conversation with this id; null where there is none that can be read. */
export async function loadConversation(id) {
  if (!await isKept()) return null;
  const value = await work("conversations", "readonly", (there) => there.get(id));
  try {
    return value === undefined ? null : Object.assign(checked(value), { id });
  } catch {
    return null;
  }
}

/** Returns the conversations, newest first, and how many stored values are none (they stay as they are). */
export async function loadConversations() {
  const good = [];
  let broken = 0;
  for (const value of await all("conversations")) {
    try {
      const conversation = checked(value);
      conversation.id = value.id;
      good.push(conversation);
    } catch (error) {
      broken += 1;
      console.warn("a stored conversation cannot be read:", error.message);
    }
  }
  good.sort((a, b) => b.updated - a.updated);
  return { conversations: good, broken };
}

export const keepConversation = (conversation) => put("conversations", conversation.id, conversation);
export const dropConversation = (id) => remove("conversations", id);
export const loadPresets = async () => (await all("presets")).filter((preset) => preset !== undefined);
export const keepPreset = (preset) => put("presets", preset.name, preset);
export const dropPreset = (name) => remove("presets", name);
