// Keeps values for as long as the tab lives.

const STORE = "edge-llm";

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
    sessionStorage.setItem(`${STORE}-${key}`, JSON.stringify(value));
  } catch (error) {
    console.warn("not stored:", error.message);
  }
}
