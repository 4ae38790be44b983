// The graph as this pack sees it: its own nodes, their LoRAs, and links between them.

import { changed, exchanged, wanted, without } from "./order.js";

export const LORA_NODE = "SSRLoRA";
const LORA_TYPE = "SSR_LORA";
const GAP = 50; // from a node's end to the next one's first input: its title has 30

export const kindOf = (node) => node.comfyClass ?? node.constructor?.comfyClass ?? node.type;

/** The node of an execution id such as "12" or, inside subgraphs, "4:12". */
export function nodeAt(root, executionId) {
  let graph = root;
  let node = null;
  for (const part of String(executionId).split(":")) {
    node = graph?.getNodeById?.(Number(part)) ?? graph?.getNodeById?.(part) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

/** All nodes of a graph and of the subgraphs in it, with their execution ids. */
export function* allNodes(graph, prefix = "") {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    yield [`${prefix}${node.id}`, node];
    if (node.subgraph) yield* allNodes(node.subgraph, `${prefix}${node.id}:`);
  }
}

/** What is connected to an input: {node, slot}, or null. */
function sourceOf(node, index) {
  const link = linkAt(node.graph, node.inputs?.[index]?.link);
  const source = link && node.graph.getNodeById(link.origin_id);
  return source ? { node: source, slot: link.origin_slot } : null;
}

const linkAt = (graph, id) => (id === null || id === undefined ? null : (graph?.getLink?.(id) ?? graph?.links?.[id] ?? null));

const previousOf = (node) => node.inputs?.findIndex((input) => input.name === "previous") ?? -1;

/** The LoRA sockets of a node and the chains of SSR LoRA nodes in them (see order.js). */
export function chainsOf(node) {
  const chains = [];
  (node.inputs ?? []).forEach((input, socket) => {
    if (input.type !== LORA_TYPE || !sourceOf(node, socket)) return;
    const nodes = [];
    let source = sourceOf(node, socket);
    while (source && kindOf(source.node) === LORA_NODE && !nodes.includes(source.node)) {
      nodes.unshift(source.node);
      source = sourceOf(source.node, previousOf(source.node));
    }
    chains.push({ socket, head: source, nodes });
  });
  return chains;
}

/** Exchange two LoRAs in the order of the merge. */
export const exchange = (node, a, b) => rewire(node, (chains) => exchanged(chains, a, b));

/** Take an SSR LoRA out of the merge and out of the graph. */
export function removeLoRA(node, lora) {
  rewire(node, (chains) => without(chains, lora));
  lora.graph.remove(lora);
}

function rewire(node, change) {
  const before = chainsOf(node);
  const after = change(before);
  const touched = changed(before, after);
  // Whoever else takes a chain (a second SSR Merge) shall take all of it, still: asked before anything moves.
  const old = new Map(before.map((chain) => [chain.socket, chain]));
  const moving = touched.map((chain) => ({ chain, others: consumers(old.get(chain.socket), node, before) }));
  for (const { chain, others } of moving) {
    for (const { source, ...target } of wanted([chain])) {
      if (target.node) connect(source, target.node, previousOf(target.node));
      else connect(source, node, target.socket);
    }
    const last = chain.nodes.at(-1) ?? chain.head;
    for (const { to, input } of others) connect(last, to, input);
  }
}

function connect(source, to, input) {
  if (!source) to.disconnectInput(input);
  else if (source.node) source.node.connect(source.slot, to, input);
  else source.connect(0, to, input);
}

/** Inputs beyond this merge that take the whole of a chain. */
function consumers({ nodes }, node, chains) {
  const ours = new Set(chains.flatMap((chain) => chain.nodes));
  const last = nodes.at(-1);
  const links = (last?.outputs?.[0]?.links ?? []).map((id) => linkAt(last.graph, id)).filter(Boolean);
  return links
    .map((link) => ({ to: last.graph.getNodeById(link.target_id), input: link.target_slot }))
    .filter(({ to, input }) => to && !(ours.has(to) || (to === node && chains.some((chain) => chain.socket === input))));
}

/** Make an SSR LoRA for a file and connect it to the first free socket; null if there is none. */
export function addLoRA(node, file, createNode) {
  const socket = (node.inputs ?? []).findIndex((input) => input.type === LORA_TYPE && (input.link ?? null) === null);
  if (socket < 0) return null;
  const lora = createNode(LORA_NODE);
  if (!lora) return null;
  const own = chainsOf(node).flatMap((chain) => chain.nodes);
  const lowest = own.reduce((y, other) => Math.max(y, other.pos[1] + other.size[1] + GAP), node.pos[1]);
  const left = Math.min(node.pos[0] - lora.size[0] - 60, ...own.map((other) => other.pos[0]));
  lora.pos = [left, freeBelow(node.graph, [left, lowest], lora.size)];
  node.graph.add(lora);
  setWidget(lora, "lora", file);
  lora.connect(0, node, socket);
  return lora;
}

/** From a place downwards the first one at which a node of a size covers no other. */
function freeBelow(graph, [x, y], [width, height]) {
  for (const { pos, size } of [...(graph.nodes ?? graph._nodes ?? [])].sort((a, b) => a.pos[1] - b.pos[1])) {
    const beside = pos[0] + size[0] <= x || pos[0] >= x + width;
    const past = pos[1] + size[1] + GAP;
    if (!beside && pos[1] < y + height + GAP && past > y) y = past;
  }
  return y;
}

export const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name) ?? null;

/** Set a widget as if the user had. */
export function setWidget(node, name, value) {
  const widget = widgetOf(node, name);
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value);
  node.setDirtyCanvas?.(true, true);
}

/** Inputs of a node that take SSR LoRAs and grow. */
export const canGrow = (node) => (node.inputs ?? []).some((input) => input.type === LORA_TYPE && /^loras\b/.test(input.name));
