import assert from "node:assert/strict";
import { test } from "node:test";
import { crosstalkOf, errorTable, findLayers, format, layersOf, normalised, reportOf, shortName } from "../../../web/ssr/report.js";

const REPORT = {
  kind: "merge",
  tasks: ["a", "b"],
  reconstruction_error_on_calibration: { result: 0.25, sum: 1.5, average: null },
  reconstruction_error_by_lora: [{ calibration: { result: 1 } }],
  reconstruction_error_held_out: { result: 0.5, sum: 1.25, gains: 0.75 },
  layers: {
    columns: ["target", "status", "part", "errors"],
    rows: [
      ["blocks.0.attn.to_q", "routed", "model", { result: 0.1 }],
      ["blocks.1.attn.to_k", "routed", "model", { result: 0.9 }],
      ["text_model.0.fc1", "passed_through", "clip", {}],
    ],
  },
};

test("a report is found in ui output, and nothing else is taken for one", () => {
  assert.equal(reportOf({ ssr_merge: [REPORT] }), REPORT);
  for (const other of [null, {}, { text: ["x"] }, { ssr_merge: [] }, { ssr_merge: ["x"] }, { ssr_merge: [{}] }]) {
    assert.equal(reportOf(other), null);
  }
});

test("layers come back as objects", () => {
  assert.deepEqual(layersOf(REPORT)[1], { target: "blocks.1.attn.to_k", status: "routed", part: "model", errors: { result: 0.9 } });
  assert.deepEqual(layersOf({ kind: "merge" }), []);
});

test("errors: every router and every set of tokens, gaps as null", () => {
  assert.deepEqual(errorTable(REPORT), {
    sets: ["calibration", "held_out"],
    rows: [
      { router: "result", values: [0.25, 0.5] },
      { router: "sum", values: [1.5, 1.25] },
      { router: "average", values: [null, null] },
      { router: "gains", values: [null, 0.75] },
    ],
  });
  const unknown = { reconstruction_error_on_calibration: { result: null, sum: null } };
  assert.deepEqual(errorTable(unknown), { sets: [], rows: [] });
});

test("search: all words, anywhere, in any order; order by error puts layers without one last", () => {
  const layers = layersOf(REPORT);
  const names = (search, order) => findLayers(layers, search, order).map((layer) => layer.target);
  assert.deepEqual(names("ATTN blocks.1"), ["blocks.1.attn.to_k"]);
  assert.deepEqual(names("passed"), ["text_model.0.fc1"]);
  assert.deepEqual(names("clip"), ["text_model.0.fc1"]);
  assert.deepEqual(names("none such"), []);
  assert.deepEqual(names("", "error"), ["blocks.1.attn.to_k", "blocks.0.attn.to_q", "text_model.0.fc1"]);
});

test("crosstalk needs two square matrices of the tasks, not both zero", () => {
  const two = [[1, 0.5], [0.25, 1]];
  assert.deepEqual(crosstalkOf({ crosstalk: { sum: two, result: two } }, 2), { sum: two, result: two });
  assert.equal(crosstalkOf({ crosstalk: { sum: two, result: two } }, 3), null);
  const none = [[0, 0], [0, 0]];
  assert.equal(crosstalkOf({ crosstalk: { sum: none, result: none } }, 2), null);
  assert.equal(crosstalkOf({ crosstalk: {} }, 2), null);
  assert.equal(crosstalkOf({ crosstalk: { sum: [[1]], result: [[1]] } }, 1), null);
});

test("rows are divided by their largest value", () => {
  assert.deepEqual(normalised([[2, 4], [0, 0]]), [[0.5, 1], [0, 0]]);
});

test("numbers as people read them", () => {
  const cases = [[0, "0"], [1, "1"], [0.60912, "0.609"], [12.345, "12.3"], [1234.5, "1235"], [0.00012, "1.2e-4"], [null, "–"], ["x", "x"]];
  for (const [value, text] of cases) assert.equal(format(value), text);
});

test("names without folder and ending", () => {
  assert.equal(shortName("styles\\ink/dog.v2.safetensors"), "dog.v2");
  assert.equal(shortName("LORA_MODEL 1a2b"), "LORA_MODEL 1a2b");
});
