// The Result tab: progress while the node runs, then crosstalk before and after, and errors.

import { h } from "./dom.js";
import { heatmap } from "./heatmap.js";
import { taskStates } from "./progress.js";
import { crosstalkOf, errorTable, format, normalised, shortName } from "./report.js";

/** What is going on, in one line. */
export function statusText(state, words) {
  if (!state.running) return "";
  if (state.stage === "solve") return words.solving;
  if (state.stage !== "calibrate") return words.loading;
  const shown = { ...state, step: Math.min(state.step, state.steps), name: shortName(state.tasks[state.task] ?? "") };
  return words.calibrating(shown);
}

/** One picture a LoRA: what the model makes of its prompt with that LoRA alone. */
export function progressView(state) {
  const states = taskStates(state);
  const items = state.tasks.map((name, i) =>
    h(
      "li",
      { class: "ssr-task", dataset: { state: states[i] }, title: name },
      picture(state.previews?.[i]),
      `${states[i] === "done" ? "✓ " : ""}${i + 1} ${shortName(name)}`,
    ),
  );
  return h("ul", { class: "ssr-tasks" }, ...items);
}

// A place of fixed size even without a picture: nothing moves when one arrives.
const picture = (url) =>
  url ? h("img", { class: "ssr-thumb", src: url, alt: "" }) : h("span", { class: "ssr-thumb" });

/** Everything about a merge as a whole, or what a calibration saw. */
export function resultView(report, words) {
  if (report.kind === "calibration") return calibrationView(report, words);
  const errors = errorsView(report, words);
  if (!errors && !crosstalkOf(report, report.tasks.length)) return h("p", { class: "ssr-hint" }, words.unmeasured);
  return h("div", {}, crosstalkView(report, report.tasks, words), errors);
}

/** The two matrices side by side, of a whole merge or of one layer. */
export function crosstalkView(holder, tasks, words) {
  const matrices = crosstalkOf(holder, tasks.length);
  if (!matrices) return h("p", { class: "ssr-hint" }, words.noMatrix);
  const names = tasks.map(shortName);
  const line = h("div", { class: "ssr-read", "aria-hidden": "true" }, words.ideal);
  const draw = (matrix, title) =>
    heatmap({
      matrix: normalised(matrix),
      title,
      describe: (i, j) => words.cell(names[i], names[j], format(normalised(matrix)[i][j])),
      onRead: (text) => (line.textContent = text),
    });
  const legend = h("ul", { class: "ssr-legend" }, ...names.map((name, i) => h("li", { title: tasks[i] }, `${i + 1} ${name}`)));
  const maps = h("div", { class: "ssr-maps" }, draw(matrices.sum, words.before), draw(matrices.result, words.after));
  return h("div", { role: "group", "aria-label": words.matrix, title: words.matrix }, maps, line, legend);
}

/** Reconstruction error of each router on each set of tokens. */
function errorsView(report, words) {
  const { sets, rows } = errorTable(report);
  if (!rows.length) return null;
  const head = h("tr", {}, h("th", {}, words.error), ...sets.map((set) => h("th", { scope: "col" }, words.errorOn[set] ?? set)));
  const body = rows.map(({ router, values }) =>
    h(
      "tr",
      { class: router === "result" ? "ssr-own" : null, dataset: { router } },
      h("th", { scope: "row" }, words.routers[router] ?? router),
      ...values.map((value) => h("td", {}, format(value))),
    ),
  );
  return h("table", { class: "ssr-table" }, h("thead", {}, head), h("tbody", {}, ...body));
}

function calibrationView(report, words) {
  const items = report.tasks.map((task) => h("li", {}, h("b", {}, shortName(task.name)), ` ${words.calibrated(task)}`));
  return h("div", {}, h("p", { class: "ssr-hint" }, words.shared(report.shared_layers)), h("ul", {}, ...items));
}

/** What to do next, notes, and what became of each file. */
export function adviceView(report, words) {
  const list = (lines) => h("ul", {}, ...lines.map((line) => h("li", {}, line)));
  const section = (title, lines) => (lines?.length ? [h("b", {}, title), list(lines)] : []);
  const lines = [...(report.warnings ?? []), ...(report.advice ?? [])].map(sentence);
  const nothing = report.kind === "calibration" ? words.calibratedNext : words.nothing;
  const files = (report.files ?? []).map((file) => {
    const fates = Object.entries(file.fates).map(([fate, count]) => `${count} ${words.status[fate] ?? fate}`);
    return `${shortName(file.name)}: ${words.keys(file.keys)} (${fates.join(", ")})`;
  });
  return h(
    "div",
    { class: "ssr-advice" },
    h("b", {}, words.advice),
    lines.length ? list([...new Set(lines)]) : h("p", {}, nothing),
    ...section(words.notes, report.notes),
    ...section(words.files, files),
  );
}

const sentence = (item) => (typeof item === "string" ? item : (item?.text ?? item?.sentence ?? JSON.stringify(item)));
