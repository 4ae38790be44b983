"""Builds the example graphs of workflows/ in the real frontend, which then writes them itself.

Usage: python tests/web/make_workflows.py <server url> [names of graphs]. The server needs files of the names used here
in its models folders (they may be empty: nothing is run).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

from browser import comfy_page
from workflow_graphs import GRAPHS
from workflow_records import RECORD_GRAPHS

OUT = Path(__file__).parents[2] / "workflows"

BUILD = """async (nodes) => {
  app.graph.clear();
  const made = {};
  for (const [name, type, x, y, widgets, links, title] of nodes) {
    const node = LiteGraph.createNode(type);
    if (!node) throw new Error('no node type ' + type);
    node.pos = [x, y];
    if (title) node.title = title;
    app.graph.add(node);
    for (const [id, value] of Object.entries(widgets)) {
      const widget = id === '' ? node.widgets[0] : node.widgets.find((w) => w.name === id);
      if (!widget) throw new Error(type + ' has no widget ' + id);
      widget.value = value;
    }
    if (type === 'MarkdownNote') node.setSize([760, 130]);
    if (type === 'PreviewAny') node.setSize([420, 420]);
    if (type === 'CLIPTextEncode') node.setSize([400, 180]);
    made[name] = node;
  }
  for (const [name, , , , , links] of nodes) {
    for (const [input, source] of Object.entries(links)) {
      const [from, slot] = source.split('.');
      const index = made[name].inputs.findIndex((i) => i.name === input);
      if (index < 0) throw new Error(name + ' has no input ' + input + ': ' + made[name].inputs.map((i) => i.name));
      made[from].connect(Number(slot), made[name], index);
      await new Promise((r) => setTimeout(r, 60));
    }
  }
  return app.graph.serialize();
}"""


def overlaps(graph: dict) -> list[tuple[str, str]]:
    """Pairs of nodes that lie on each other, titles included."""
    boxes = [(n["type"], n["pos"][0], n["pos"][1] - 30, *n["size"]) for n in graph["nodes"]]
    return [
        (a[0], b[0])
        for i, a in enumerate(boxes)
        for b in boxes[:i]
        if a[1] < b[1] + b[3] and b[1] < a[1] + a[3] and a[2] < b[2] + b[4] + 30 and b[2] < a[2] + a[4] + 30
    ]


def main() -> None:
    """Write all graphs, each from a page of its own: the frontend keeps widget values by node id across graphs."""
    OUT.mkdir(exist_ok=True)
    for name, nodes in (GRAPHS | RECORD_GRAPHS).items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        with comfy_page(sys.argv[1]) as page:
            graph = page.evaluate(BUILD, nodes)
            if overlaps(graph):
                print(name, "has nodes on top of each other:", overlaps(graph))
            (OUT / f"{name}.json").write_text(json.dumps(graph, indent=1), encoding="utf-8")
            print(name, len(graph["nodes"]), "nodes", page.messages[:5])


if __name__ == "__main__":
    main()
