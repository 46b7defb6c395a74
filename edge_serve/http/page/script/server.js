// Asks the server, and reads its errors and its streams.

import { givenKey } from "./access.js";
import { t } from "./words.js";

export function headers(extra) {
  const key = givenKey();
  if (/[^\x20-\x7e]/.test(key)) throw new Refusal(t("key_unknown"), 401, 0);  // no header holds it
  return { ...extra, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

export class Refusal extends Error {
  constructor(message, status, retryAfterS) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

async function refusal(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    message = t("no_reason");
  }
  if (response.status === 401) return new Refusal(t(givenKey() ? "key_unknown" : "key_ask"), 401, 0);
  const after = Number(response.headers.get("retry-after")) || 0;
  return new Refusal(`${message} (${response.status})`, response.status, after);
}

/** Reads JSON from a path below the page's own address, which a proxy may have under a prefix. */
export async function getJSON(path) {
  const response = await fetch(path, { headers: headers(), cache: "no-store" });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/** Sends JSON; returns the response, whose body is yet to be read. */
export async function post(path, body, signal) {
  const response = await fetch(path, {
    method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw await refusal(response);
  return response;
}

export function reasonOf(error) {
  return error instanceof TypeError ? t("unreachable") : error.message;
}

/** Server-sent events: lines "data: ..."; comments keep the line open. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  }
}
