// Links of SSR LoRA nodes, on a graph of the smallest kind that behaves like the frontend's.

import assert from "node:assert/strict";
import { test } from "node:test";
import { addLoRA, allNodes, canGrow, chainsOf, exchange, nodeAt, removeLoRA } from "../../../web/ssr/graph.js";
import { changed, exchanged, wanted, without } from "../../../web/ssr/order.js";

class Graph {
  constructor() {
    this.nodes = [];
    this.links = {};
    this.counter = 0;
  }
  add(node) {
    node.graph = this;
    node.id = node.id ?? this.nodes.length + 1;
    this.nodes.push(node);
    return node;
  }
  remove(node) {
    for (const input of node.inputs.keys()) node.disconnectInput(input);
    for (const link of Object.values(this.links)) if (link.origin_id === node.id) this.getNodeById(link.target_id).disconnectInput(link.target_slot);
    this.nodes = this.nodes.filter((other) => other !== node);
  }
  getNodeById(id) {
    return this.nodes.find((node) => node.id === id) ?? null;
  }
}

class Node {
  constructor(type, inputs, widgets = []) {
    Object.assign(this, { type, comfyClass: type, pos: [500, 0], size: [200, 100], widgets });
    this.inputs = inputs.map(([name, kind]) => ({ name, type: kind, link: null }));
    this.outputs = [{ links: [] }];
  }
  connect(slot, to, input) {
    to.disconnectInput(input);
    const id = ++this.graph.counter;
    this.graph.links[id] = { origin_id: this.id, origin_slot: slot, target_id: to.id, target_slot: input };
    to.inputs[input].link = id;
    this.outputs[0].links.push(id);
  }
  disconnectInput(input) {
    const id = this.inputs[input].link;
    if (id === null) return;
    const origin = this.graph.getNodeById(this.graph.links[id].origin_id);
    origin.outputs[0].links = origin.outputs[0].links.filter((other) => other !== id);
    delete this.graph.links[id];
    this.inputs[input].link = null;
  }
}

const lora = (name) => Object.assign(new Node("SSRLoRA", [["previous", "SSR_LORA"]], [{ name: "lora", value: name }]), { name });
const merge = (sockets = 3) =>
  new Node("SSRMerge", [["model", "MODEL"], ...Array.from({ length: sockets }, (_, i) => [`loras.lora${i}`, "SSR_LORA"])]);

/** A graph with the chains given as lists of names, and the names that its merge sees. */
function build(...chains) {
  const graph = new Graph();
  const node = graph.add(merge(chains.length + 1));
  const byName = {};
  chains.forEach((names, i) => {
    names.forEach((name, j) => {
      byName[name] = graph.add(lora(name));
      if (j) byName[names[j - 1]].connect(0, byName[name], 0);
    });
    byName[names.at(-1)].connect(0, node, i + 1);
  });
  return { graph, node, byName };
}
const names = (node) => chainsOf(node).map((chain) => chain.nodes.map((one) => one.name));

test("chains are read from first to last", () => {
  const { node } = build(["a"], ["b", "c", "d"]);
  assert.deepEqual(names(node), [["a"], ["b", "c", "d"]]);
});

test("neighbours change places within a chain and across sockets, everything else stays", () => {
  const { node } = build(["a"], ["b", "c", "d"]);
  exchange(node, 1, 2);
  assert.deepEqual(names(node), [["a"], ["c", "b", "d"]]);
  exchange(node, 0, 1);
  assert.deepEqual(names(node), [["c"], ["a", "b", "d"]]);
  exchange(node, 2, 3);
  assert.deepEqual(names(node), [["c"], ["a", "d", "b"]]);
  exchange(node, 3, 4);
  assert.deepEqual(names(node), [["c"], ["a", "d", "b"]], "there is no fifth");
});

test("another merge that takes the whole chain still takes all of it", () => {
  const { graph, node, byName } = build(["a", "b"]);
  const second = graph.add(merge());
  byName.b.connect(0, second, 1);
  exchange(node, 0, 1);
  assert.deepEqual(names(node), [["b", "a"]]);
  assert.deepEqual(names(second), [["b", "a"]]);
  removeLoRA(node, byName.a);
  assert.deepEqual(names(second), [["b"]]);
});

test("a removed LoRA leaves no gap in its chain", () => {
  const { graph, node, byName } = build(["a", "b", "c"], ["d"]);
  removeLoRA(node, byName.b);
  assert.deepEqual(names(node), [["a", "c"], ["d"]]);
  removeLoRA(node, byName.d);
  assert.deepEqual(names(node), [["a", "c"]]);
  assert.ok(!graph.nodes.includes(byName.b) && !graph.nodes.includes(byName.d));
});

test("what is no SSR LoRA stays at the head of its chain", () => {
  const { graph, node, byName } = build(["a", "b"]);
  const refit = graph.add(new Node("SSROSRMRefit", []));
  refit.connect(0, byName.a, 0);
  exchange(node, 0, 1);
  assert.equal(chainsOf(node)[0].head.node, refit);
  assert.deepEqual(names(node), [["b", "a"]]);
  removeLoRA(node, byName.a);
  removeLoRA(node, byName.b);
  assert.deepEqual(chainsOf(node).map((chain) => [chain.head.node, chain.nodes]), [[refit, []]]);
});

test("a circle of links does not hang", () => {
  const { byName, node } = build(["a", "b"]);
  byName.b.connect(0, byName.a, 0);
  assert.deepEqual(names(node), [["a", "b"]]);
});

test("a new LoRA goes to the first free socket, left of the merge and below the others", () => {
  const { graph, node, byName } = build(["a"]);
  byName.a.pos = [100, 700];
  const made = addLoRA(node, "x.safetensors", () => Object.assign(lora(""), { name: "x" }));
  assert.deepEqual(names(node), [["a"], ["x"]]);
  assert.equal(made.widgets[0].value, "x.safetensors");
  assert.ok(made.pos[0] + made.size[0] < node.pos[0] && made.pos[1] >= 800);
  assert.equal(addLoRA(node, "y", () => lora("y")), null, "no socket is free");
  assert.equal(graph.nodes.length, 3);
  assert.ok(canGrow(node) && !canGrow(new Node("SSRNPLoRAMerge", [["content", "SSR_LORA"]])));
});

test("a new LoRA covers no other node", () => {
  const { graph, node } = build();
  const loaders = [0, 160, 420].map((y) => graph.add(Object.assign(new Node("Loader", []), { pos: [180, y] })));
  const aside = graph.add(Object.assign(new Node("Loader", []), { pos: [-400, 0], size: [300, 5000] }));
  const made = addLoRA(node, "x.safetensors", () => lora(""));
  for (const { pos, size } of [...loaders, aside]) {
    const apart = made.pos[1] >= pos[1] + size[1] + 30 || made.pos[1] + made.size[1] + 30 <= pos[1];
    assert.ok(apart || made.pos[0] >= pos[0] + size[0], `${pos} and ${made.pos}`);
  }
  assert.equal(made.pos[1], 570, "below the last of them, with room for its title");
});

test("nodes are found by execution id, in subgraphs too", () => {
  const inner = new Graph();
  const deep = inner.add(Object.assign(merge(), { id: 12 }));
  const outer = new Graph();
  const holder = outer.add(Object.assign(new Node("Subgraph", []), { id: 4, subgraph: inner }));
  assert.equal(nodeAt(outer, "4:12"), deep);
  assert.equal(nodeAt(outer, "4"), holder);
  assert.equal(nodeAt(outer, "9:1"), null);
  assert.deepEqual([...allNodes(outer)].map(([id]) => id), ["4", "4:12"]);
});

test("plans: an exchange is its own inverse and only touched chains get links", () => {
  const chains = [{ socket: 1, head: null, nodes: ["a", "b"] }, { socket: 2, head: "h", nodes: ["c"] }, { socket: 3, head: null, nodes: ["d"] }];
  const swapped = exchanged(chains, 1, 2);
  assert.deepEqual(exchanged(swapped, 1, 2), chains);
  assert.deepEqual(changed(chains, swapped).map((chain) => chain.socket), [1, 2]);
  assert.deepEqual(wanted([swapped[1]]), [{ source: "h", node: "b" }, { source: "b", socket: 2 }]);
  assert.deepEqual(wanted(without([chains[2]], "d")), [{ source: null, socket: 3 }]);
});
