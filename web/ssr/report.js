// Reading a report (ssr_core/compact.py). No page, no server: plain values in, plain values out.

const ERRORS = /^reconstruction_error_(?:on_)?(?!by_)/;

/** The report in a node's `ui` output, or null. */
export function reportOf(output) {
  const found = output?.ssr_merge?.[0];
  return found && typeof found === "object" && typeof found.kind === "string" ? found : null;
}

/** The layers as objects. */
export function layersOf(report) {
  const { columns = [], rows = [] } = report.layers ?? {};
  return rows.map((row) => Object.fromEntries(columns.map((column, i) => [column, row[i]])));
}

/**
 * Reconstruction errors: one row a router, one column a set of tokens ("calibration", "heldout", ...).
 * @returns {{sets: string[], rows: {router: string, values: (number|null)[]}[]}}
 */
export function errorTable(report) {
  const found = Object.entries(report).filter(([name, value]) => ERRORS.test(name) && value && hasNumber(value));
  const sets = found.map(([name]) => name.replace(ERRORS, ""));
  const tables = found.map(([, value]) => value);
  const routers = [...new Set(tables.flatMap((table) => Object.keys(table)))];
  return { sets, rows: routers.map((router) => ({ router, values: tables.map((t) => numberOf(t[router])) })) };
}

const numberOf = (value) => (typeof value === "number" ? value : null);
const hasNumber = (table) =>
  typeof table === "object" && Object.values(table).some((value) => typeof value === "number");

/** The crosstalk matrices before and after, or null where there is nothing to show. */
export function crosstalkOf(holder, tasks) {
  const { sum, result } = holder.crosstalk ?? {};
  const square = (m) => Array.isArray(m) && m.length === tasks && m.every((row) => row.length === tasks);
  if (tasks < 2 || !square(sum) || !square(result)) return null;
  return [sum, result].every((m) => m.flat().every((v) => v === 0)) ? null : { sum, result };
}

/** Rows divided by their largest value, as the whole report's matrices are. */
export function normalised(matrix) {
  return matrix.map((row) => {
    const largest = Math.max(...row);
    return row.map((value) => (largest > 0 ? value / largest : 0));
  });
}

/** Layers that contain all words of a search, in any order; `order` is "model" or "error". */
export function findLayers(layers, search, order = "model") {
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  const hit = (layer) => words.every((word) => `${layer.target} ${layer.status} ${layer.part}`.toLowerCase().includes(word));
  const found = layers.filter(hit);
  return order === "error" ? found.sort((a, b) => errorOf(b) - errorOf(a)) : found;
}

/** The merge's error on a layer; -1 where there is none. */
export const errorOf = (layer) => numberOf(layer.errors?.result) ?? -1;

/** A number as people read it: three digits, no long tails. */
export function format(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (value !== 0 && (Math.abs(value) < 0.001 || Math.abs(value) >= 1e6)) return value.toExponential(1);
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(Math.abs(value) >= 10 ? 1 : 3);
}

/** A LoRA's name without folder and ending. */
export const shortName = (name) => name.replace(/^.*[\\/]/, "").replace(/\.(safetensors|sft)$/i, "");
