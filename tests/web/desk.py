"""One page of the real frontend, and what a person does on it."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

from browser import watch, write_settings

BUILD = """async ({loras, prompts, steps, side, split, kind}) => {
  app.graph.clear();
  const add = (type, x, y, values = {}) => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, y];
    app.graph.add(node);
    for (const [name, value] of Object.entries(values)) {
      const widget = node.widgets.find((w) => w.name === name);
      widget.value = value;
      widget.callback?.(value);
    }
    return node;
  };
  const wire = (from, slot, to, name) => from.connect(slot, to, to.inputs.findIndex((i) => i.name === name));
  const pause = () => new Promise((r) => setTimeout(r, 80));
  const unet = add('UNETLoader', 0, 0, {unet_name: 'tiny_sdxl.safetensors'});
  const clip = add('TinyCLIP', 0, 130, {kind: 'sdxl', seed: 3, control_after_generate: 'fixed'});
  const size = {width: side, height: side, steps};
  const work = add(split ? 'SSRCalibrate' : kind, 440, 0, size);
  wire(unet, 0, work, 'model');
  wire(clip, 0, work, 'clip');
  for (const [i, name] of loras.entries()) {
    const lora = add('SSRLoRA', 0, 330 + i * 400, {lora: `${name}.safetensors`, prompts: prompts[i]});
    wire(lora, 0, work, `loras.lora${i}`);
    await pause();
  }
  const last = split ? add('SSRSolve', 880, 0) : work;
  if (split) {
    wire(unet, 0, last, 'model');
    wire(clip, 0, last, 'clip');
    wire(work, 0, last, 'calibration');
  }
  const report = add('PreviewAny', split ? 1320 : 880, 0);
  last.connect(split ? 3 : 4, report, 0);
  await pause();
  for (const node of app.graph.nodes) node.setSize([node.size[0], node.computeSize()[1]]);
  return {work: work.id, last: last.id, report: report.id};
}"""


class Desk:
    """Context manager around a page; `renderer` is "classic" or "vue"."""

    def __init__(self, browser: Any, server: Any, renderer: str) -> None:
        self.browser, self.server, self.renderer = browser, server, renderer

    def __enter__(self) -> Desk:
        write_settings(self.server.url, {"Comfy.VueNodes.Enabled": self.renderer == "vue"})
        self.context = self.browser.new_context(viewport={"width": 1600, "height": 1000})
        self.page = self.context.new_page()
        self.page.set_default_timeout(90_000)  # a machine that others use too
        watch(self.page)
        self.page.goto(self.server.url)
        self.ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def ready(self) -> None:
        self.page.wait_for_function("window.app?.graph && window.app.extensionManager", timeout=120_000)
        self.page.wait_for_timeout(1500)
        self.page.evaluate(
            """() => { window.seen = []; for (const e of ['executing', 'executed', 'execution_success', 'execution_error',
                 'execution_interrupted', 'b_preview_with_metadata'])
                 app.api.addEventListener(e, ({detail}) => window.seen.push([e, detail])); }"""
        )

    def build(
        self,
        loras: tuple[str, ...],
        prompts: tuple[str, ...],
        *,
        steps: int = 2,
        side: int = 128,
        split: bool = False,
        kind: str = "SSRMerge",
    ) -> Any:
        """A graph on the tiny SDXL around a merge node, or SSR Calibrate and SSR Solve; ids of its nodes."""
        values = {"loras": loras, "prompts": prompts, "steps": steps, "side": side, "split": split, "kind": kind}
        ids = self.page.evaluate(BUILD, values)
        self.look()
        return ids

    def look(self, scale: float = 0.7, x: float = 120, y: float = 90) -> None:
        """Where the canvas stands."""
        self.page.evaluate(
            "([s, x, y]) => { app.canvas.ds.scale = s; app.canvas.ds.offset = [x, y]; app.canvas.setDirty(true, true); }",
            [scale, x, y],
        )
        self.page.wait_for_timeout(400)

    def panel(self, index: int = 0) -> Any:
        """A panel of a merge node."""
        return self.page.locator(".ssr-panel:not(.ssr-triggers)").nth(index)

    def queue(self) -> None:
        self.page.evaluate("() => { window.seen.length = 0; }")
        self.page.evaluate("() => { app.queuePrompt(0); }")

    def finish(self, end: str = "execution_success", seconds: float = 120) -> list[Any]:
        """Wait for the end of the run; what happened."""
        ends = ["execution_success", "execution_error", "execution_interrupted"]
        ended = "(ends) => window.seen.some(([e]) => ends.includes(e))"
        self.page.wait_for_function(ended, arg=ends, timeout=1000 * seconds)
        self.page.wait_for_timeout(300)
        seen = self.page.evaluate("() => window.seen.map(([e, d]) => [e, e.startsWith('b_') ? null : d])")
        assert end in [kind for kind, _ in seen], [event for event in seen if event[0] in ends]
        return seen

    def run(self, seconds: float = 120) -> list[Any]:
        self.queue()
        return self.finish(seconds=seconds)

    def history(self) -> dict[str, Any]:
        """Outputs of the newest run, by node."""
        with urllib.request.urlopen(self.server.url + "/history?max_items=1", timeout=30) as answer:
            return next(iter(json.load(answer).values()))["outputs"]

    def set_widget(self, node: int, name: str, value: Any) -> None:
        self.page.evaluate(
            """([id, name, value]) => { const w = app.graph.getNodeById(id).widgets.find((x) => x.name === name);
               w.value = value; w.callback?.(value); }""",
            [node, name, value],
        )

    def shot(self, folder: Path, name: str) -> None:
        self.page.screenshot(path=folder / f"{name}_{self.renderer}.png")
