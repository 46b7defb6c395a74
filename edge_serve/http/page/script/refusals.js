// Says in words why requests were refused: the server counts them by the codes of its errors.

import { nameOf } from "./words.js";

const CODES = Object.entries({
  "refused_body": ["content_too_large"],
  "refused_busy": ["too_many_connections", "bodies_full"],
  "refused_context": ["context_length_exceeded"],
  "refused_engine": ["engine_error", "engine_stalled", "engine_dead", "internal_error", "loop_stalled",
    "not_installed", "storage_full", "storage_failed"],
  "refused_host": ["host_not_allowed", "cross_site"],
  "refused_invalid": ["invalid_value", "missing_field", "unknown_field", "invalid_json", "too_deep", "invalid_url",
    "needless_escape", "invalid_http", "invalid_length", "ambiguous_length", "header_too_large", "http_version"],
  "refused_key": ["invalid_api_key", "not_admin"],
  "refused_load": ["load_failed", "model_unloaded", "model_busy", "adapter_failed"],
  "refused_memory": ["insufficient_memory", "no_room"],
  "refused_missing": ["not_found", "model_not_found", "method_not_allowed", "no_adapter_dir", "outside_adapter_dir",
    "adapter_not_found", "adapter_kept"],
  "refused_queue": ["queue_full"],
  "refused_rate": ["rate_limit_exceeded", "address_rate_exceeded"],
  "refused_slow": ["header_timeout", "body_timeout"],
  "refused_starting": ["loading", "draining", "shutdown"],
  "refused_time": ["deadline_exceeded"],
  "refused_type": ["unsupported_media_type", "unsupported_encoding"],
});

/** Returns the reasons with their counts, the commonest first; codes of one meaning are added up. */
export function refusalsOf(counts) {
  const found = new Map();
  for (const [code, n] of Object.entries(counts)) {
    const key = CODES.find(([, codes]) => codes.includes(code))?.[0] ?? code;
    if (n) found.set(key, (found.get(key) ?? 0) + n);
  }
  return [...found].sort(([, a], [, b]) => b - a).map(([key, n]) => `${nameOf(key)} ${n}`);
}
