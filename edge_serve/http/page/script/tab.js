// Keeps small values: for as long as the tab lives, or in this browser.

const STORE = "edge-llm";

// The area is named, not given: where a browser lets nothing be kept, already naming it fails.
function keeper(area) {
  return {
    load(key, fallback) {
      try {
        const text = window[area].getItem(`${STORE}-${key}`);
        return text === null ? fallback : JSON.parse(text);
      } catch (error) {
        console.warn("nothing restored:", error.message);
        return fallback;
      }
    },
    save(key, value) {
      try {
        window[area].setItem(`${STORE}-${key}`, JSON.stringify(value));
      } catch (error) {
        console.warn("not stored:", error.message);
      }
    },
  };
}

export const { load, save } = keeper("sessionStorage");
export const browser = keeper("localStorage");
