// The Layers tab: a searchable list, and one layer's numbers.

import { freshId, h } from "./dom.js";
import { findLayers, format, layersOf } from "./report.js";
import { crosstalkView } from "./result.js";

const SHOWN = 200;
const HIDDEN = new Set(["target", "crosstalk", "measures", "overlap", "closest"]);

export function layersView(report, words) {
  const layers = layersOf(report);
  const detail = h("div", { class: "ssr-detail", tabindex: 0, "aria-live": "polite" });
  const list = h("ul", { class: "ssr-list", role: "listbox", tabindex: 0, "aria-label": words.layers });
  const search = h("input", { type: "search", class: "ssr-wide", placeholder: words.search, "aria-label": words.search });
  const order = h(
    "select",
    { "aria-label": words.order },
    h("option", { value: "model" }, words.byModel),
    h("option", { value: "error" }, words.byError),
  );
  const select = chooser(list, (index) => showLayer(detail, shown[index], report, words));
  let shown = [];
  const refill = () => {
    shown = findLayers(layers, search.value, order.value);
    list.replaceChildren(...shown.slice(0, SHOWN).map((layer) => row(layer, words)), ...rest(shown, report, words));
    select(shown.length ? 0 : -1);
    if (!shown.length) detail.replaceChildren();
  };
  search.addEventListener("input", refill);
  order.addEventListener("change", refill);
  refill();
  return h("div", { class: "ssr-layers" }, h("div", { class: "ssr-row" }, search, order), list, detail);
}

function row(layer, words) {
  return h(
    "li",
    { role: "option", id: freshId("layer"), title: layer.target },
    h("span", { class: "ssr-name" }, layer.part === "clip" ? `CLIP ${layer.target}` : layer.target),
    h("span", {}, words.status[layer.status] ?? layer.status),
    h("span", {}, format(layer.errors?.result)),
  );
}

function rest(shown, report, words) {
  const lines = [];
  if (!shown.length) lines.push(words.noLayers);
  if (shown.length > SHOWN) lines.push(words.more(shown.length - SHOWN));
  if (report.omitted?.layers) lines.push(words.omitted(report.omitted.layers));
  return lines.map((line) => h("li", { class: "ssr-hint", role: "presentation" }, line));
}

/** Makes a list choosable by click and arrow keys; answers a function that chooses. */
export function chooser(list, onChoose) {
  let current = -1;
  const options = () => [...list.querySelectorAll("[role=option]")];
  const choose = (index) => {
    const all = options();
    current = Math.max(-1, Math.min(index, all.length - 1));
    all.forEach((option, i) => option.setAttribute("aria-selected", i === current));
    if (current < 0) return list.removeAttribute("aria-activedescendant");
    list.setAttribute("aria-activedescendant", all[current].id);
    keepInView(list, all[current]);
    onChoose(current);
  };
  list.addEventListener("click", (event) => {
    const index = options().indexOf(event.target.closest("[role=option]"));
    if (index >= 0) choose(index);
  });
  list.addEventListener("keydown", (event) => {
    const last = options().length - 1;
    const to = { ArrowDown: current + 1, ArrowUp: current - 1, Home: 0, End: last, PageDown: current + 10, PageUp: current - 10 };
    if (!(event.key in to)) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(last, to[event.key])));
  });
  return choose;
}

// Not scrollIntoView: that would scroll the page under the canvas too.
function keepInView(list, option) {
  const top = option.offsetTop - list.offsetTop;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + option.offsetHeight > list.scrollTop + list.clientHeight) {
    list.scrollTop = top + option.offsetHeight - list.clientHeight;
  }
}

function showLayer(detail, layer, report, words) {
  const shown = Object.entries(layer).filter(([name, value]) => !HIDDEN.has(name) && !empty(value));
  const pairs = [...shown, ...Object.entries(layer.measures ?? {})];
  const names = (layer.tasks ?? []).map((index) => report.tasks[index]);
  const numbers = h("dl", {}, ...pairs.flatMap(([name, value]) => entry(name, value, report, words)));
  const matrix = layer.crosstalk ? crosstalkView(layer, names, words) : report.omitted?.layer_columns?.includes("crosstalk") && words.matrixOmitted;
  const title = h("b", {}, layer.target);
  detail.replaceChildren(title, numbers, ...(matrix && names.length > 1 ? [matrix] : []));
}

const empty = (value) =>
  value === null || value === undefined || (typeof value === "object" && !Object.keys(value).length) || value === 0;

function entry(name, value, report, words) {
  const term = h("dt", {}, words.fields[name] ?? name.replaceAll("_", " "));
  return [term, h("dd", { dataset: { field: name } }, inWords(name, value, report, words))];
}

function inWords(name, value, report, words) {
  if (name === "status") return words.status[value] ?? value;
  if (name === "tasks") return value.map((index) => index + 1).join(", ");
  if (Array.isArray(value)) return value.map(format).join(", ");
  if (value && typeof value === "object") {
    const each = (item) => [item].flat().map(format).join(" / ");
    return Object.entries(value).map(([key, item]) => `${words.routers[key] ?? key} ${each(item)}`).join(", ");
  }
  return format(value);
}
