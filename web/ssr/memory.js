// Reports survive a page reload: the server's history keeps them, the browser keeps which run is whose.
// Nothing goes into the workflow.

import { reportOf } from "./report.js";

const KEY = "ssr-merge.runs";
const KEPT = 200;
/** What the frontend calls a graph that was cleared and built anew, until it is loaded the next time. */
const NO_ID = "00000000-0000-0000-0000-000000000000";
const entries = new Map();

/**
 * @param {{fetchApi: (path: string) => Promise<Response>}} api
 * @param {Storage|null} storage
 */
export function createMemory(api, storage) {
  const read = () => {
    try {
      const found = JSON.parse(storage?.getItem(KEY) ?? "{}");
      return found && typeof found === "object" && !Array.isArray(found) ? found : {};
    } catch {
      return {}; // another version's, or storage is forbidden: then nothing is remembered
    }
  };
  const write = (runs) => {
    try {
      storage?.setItem(KEY, JSON.stringify(Object.fromEntries(Object.entries(runs).slice(-KEPT))));
    } catch {
      // storage is full or forbidden: the panel starts empty after a reload
    }
  };
  return {
    /** A run works on a node, or (`done`) has a result for it. */
    remember(graph, node, promptId, done) {
      const runs = read();
      const name = `${graph}:${node}`;
      const old = runs[name] ?? {};
      if (done ? old.done === promptId : old.last === promptId) return;
      delete runs[name]; // to the end: the oldest go first
      runs[name] = done ? { last: promptId, done: promptId } : { ...old, last: promptId };
      write(runs);
    },
    /**
     * The newest report that the server still has for a node, or null. Of a run of a graph without an id it counts
     * only if `isSameGraph` says so of the workflow that ran.
     */
    async recall(graph, node, isSameGraph) {
      const runs = read();
      for (const name of graph === NO_ID ? [NO_ID] : [graph, NO_ID]) {
        const { last, done } = runs[`${name}:${node}`] ?? {};
        for (const promptId of new Set([last, done].filter(Boolean))) {
          const run = await runOf(api, promptId);
          const report = reportOf(run?.outputs?.[node]);
          if (report && (name !== NO_ID || isSameGraph(workflowOf(run)))) return report;
        }
      }
      return null;
    },
  };
}

const workflowOf = (run) => run.prompt?.[3]?.extra_pnginfo?.workflow;

/** A finished run as the server's history has it, or null. Asked for once, however many panels a graph has. */
async function runOf(api, promptId) {
  if (!entries.has(promptId)) {
    const asked = api
      .fetchApi(`/history/${encodeURIComponent(promptId)}`)
      .then(async (answer) => (answer.ok ? ((await answer.json())[promptId] ?? null) : null))
      .catch(() => null);
    entries.set(promptId, asked);
    if (entries.size > 4) entries.delete(entries.keys().next().value);
  }
  const found = await entries.get(promptId);
  if (!found) entries.delete(promptId); // it may still be running
  return found;
}
