"""Takes the pictures of the help pages and of the template browser in the real frontend.

Usage: python tests/web/make_pictures.py. It starts its own server (COMFYUI_PATH is a checkout) on tiny models;
numbers in the pictures come from real runs on them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
sys.path.append(str(Path(__file__).parent))

import torch
from browser import ARGUMENTS, EXECUTABLE, write_settings
from desk import Desk
from make_workflows import BUILD as WORKFLOW
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from safetensors.torch import load_file, save_file
from workflow_graphs import GRAPHS
from workflow_parts import lora, sampling
from workflow_records import RECORD_GRAPHS
from worlds import NAMES, PACK, PROMPTS, furnish, write_loras

from tests.host.server import Server

SETTINGS = {
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
}
FOLDERS = {
    "lora": "loras",
    "ckpt_name": "checkpoints",
    "unet_name": "diffusion_models",
    "clip_name": "text_encoders",
    "vae_name": "vae",
}
WORDS = {
    "subject_one.safetensors": {"modelspec.trigger_phrase": "sks dog"},
    "subject_two.safetensors": {"modelspec.trigger_phrase": "zwx cat"},
    "style.safetensors": {"modelspec.trigger_phrase": "wtrclr style"},
}
LOADERS = {"model": ("UNETLoader", 0), "clip": ("TinyCLIP", 0)}
SIDE = 256
PATIENCE = 900
"""Seconds that a run may take on a busy machine."""
SIZE = {"width": SIDE, "height": SIDE}
CALIBRATION = {"calibration": ("SSRCalibrate", 0)}
RUN = {
    "SSRReport": ({"lora": ("SSRSolve", 2)}, {}, 350),
    "SSRCompare": (LOADERS | CALIBRATION, {}, 300),
    "SSRNPLoRAMerge": (LOADERS | {"content": ("SSRLoRA", 0), "style": ("SSRLoRA", 1)}, {}, 0),
    "SSRMergeFromRecords": (LOADERS | {f"loras.lora{i}": ("SSRLoRA", i) for i in range(3)}, SIZE, 0),
}
"""Nodes that are run for their pictures: what is connected to them, values, and room for what they show."""
TAGS = {"ss_tag_frequency": json.dumps({"10_sks dog": {"sks dog": 12, "outdoors": 5, "sitting": 4}})}
"""Of the first LoRA: what its trainer would have written."""
ALONE = (
    "SSRSaveCalibration",
    "SSRLoadCalibration",
    "SSRSaveLoRA",
    "SSROSRMInit",
    "SSROSRMRefit",
    "SSRCompress",
    "SSRRecord",
    "SSRRecordLibrary",
    "SSRCombineCalibrations",
    "SSREditCalibration",
)
PLACE = """async ([type, x, links, values, room]) => {
  const n = LiteGraph.createNode(type);
  n.pos = [x, 0];
  app.graph.add(n);
  for (const [name, value] of Object.entries(values)) n.widgets.find((w) => w.name === name).value = value;
  for (const [input, [from, at]] of Object.entries(links)) {
    const found = app.graph.nodes.filter((m) => m.type === from);
    const [source, slot] = found.length > 1 ? [found[at], 0] : [found[0], at];
    source.connect(slot, n, n.inputs.findIndex((i) => i.name === input));
    await new Promise((r) => setTimeout(r, 80));
  }
  if (room) n.setSize([420, n.computeSize()[1] + room]);
  const text = n.outputs.findIndex((o) => o.type === 'STRING');
  if (!Object.keys(links).length || text < 0) return;
  const shown = LiteGraph.createNode('PreviewAny');
  shown.pos = [x, 3000];
  app.graph.add(shown);
  n.connect(text, shown, 0);
}"""
ON_A_SOFA = "a photo of sks dog and zwx cat on a sofa"
README = [
    ("unet", "UNETLoader", 0, 0, {"unet_name": "tiny_sdxl.safetensors"}, {}, None),
    ("clip", "TinyCLIP", 0, 140, {"kind": "sdxl", "seed": 3, "control_after_generate": "fixed"}, {}, None),
    lora("one", 330, "dog.safetensors", "a photo of sks dog\nsks dog sitting in a garden", "First subject"),
    lora("two", 800, "cat.safetensors", "a photo of zwx cat\nzwx cat lying on a sofa", "Second subject"),
    (
        "merge",
        "SSRMerge",
        440,
        0,
        {**SIZE, "joint_prompts": ON_A_SOFA},
        {"model": "unet.0", "clip": "clip.0", "loras.lora0": "one.0", "loras.lora1": "two.0"},
        None,
    ),
    *[
        node
        for node in sampling("a", "merge.0", "merge.1", "", 0, ON_A_SOFA, size=128)
        if node[1] not in ("VAEDecode", "SaveImage")
    ],
    ("save", "SaveLatent", 1340, 320, {}, {"samples": "asample.0"}, None),
    ("report", "PreviewAny", 900, 640, {}, {"source": "merge.4"}, "Report"),
]
"""The picture of README.md; there is no VAE for the tiny models."""
BOX = """(type) => { const n = app.graph.nodes.find((x) => x.type === type), s = app.canvas.ds;
  const at = app.canvas.canvas.getBoundingClientRect(), place = (i, v) => (v + s.offset[i]) * s.scale;
  return [at.x + place(0, n.pos[0]), at.y + place(1, n.pos[1] - 30), n.size[0] * s.scale, (n.size[1] + 30) * s.scale]; }"""
FIT = """() => { const b = [1e9, 1e9, -1e9, -1e9];
  for (const n of app.graph.nodes) { b[0] = Math.min(b[0], n.pos[0]); b[1] = Math.min(b[1], n.pos[1] - 30);
    b[2] = Math.max(b[2], n.pos[0] + n.size[0]); b[3] = Math.max(b[3], n.pos[1] + n.size[1]); }
  const width = innerWidth - 80, height = innerHeight - 130, s = Math.min(width / (b[2] - b[0]), height / (b[3] - b[1]));
  app.canvas.ds.scale = s; app.canvas.ds.offset = [70 / s - b[0], 110 / s - b[1]]; app.canvas.setDirty(true, true);
  return [60, 100, (b[2] - b[0]) * s + 20, (b[3] - b[1]) * s + 20]; }"""


def save(page: Page, box: list[float], path: Path, width: int) -> None:
    """A small JPEG of part of the page."""
    x, y, w, h = box
    clip = {"x": max(0, x - 6), "y": max(0, y - 6), "width": w + 12, "height": h + 12}
    picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "JPEG", quality=72, optimize=True)
    print(path.relative_to(PACK), path.stat().st_size)


def nodes(desk: Desk) -> None:
    """One picture for each help page."""
    folder = PACK / "web" / "docs" / "images"
    desk.build(NAMES, PROMPTS, steps=4, side=SIDE)
    desk.look(1.0, 120, 150)
    desk.run(PATIENCE)
    for kind in ("SSRLoRA", "SSRMerge"):
        save(desk.page, desk.page.evaluate(BOX, kind), folder / f"{kind}.jpg", 420)
    desk.panel().screenshot(path=PACK / "docs" / "images" / "panel.png")
    desk.build(NAMES, PROMPTS, steps=4, side=SIDE, split=True)
    desk.look(1.0, 120, 150)
    places = {kind: 1000 * i for i, kind in enumerate((*RUN, *ALONE), start=3)}  # not cleared: see make_workflows
    for kind, (links, values, room) in RUN.items():
        desk.page.evaluate(PLACE, [kind, places[kind], links, values, room])
    desk.run(PATIENCE)
    for kind in ("SSRCalibrate", "SSRSolve"):
        save(desk.page, desk.page.evaluate(BOX, kind), folder / f"{kind}.jpg", 420)
    for kind, x in places.items():
        if kind in ALONE:
            desk.page.evaluate(PLACE, [kind, x, {}, {}, 0])
        desk.look(1.0, 120 - x, 150)
        desk.page.wait_for_timeout(900)
        save(desk.page, desk.page.evaluate(BOX, kind), folder / f"{kind}.jpg", 420)


def readme(desk: Desk) -> None:
    """Two subjects from prompt to latent, after a run."""
    graph = desk.page.evaluate(WORKFLOW, README)
    desk.page.evaluate("async (g) => { await app.loadGraphData(g); }", graph)
    desk.page.evaluate(
        "() => { const n = app.graph.nodes.find((m) => m.type === 'PreviewAny'); n.setSize([810, 430]); }"
    )
    desk.page.wait_for_timeout(600)
    desk.run(PATIENCE)
    x, y, width, height = desk.page.evaluate(FIT)
    desk.page.wait_for_timeout(8000)  # what the frontend says about the job goes away
    clip = {"x": x - 6, "y": y - 6, "width": width + 12, "height": height + 12}
    picture = Image.open(io.BytesIO(desk.page.screenshot(clip=clip))).convert("RGB")
    path = PACK / "docs" / "images" / "two_subjects.png"
    picture.save(path, optimize=True)
    print(path.relative_to(PACK), path.stat().st_size)


def templates(desk: Desk) -> None:
    """One thumbnail for each example workflow: the graph as it opens."""
    for path in sorted((PACK / "workflows").glob("*.json")):
        desk.page.evaluate("async (g) => { await app.loadGraphData(g); }", json.loads(path.read_text(encoding="utf-8")))
        desk.page.keyboard.press("Escape")
        box = desk.page.evaluate(FIT)
        desk.page.wait_for_timeout(900)
        save(desk.page, box, path.with_suffix(".jpg"), 640)


def write_names(base: Path) -> None:
    """Files of the names in the example workflows, so that nothing is marked as missing; they are never run."""
    for node in (node for nodes_ in (GRAPHS | RECORD_GRAPHS).values() for node in nodes_):
        for input_name, value in node[4].items():
            folder = FOLDERS.get(input_name.rstrip("12"))
            if folder == "loras":
                save_file({"w": torch.zeros(1)}, base / "models" / folder / value, WORDS.get(value))
            elif folder:
                (base / "models" / folder).mkdir(exist_ok=True)
                (base / "models" / folder / value).touch()


def main() -> None:
    """Take all pictures."""
    base = Path(tempfile.mkdtemp())
    furnish(base)
    with Server(Path(os.environ["COMFYUI_PATH"]), base) as server, sync_playwright() as playwright:
        write_loras(base)
        dog = base / "models" / "loras" / "dog.safetensors"
        save_file(load_file(dog), dog, TAGS)
        write_names(base)
        write_settings(server.url, SETTINGS)
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=ARGUMENTS)
        with Desk(browser, server, "classic") as desk:
            desk.page.set_viewport_size({"width": 1700, "height": 1500})
            nodes(desk)
            readme(desk)
            templates(desk)
        browser.close()
    shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
