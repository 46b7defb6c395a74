// Keeps values for as long as the tab lives.

const STORE = "edge-llm";
const MAX_STORED = 400000;  // characters of a conversation that survive a reload

export function load(key, fallback) {
  try {
    const text = sessionStorage.getItem(`${STORE}-${key}`);
    return text === null ? fallback : JSON.parse(text);
  } catch (error) {
    console.warn("nothing restored:", error.message);
    return fallback;
  }
}

export function save(key, value) {
  try {
    const text = JSON.stringify(value);
    if (text.length <= MAX_STORED) sessionStorage.setItem(`${STORE}-${key}`, text);
    else sessionStorage.removeItem(`${STORE}-${key}`);
  } catch (error) {
    console.warn("not stored:", error.message);
  }
}
