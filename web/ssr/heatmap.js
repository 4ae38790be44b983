// A K x K matrix as a table of shades, with its numbers, for mouse and keyboard.

import { h } from "./dom.js";
import { format } from "./report.js";

/** From which shade on a number is legible in the other colour only, by theme (panel.css has the colours). */
const TURNS = { dark: 0.5, light: 0.65 };
const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/**
 * @param {object} options
 * @param {number[][]} options.matrix rows are prompts, columns are LoRAs; 0 to 1
 * @param {string} options.title
 * @param {(i: number, j: number) => string} options.describe what a cell means, in words
 * @param {(text: string) => void} options.onRead called with that when a cell is pointed at or focused
 */
export function heatmap({ matrix, title, describe, onRead }) {
  const cells = matrix.map((row, i) => row.map((value, j) => cell(value, describe(i, j), onRead)));
  cells[0][0].tabIndex = 0;
  const header = h("tr", {}, h("td", { role: "presentation" }), ...matrix.map((_, j) => h("th", { scope: "col" }, j + 1)));
  const rows = cells.map((row, i) => h("tr", {}, h("th", { scope: "row" }, i + 1), ...row));
  const grid = h("table", { role: "grid", class: "ssr-heatmap", "aria-label": title }, header, ...rows);
  grid.addEventListener("keydown", (event) => {
    const at = placeOf(cells, event.target);
    const next = at && step(at, event.key, cells.length);
    if (!next) return;
    event.preventDefault();
    cells[at[0]][at[1]].tabIndex = -1;
    const target = cells[next[0]][next[1]];
    target.tabIndex = 0;
    target.focus({ preventScroll: true });
  });
  return h("figure", { class: "ssr-figure" }, h("figcaption", {}, title), grid);
}

function cell(value, words, onRead) {
  const shade = Math.max(0, Math.min(1, value));
  const read = () => onRead(words);
  return h(
    "td",
    {
      role: "gridcell",
      tabindex: -1,
      class: `ssr-cell${shade > TURNS.dark ? " ssr-dark-high" : ""}${shade > TURNS.light ? " ssr-light-high" : ""}`,
      style: { "--ssr-shade": `${Math.round(shade * 100)}%` },
      "aria-label": words,
      on: { pointerenter: read, focus: read },
    },
    shade === 0 || shade === 1 ? format(value) : value.toFixed(2),
  );
}

/** Where a key leads from a cell, or null. */
export function step([i, j], key, size) {
  if (key === "Home") return [i, 0];
  if (key === "End") return [i, size - 1];
  const move = MOVES[key];
  if (!move) return null;
  const clamp = (value) => Math.max(0, Math.min(size - 1, value));
  return [clamp(i + move[0]), clamp(j + move[1])];
}

function placeOf(cells, element) {
  for (let i = 0; i < cells.length; i++) {
    const j = cells[i].indexOf(element);
    if (j >= 0) return [i, j];
  }
  return null;
}
