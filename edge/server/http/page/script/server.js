// Asks the server, and reads its errors and its streams.

import { $ } from "./dom.js";

export function headers(extra) {
  const key = $("key").value.trim();
  return { ...extra, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

export class Refusal extends Error {
  constructor(message, status, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export async function refusal(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    message = "the server gave no reason";
  }
  if (response.status === 401) message = "The server wants an API key. Enter it under Access.";
  const after = Number(response.headers.get("retry-after")) || 0;
  return new Refusal(`${message} (${response.status})`, response.status, after);
}

export async function getJSON(path) {
  const response = await fetch(path, { headers: headers(), cache: "no-store" });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

export function unreachable(error) {
  return error instanceof TypeError ? "The server cannot be reached." : error.message;
}

export async function* events(body) {
  // Server-sent events: lines "data: ..."; comments keep the line open.
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
