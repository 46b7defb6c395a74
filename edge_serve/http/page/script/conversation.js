// A conversation: a tree of turns, of which the way to one leaf is shown. No element is made here.
//
// Turns are never changed into others: who edits or regenerates gets a sibling, and both stay. `pair` names
// two siblings that are shown side by side until one of them is kept; the leaf is the first.

export const SCHEMA = 2;
const MAX_TITLE_CHARS = 60;
const PICTURE = /^data:image\/(png|jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}$/, MAX_PICTURE_CHARS = 2e6;

export function newConversation() {
  const now = Date.now();
  return { schema: SCHEMA, id: crypto.getRandomValues(new Uint32Array(3)).join("-"), title: "", created: now,
    updated: now, leaf: null, pair: null, turns: {} };
}

/**
 * Adds a turn below `parent` (null: at the beginning), with files where there are some, and makes it the leaf;
 * returns it.
 */
export function addTurn(conversation, parent, role, content, files = []) {
  const numbers = Object.keys(conversation.turns).map(Number);
  const id = String(1 + Math.max(0, ...numbers));
  const turn = { id, parent, role, content, at: Date.now() };
  if (files.length) turn.files = files;
  conversation.turns[id] = turn;
  goTo(conversation, id);
  conversation.updated = turn.at;
  if (role === "user" && !conversation.title) conversation.title = titleOf(content || (files[0]?.name ?? ""));
  return turn;
}

export function titleOf(text) {
  const line = text.trim().split("\n")[0].trim();
  return line.length > MAX_TITLE_CHARS ? `${line.slice(0, MAX_TITLE_CHARS - 1)}…` : line;
}

/** Adds two answers to `parent` that are shown side by side; returns them. */
export function addPair(conversation, parent) {
  const turns = [0, 1].map(() => addTurn(conversation, parent, "assistant", ""));
  goTo(conversation, turns[0].id);
  conversation.pair = turns.map(({ id }) => id);
  return turns;
}

/** Goes on with `leaf`, and shows no pair any more. */
export function goTo(conversation, leaf) {
  conversation.leaf = leaf;
  conversation.pair = null;
}

/** Removes a turn that nothing follows; what stood beside it, or the leaf `before` it, becomes the leaf. */
export function removeLeaf(conversation, turn, before) {
  const { pair, turns } = conversation;
  const beside = (pair ?? []).find((id) => id !== turn.id && id in turns);
  delete turns[turn.id];
  goTo(conversation, beside ?? (before in turns ? before : leafBelow(conversation, turn.parent)));
}

/** Makes a conversation what another one of its id is; it and its turns stay the same objects. */
export function become(known, found) {
  const turns = {};
  for (const [id, turn] of Object.entries(found.turns)) turns[id] = mirror(known.turns[id] ?? {}, turn);
  mirror(known, { ...found, turns });
}

function mirror(old, now) {
  for (const key of Object.keys(old)) if (!(key in now)) delete old[key];
  return Object.assign(old, now);
}

/** Returns the turns from the beginning to `leaf`. */
export function pathOf(conversation, leaf = conversation.leaf) {
  const path = [];
  for (let turn = conversation.turns[leaf]; turn; turn = conversation.turns[turn.parent]) path.unshift(turn);
  return path;
}

/** Returns the turns that stand in the place of this one, itself among them, oldest first. */
export function siblingsOf(conversation, turn) {
  return Object.values(conversation.turns).filter((one) => one.parent === turn.parent && one.role === turn.role);
}

/** Returns the newest leaf below a turn (null: below the beginning), by their ids. */
export function leafBelow(conversation, id) {
  for (;;) {
    const next = Object.values(conversation.turns).filter((one) => one.parent === id).at(-1);
    if (!next) return id;
    ({ id } = next);
  }
}

/** Returns the text of a turn as a model reads it: its text files first, each with its name and in a fence. */
export function textOf({ content, files = [] }) {
  return [...files.filter(({ text }) => text !== undefined).map(fenced), content].filter(Boolean).join("\n\n");
}

/** Returns the pictures of a turn. */
export const picturesOf = ({ files = [] }) => files.filter(({ picture }) => picture);

// What a message says: its text, after its pictures where it has some.
function contentOf(turn) {
  const pictures = picturesOf(turn).map(({ picture }) => ({ type: "image_url", image_url: { url: picture } }));
  const text = textOf(turn);
  return pictures.length ? [...pictures, ...text ? [{ type: "text", text }] : []] : text;
}

function fenced({ name, text }) {
  const longest = (text.match(/`{3,}/g) ?? []).reduce((most, run) => Math.max(most, run.length), 2);
  const fence = "`".repeat(longest + 1);
  return `${name}:\n${fence}${/\.(\w{1,10})$/.exec(name)?.[1] ?? ""}\n${text.replace(/\n$/, "")}\n${fence}`;
}

/** Returns the messages to send for an answer to `leaf`; reasoning stays here, templates strip it anyway. */
export function messagesOf(conversation, leaf, system) {
  const past = pathOf(conversation, leaf).map((turn) => ({ role: turn.role, content: contentOf(turn) }));
  return system ? [{ role: "system", content: system }, ...past] : past;
}

/** Returns the messages and options with which the model goes on with an answer that broke off. */
export function continuationOf(conversation, turn, system) {
  // Also without reasoning, so that tags in the content are text.
  const begun = { role: "assistant", content: turn.content, reasoning_content: turn.reasoning ?? "" };
  return { messages: [...messagesOf(conversation, turn.parent, system), begun], continue_final_message: true };
}

/**
 * Checks a stored or imported value; returns a conversation of the present schema.
 *
 * Schema 1 was a list of turns in a row. Throws an Error that says what is wrong.
 */
export function checked(value) {
  if (typeof value !== "object" || value === null) throw new Error("not an object");
  if (value.schema === undefined && Array.isArray(value.turns)) return fromList(value);
  if (value.schema !== SCHEMA) throw new Error(`schema ${String(value.schema).slice(0, 20)}`);
  const { turns } = value;
  if (typeof value.id !== "string" || typeof value.title !== "string") throw new Error("id or title");
  if (typeof turns !== "object" || turns === null) throw new Error("turns");
  for (const [id, turn] of Object.entries(turns)) {
    if (!/^\d{1,9}$/.test(id) || turn?.id !== id || !isTurn(turn)) throw new Error(`turn ${id.slice(0, 20)}`);
    // A parent is older than its child, so there is no circle.
    if (turn.parent !== null && !(turn.parent in turns && Number(turn.parent) < Number(id))) {
      throw new Error(`parent of turn ${id}`);
    }
  }
  const leaf = leafBelow(value, Object.hasOwn(turns, value.leaf) ? value.leaf : null);
  const pair = isPair(value.pair, turns) && value.pair[0] === leaf ? value.pair : null;
  const time = (found) => Number.isFinite(found) ? found : Date.now();
  return { schema: SCHEMA, id: value.id, title: value.title, created: time(value.created),
    updated: time(value.updated), leaf, pair, turns };
}

function isPair(pair, turns) {
  if (!Array.isArray(pair) || pair.length !== 2 || pair[0] === pair[1]) return false;
  const [one, other] = pair.map((id) => typeof id === "string" ? turns[id] : undefined);
  return one?.role === "assistant" && other?.role === "assistant" && one.parent === other.parent;
}

function isTurn(turn) {
  return ["user", "assistant"].includes(turn.role) && typeof turn.content === "string"
    && (turn.parent === null || typeof turn.parent === "string")
    && ["undefined", "string"].includes(typeof turn.reasoning) && turn.figures !== null
    && (turn.files === undefined || (Array.isArray(turn.files) && turn.files.every(isFile)));
}

const isFile = (file) => typeof file?.name === "string"
  && (file.picture === undefined ? typeof file.text === "string" : isPicture(file.picture));
const isPicture = (uri) => typeof uri === "string" && uri.length <= MAX_PICTURE_CHARS && PICTURE.test(uri);

function fromList(value) {
  const made = newConversation();
  for (const turn of value.turns) {
    if (!isTurn({ ...turn, parent: null })) throw new Error("a turn");
    const added = addTurn(made, made.leaf, turn.role, turn.content, turn.files);
    if (turn.reasoning) added.reasoning = turn.reasoning;
  }
  if (typeof value.title === "string" && value.title) made.title = value.title;
  return made;
}
