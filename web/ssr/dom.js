// Small helpers for building elements. Text only ever goes in as text: file names and metadata come from strangers.

/**
 * An element with properties, attributes, listeners and children.
 * @param {string} tag
 * @param {Record<string, any>} [properties] `class`, `dataset`, `on` (listeners), `style`; others are attributes
 * @param {...(Node|string|number|null|undefined|false)} children
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) if (!absent(value)) set(element, name, value);
  element.append(...children.filter((child) => !absent(child)).map(asNode));
  return element;
}

function set(element, name, value) {
  if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
  else if (name === "dataset") Object.assign(element.dataset, value);
  else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
  else if (name === "value" || name === "checked") element[name] = value;
  else element.setAttribute(name, value === true ? "" : String(value));
}

const absent = (value) => value === null || value === undefined || value === false;
const asNode = (child) => (child instanceof Node ? child : document.createTextNode(String(child)));

/** Keeps typing and clicking inside an element away from the canvas, which has shortcuts for most keys. */
export function keepEvents(element) {
  for (const event of ["keydown", "keyup", "keypress", "paste", "copy", "cut", "dblclick", "contextmenu"]) {
    element.addEventListener(event, (e) => {
      // Queueing with Ctrl+Enter must work wherever the focus is.
      if (!((e.ctrlKey || e.metaKey) && e.key === "Enter")) e.stopPropagation();
    });
  }
  return element;
}

/** The stylesheet, once a page. */
export function addStyles() {
  const id = "ssr-merge-styles";
  if (document.getElementById(id)) return;
  const href = new URL("./panel.css", import.meta.url).href;
  document.head.append(h("link", { id, rel: "stylesheet", href }));
}

let counter = 0;
/** An id that no other panel of this page has. */
export const freshId = (name) => `ssr-${name}-${++counter}`;
