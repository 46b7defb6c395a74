// Makes and finds elements. Text of the model, of the server and of the user only ever becomes a text node.

export const $ = (id) => document.getElementById(id);

export function node(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
