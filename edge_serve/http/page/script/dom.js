// Makes and finds elements. Text of the model, of the server and of the user only ever becomes a text node.

export const $ = (id) => document.getElementById(id);

/** Whether a key belongs to an input method; Safari ends the composition before the key that confirms it. */
export const isComposing = (event) => event.isComposing || event.keyCode === 229;

export function node(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
