import assert from "node:assert/strict";
import { test } from "node:test";
import { createMemory } from "../../../web/ssr/memory.js";

const NO_ID = "00000000-0000-0000-0000-000000000000";
const report = (name) => ({ kind: "merge", name });

function server(history) {
  const asked = [];
  return {
    asked,
    async fetchApi(path) {
      asked.push(path);
      const id = decodeURIComponent(path.split("/").pop());
      return { ok: true, json: async () => (history[id] ? { [id]: history[id] } : {}) };
    },
  };
}

function shelf() {
  const kept = new Map();
  return { kept, getItem: (key) => kept.get(key) ?? null, setItem: (key, value) => kept.set(key, value) };
}

const run = (node, name, workflow) => ({
  prompt: [0, "id", {}, { extra_pnginfo: { workflow } }],
  outputs: { [node]: { ssr_merge: [report(name)] } },
});

test("the newest result is recalled, of this graph and node only", async () => {
  const memory = createMemory(server({ m1: run("6", "one"), m2: run("6", "two") }), shelf());
  memory.remember("g", "6", "m1", true);
  memory.remember("g", "6", "m2", true);
  assert.deepEqual(await memory.recall("g", "6", () => false), report("two"));
  assert.equal(await memory.recall("g", "7", () => true), null);
  assert.equal(await memory.recall("h", "6", () => true), null);
});

test("a run that was cancelled or still runs leaves the result before it", async () => {
  const history = { n1: run("6", "one") };
  const memory = createMemory(server(history), shelf());
  memory.remember("g", "6", "n1", true);
  memory.remember("g", "6", "n2", false);
  assert.deepEqual(await memory.recall("g", "6", () => false), report("one"));
  history.n2 = run("6", "two");
  assert.deepEqual(await memory.recall("g", "6", () => false), report("two"), "finished while nobody looked");
});

test("a graph without an id is recognised by what ran", async () => {
  const memory = createMemory(server({ o1: run("6", "one", "w") }), shelf());
  memory.remember(NO_ID, "6", "o1", true);
  assert.deepEqual(await memory.recall("new id", "6", (workflow) => workflow === "w"), report("one"));
  assert.equal(await memory.recall("new id", "6", () => false), null);
});

test("one question for all panels of a run, none without a run", async () => {
  const api = server({ p1: { outputs: { 6: { ssr_merge: [report("a")] }, 7: { ssr_merge: [report("b")] } } } });
  const memory = createMemory(api, shelf());
  for (const node of ["6", "7"]) memory.remember("g", node, "p1", true);
  await Promise.all(["6", "7", "8"].map((node) => memory.recall("g", node, () => false)));
  assert.deepEqual(api.asked, ["/history/p1"]);
});

test("what is remembered stays small and survives storage that is damaged or forbidden", async () => {
  const store = shelf();
  const memory = createMemory(server({}), store);
  for (let i = 0; i < 500; i++) memory.remember("g", String(i), "q", true);
  const runs = JSON.parse([...store.kept.values()][0]);
  assert.equal(Object.keys(runs).length, 200);
  assert.ok(runs["g:499"] && !runs["g:0"]);
  for (const text of ["{", "[1]", "3", "null"]) {
    store.kept.set("ssr-merge.runs", text);
    memory.remember("g", "1", "q", true);
    assert.equal(Object.keys(JSON.parse(store.kept.get("ssr-merge.runs"))).length, 1);
  }
  const forbidden = { getItem: () => { throw new Error("no"); }, setItem: () => { throw new Error("no"); } };
  for (const storage of [null, forbidden]) {
    const none = createMemory(server({}), storage);
    none.remember("g", "1", "q", true);
    assert.equal(await none.recall("g", "1", () => true), null);
  }
});

test("a server that does not answer is no error", async () => {
  const memory = createMemory({ fetchApi: async () => { throw new Error("offline"); } }, shelf());
  memory.remember("g", "6", "r1", true);
  assert.equal(await memory.recall("g", "6", () => true), null);
});
