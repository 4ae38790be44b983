// A searchable list of LoRA files.

import { freshId, h } from "./dom.js";
import { chooser } from "./layers.js";

const SHOWN = 200;

/** Names that contain all words of a search; those whose file name begins with it come first. */
export function findNames(names, search) {
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  const found = names.filter((name) => words.every((word) => name.toLowerCase().includes(word)));
  const first = words[0];
  if (!first) return found;
  const begins = (name) => name.toLowerCase().replace(/^.*[\\/]/, "").startsWith(first);
  return [...found.filter(begins), ...found.filter((name) => !begins(name))];
}

/**
 * @param {object} options
 * @param {string[]|Promise<string[]>} options.names may come later: the search has the focus already
 * @param {object} options.words
 * @param {(name: string) => void} options.onPick
 * @param {() => void} options.onClose
 */
export function picker({ names, words, onPick, onClose }) {
  let all = null;
  let shown = [];
  let current = -1;
  const list = h("ul", { class: "ssr-list", role: "listbox", id: freshId("files"), "aria-label": words.find });
  const search = h("input", {
    type: "search", class: "ssr-wide", role: "combobox", placeholder: words.find, "aria-label": words.find,
    "aria-expanded": "true", "aria-controls": list.id, dataset: { key: "add" }, // where the focus goes once it is closed
  });
  const close = h("button", { type: "button", "aria-label": words.close, title: words.close, dataset: { key: "add" }, on: { click: onClose } }, "×");
  const choose = chooser(list, (index) => (current = index));
  const fill = () => {
    shown = findNames(all ?? [], search.value);
    const options = shown.slice(0, SHOWN).map((name) => h("li", { role: "option", id: freshId("file"), title: name }, h("span", { class: "ssr-name" }, name)));
    const hint = shown.length > SHOWN ? words.more(shown.length - SHOWN) : shown.length || !all ? "" : words.noFile;
    list.replaceChildren(...options, ...(hint ? [h("li", { class: "ssr-hint", role: "presentation" }, hint)] : []));
    current = -1;
    choose(shown.length ? 0 : -1);
  };
  search.addEventListener("input", fill);
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && current >= 0) onPick(shown[current]);
    else if (event.key === "Escape") onClose();
    else if (["ArrowDown", "ArrowUp", "PageDown", "PageUp"].includes(event.key)) {
      list.dispatchEvent(new KeyboardEvent("keydown", { key: event.key }));
      event.preventDefault();
    }
  });
  list.addEventListener("click", (event) => {
    if (event.target.closest("[role=option]") && current >= 0) onPick(shown[current]);
  });
  Promise.resolve(names).then((found) => {
    all = found;
    fill();
  });
  const element = h("div", { class: "ssr-picker" }, h("div", { class: "ssr-row" }, search, close), list);
  return { element, focus: () => search.focus({ preventScroll: true }) };
}
