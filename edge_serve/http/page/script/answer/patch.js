// Changes nodes into others with as little as possible, so that a selection, the focus and the place
// to which something is scrolled survive while an answer grows.

/** Makes the children of `parent` from `start` on like those of `fresh`. */
export function patch(parent, fresh, start = parent.firstChild) {
  let old = start;
  for (let next = fresh.firstChild; next;) {
    const after = next.nextSibling;
    if (!old) parent.append(next);
    else if (old.isEqualNode(next)) old = old.nextSibling;
    else old = changed(old, next);
    next = after;
  }
  while (old) {
    const after = old.nextSibling;
    old.remove();
    old = after;
  }
}

function changed(old, next) {
  const after = old.nextSibling;
  const alike = old.nodeType === next.nodeType && old.nodeName === next.nodeName;
  if (alike && old.nodeType === Node.TEXT_NODE) {
    if (next.data.startsWith(old.data)) old.appendData(next.data.slice(old.data.length));
    else old.data = next.data;
  } else if (alike && old.className === next.className && old.namespaceURI === next.namespaceURI) {
    for (const { name } of [...old.attributes]) if (!next.hasAttribute(name)) old.removeAttribute(name);
    for (const { name, value } of next.attributes) {
      if (name !== "style" && old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    if (next.style?.cssText !== old.style?.cssText) old.style.cssText = next.style.cssText;
    patch(old, next);
  } else old.replaceWith(next);
  return after;
}
