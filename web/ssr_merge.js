// SSR-Merge in the browser: a panel in the merge nodes, trigger words in SSR LoRA. Shows and edits, computes nothing.
// Touches nodes of this pack only; where the frontend lacks a function, the plain widgets are what there is.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { addStyles } from "./ssr/dom.js";
import { LORA_NODE, allNodes, kindOf, nodeAt, widgetOf } from "./ssr/graph.js";
import { lorasView } from "./ssr/loras.js";
import { createMemory } from "./ssr/memory.js";
import { createPanel } from "./ssr/panel.js";
import { reportOf } from "./ssr/report.js";
import { wordsFor } from "./ssr/text.js";
import { createTriggers } from "./ssr/triggers.js";

const PANEL_NODES = new Set(["SSRMerge", "SSRCalibrate", "SSRSolve", "SSRNPLoRAMerge", "SSRMergeFromRecords"]);
const TEXT_HEIGHT = 64;
const PANEL_HEIGHT = 312;
const TRIGGERS_HEIGHT = 66;
const WIDTH = 380; // two matrices of three LoRAs side by side

const panels = new WeakMap();
const triggers = new WeakMap();

const storage = () => {
  try {
    return window.localStorage;
  } catch {
    return null; // forbidden by the browser's settings
  }
};
const memory = createMemory(api, storage());
const root = () => app.rootGraph ?? app.graph;
const graphId = () => root()?.id ?? "";

function words() {
  const setting = app.extensionManager?.setting?.get?.("Comfy.Locale") ?? app.ui?.settings?.getSettingValue?.("Comfy.Locale");
  return wordsFor(setting);
}

/** One step that Ctrl+Z takes back. */
function edit(change) {
  const graph = app.canvas?.graph ?? root();
  graph?.beforeChange?.();
  try {
    change();
  } finally {
    graph?.afterChange?.();
    graph?.setDirtyCanvas?.(true, true);
  }
}

/** An element as the last widget of a node, of fixed height and never part of what is saved or queued. */
function addElement(node, name, element, height) {
  const widget = node.addDOMWidget(name, "ssr_merge", element, {
    serialize: false,
    hideInPanel: true,
    getMinHeight: () => height,
    getMaxHeight: () => height, // else the frontend's preview below would take room from it
    margin: 6,
  });
  widget.serialize = false;
  element.style.setProperty("--ssr-height", `${height - 12}px`);
  chain(node, "onAdded", () => keepMounted(node, element));
}

/** Text boxes of fixed height: else they share a node's spare room with the preview, and what is below them moves. */
function holdTexts(node) {
  for (const { element, options } of node.widgets ?? []) {
    if (element?.tagName !== "TEXTAREA" || !options) continue;
    options.getMinHeight = () => TEXT_HEIGHT;
    options.getMaxHeight = () => TEXT_HEIGHT;
  }
}

/**
 * After an undo the Vue renderer goes on showing the elements of the nodes that were there before, because the new
 * ones have their ids: then ours takes the place of its predecessor.
 */
function keepMounted(node, element) {
  element.dataset.ssrAt = `${node.graph === root() ? "root" : node.graph?.id} ${node.id} ${element.className}`;
  for (const delay of [0, 100, 500]) {
    setTimeout(() => {
      if (element.isConnected || !node.graph) return;
      const places = document.querySelectorAll(`[data-ssr-at="${CSS.escape(element.dataset.ssrAt)}"]`);
      [...places].find((other) => other !== element)?.replaceWith(element);
    }, delay);
  }
}

/** As large as its widgets need: new nodes, and those of workflows saved before there was a panel. */
function makeRoom(node, width = 0) {
  const [, least] = node.computeSize?.() ?? node.size;
  // The Vue renderer measures heights by itself.
  const height = window.LiteGraph?.vueNodesMode ? node.size[1] : Math.max(node.size[1], least);
  if (height > node.size[1] || width > node.size[0]) node.setSize?.([Math.max(node.size[0], width), height]);
}

function addPanel(node) {
  const text = words();
  const host = {
    createNode: (type) => window.LiteGraph?.createNode?.(type) ?? null,
    files: loraFiles,
    edit,
    show: (lora) => {
      app.canvas?.centerOnNode?.(lora);
      app.canvas?.selectNode?.(lora);
    },
    redraw: () => panel.refreshLoras(),
  };
  const panel = createPanel({ words: text, lorasView: () => lorasView(node, text, host) });
  holdTexts(node);
  addElement(node, "ssr_panel", panel.element, PANEL_HEIGHT);
  makeRoom(node, WIDTH);
  panels.set(node, panel);
  panel.element.addEventListener("pointerenter", () => !panel.element.contains(document.activeElement) && panel.refreshLoras());
  chain(node, "onConnectionsChange", () => setTimeout(() => panel.refreshLoras()));
  chain(node, "onRemoved", () => panel.destroy());
}

/** The LoRA files as the server lists them now. */
async function loraFiles() {
  try {
    const answer = await api.fetchApi("/models/loras");
    const names = answer.ok ? await answer.json() : [];
    return Array.isArray(names) ? names : [];
  } catch {
    return []; // the picker says that there are none
  }
}

function addTriggers(node) {
  const shown = createTriggers(node, words(), api, edit);
  addElement(node, "ssr_triggers", shown.element, TRIGGERS_HEIGHT);
  makeRoom(node);
  triggers.set(node, shown);
  const widget = widgetOf(node, "lora");
  if (widget) chain(widget, "callback", () => shown.refresh());
}

/** Runs `after` whenever a callback of our own node has run. */
function chain(owner, name, after) {
  const original = owner[name];
  owner[name] = function (...values) {
    const answer = original?.apply(this, values);
    after();
    return answer;
  };
}

const panelAt = (executionId) => {
  const node = nodeAt(root(), executionId);
  return node ? (panels.get(node) ?? null) : null;
};

function listen() {
  api.addEventListener("ssr_merge.progress", ({ detail }) => {
    const panel = panelAt(detail.node);
    if (!panel) return;
    memory.remember(graphId(), detail.node, detail.prompt_id, false);
    panel.progress(detail);
  });
  api.addEventListener("b_preview_with_metadata", ({ detail }) => {
    const panel = panelAt(detail.displayNodeId);
    if (panel?.running) panel.preview(detail.blob);
  });
  api.addEventListener("executed", ({ detail }) => {
    const id = detail.display_node ?? detail.node;
    const report = reportOf(detail.output);
    const panel = report && panelAt(id);
    if (!panel) return;
    memory.remember(graphId(), id, detail.prompt_id, true);
    panel.show(report);
  });
  for (const [event, failed] of [["execution_interrupted", false], ["execution_error", true], ["execution_success", false]]) {
    api.addEventListener(event, () => {
      for (const [, node] of allNodes(root())) panels.get(node)?.end(failed);
    });
  }
}

/** Whether a workflow that ran has the nodes of this one. */
function hasSameNodes(workflow) {
  const names = (nodes) => JSON.stringify([...(nodes ?? [])].map((node) => `${node.id} ${node.type}`).sort());
  return Boolean(workflow) && names(workflow.nodes) === names(root().nodes ?? root()._nodes);
}

async function restore() {
  const graph = graphId();
  for (const [id, node] of allNodes(root())) {
    if (panels.has(node) || triggers.has(node)) makeRoom(node);
    triggers.get(node)?.refresh();
    const panel = panels.get(node);
    if (!panel) continue;
    const report = await memory.recall(graph, id, hasSameNodes);
    if (report && !panel.running && graphId() === graph) panel.show(report, true);
  }
}

app.registerExtension({
  name: "SSRMerge.Panel",
  setup() {
    addStyles();
    listen();
  },
  nodeCreated(node) {
    if (typeof node.addDOMWidget !== "function") return;
    if (PANEL_NODES.has(kindOf(node))) addPanel(node);
    else if (kindOf(node) === LORA_NODE) addTriggers(node);
  },
  loadedGraphNode(node) {
    triggers.get(node)?.refresh();
  },
  afterConfigureGraph() {
    return restore();
  },
});
