// The LoRAs tab: what is connected, on or off, how strong, in which order.

import { h } from "./dom.js";
import { LORA_NODE, addLoRA, canGrow, chainsOf, exchange, removeLoRA, setWidget, widgetOf } from "./graph.js";
import { picker } from "./picker.js";
import { shortName } from "./report.js";

/**
 * Draws the tab for one node. What can have the focus has a `data-key`: the panel finds it again when it is drawn anew.
 * @param {object} node
 * @param {object} words
 * @param {{createNode: Function, files: () => Promise<string[]>, edit: (change: () => void) => void, show: (node: object) => void, redraw: () => void}} host
 */
export function lorasView(node, words, host) {
  const order = chainsOf(node).flatMap((chain) => [
    ...(chain.head ? [{ head: chain.head.node }] : []),
    ...chain.nodes.map((lora) => ({ lora })),
  ]);
  const loras = order.filter((one) => one.lora).map((one) => one.lora);
  const change = (work) => {
    host.edit(work);
    host.redraw();
  };
  const rows = order.map((one) => (one.lora ? loraRow(one.lora, loras, node, words, change, host) : headRow(one.head, words)));
  const none = canGrow(node) && node.inputs.some((input) => input.name === "calibration") ? words.ofCalibration : words.noLoras;
  const view = h("div", {}, ...(rows.length ? rows : [h("p", { class: "ssr-hint" }, none)]));
  if (!canGrow(node)) return view;
  const add = h("button", { type: "button", dataset: { key: "add" } }, `+ ${words.add}`);
  add.addEventListener("click", () => {
    const list = picker({
      names: host.files(),
      words,
      onPick: (name) => change(() => addLoRA(node, name, host.createNode)),
      onClose: host.redraw,
    });
    view.replaceWith(list.element);
    list.focus();
  });
  view.append(add);
  return view;
}

function headRow(head, words) {
  return h("div", { class: "ssr-row" }, h("span", { class: "ssr-wide ssr-hint" }, words.other(head.title ?? head.type)));
}

function loraRow(lora, loras, node, words, change, host) {
  const at = loras.indexOf(lora);
  const file = String(widgetOf(lora, "lora")?.value ?? "");
  const name = file && file !== "None" ? shortName(file) : (lora.title ?? LORA_NODE);
  const on = widgetOf(lora, "enabled")?.value !== false;
  const key = (part) => ({ key: `${lora.id} ${part}` });
  const enabled = h("input", { type: "checkbox", checked: on, "aria-label": words.enabled(name), dataset: key("enabled") });
  enabled.addEventListener("change", () => change(() => setWidget(lora, "enabled", enabled.checked)));
  const strength = h("input", {
    type: "number", step: 0.05, class: "ssr-strength", value: widgetOf(lora, "strength_model")?.value ?? 1,
    "aria-label": words.strength(name), title: words.strength(name), dataset: key("strength"),
  });
  strength.addEventListener("change", () => {
    const value = Number.parseFloat(strength.value);
    if (Number.isFinite(value)) host.edit(() => setWidget(lora, "strength_model", Math.max(-100, Math.min(100, value))));
  });
  const button = (part, sign, label, work, disabled = false) =>
    h("button", { type: "button", "aria-label": label, title: label, disabled, dataset: key(part), on: { click: work } }, sign);
  const title = h("button", { type: "button", class: "ssr-wide ssr-name", title: words.open(file || name), dataset: key("open"), on: { click: () => host.show(lora) } }, name);
  return h(
    "div",
    { class: on ? "ssr-row" : "ssr-row ssr-off", dataset: { lora: file } },
    enabled,
    title,
    strength,
    button("up", "↑", words.up(name), () => change(() => exchange(node, at, at - 1)), at === 0),
    button("down", "↓", words.down(name), () => change(() => exchange(node, at, at + 1)), at === loras.length - 1),
    button("remove", "✕", words.remove(name), () => change(() => removeLoRA(node, lora))),
  );
}
