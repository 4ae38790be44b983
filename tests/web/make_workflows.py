"""Builds the example graphs of workflows/ in the real frontend, which then writes them itself.

Usage: python tests/web/make_workflows.py <server url>. The server needs files of the names used here
in its models folders (they may be empty: nothing is run).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

from browser import comfy_page

OUT = Path(__file__).parents[2] / "workflows"

# (name, type, x, y, widgets, links {input: "node.output index"}, title)
SDXL = [
    ("ckpt", "CheckpointLoaderSimple", 0, 0, {"ckpt_name": "sd_xl_base_1.0.safetensors"}, {}, None),
]
FLUX = [
    ("unet", "UNETLoader", 0, 0, {"unet_name": "flux1-dev.safetensors"}, {}, None),
    (
        "clips",
        "DualCLIPLoader",
        0,
        150,
        {"clip_name1": "t5xxl_fp8_e4m3fn.safetensors", "clip_name2": "clip_l.safetensors", "type": "flux"},
        {},
        None,
    ),
    ("vae", "VAELoader", 0, 340, {"vae_name": "ae.safetensors"}, {}, None),
]


def lora(name: str, y: int, file: str, prompt: str, title: str, clip: float = 1.0) -> tuple:
    """An SSR LoRA node."""
    return (name, "SSRLoRA", 0, y, {"lora": file, "prompts": prompt, "strength_clip": clip}, {}, title)


def sampling(
    prefix: str, model: str, clip: str, vae: str, y: int, prompt: str, *, flux: bool = False, size: int = 1024
) -> list:
    """Prompt to picture."""
    nodes = [
        (f"{prefix}pos", "CLIPTextEncode", 900, y, {"text": prompt}, {"clip": clip}, "Your prompt"),
        (f"{prefix}neg", "CLIPTextEncode", 900, y + 230, {"text": ""}, {"clip": clip}, "Negative prompt"),
        (
            f"{prefix}latent",
            "EmptySD3LatentImage" if flux else "EmptyLatentImage",
            900,
            y + 460,
            {"width": size, "height": size, "batch_size": 1},
            {},
            None,
        ),
    ]
    positive = f"{prefix}pos.0"
    if flux:
        nodes.append(
            (f"{prefix}guide", "FluxGuidance", 1340, y - 120, {"guidance": 3.5}, {"conditioning": positive}, None)
        )
        positive = f"{prefix}guide.0"
    return [
        *nodes,
        (
            f"{prefix}sample",
            "KSampler",
            1340,
            y,
            {
                "seed": 1,
                "control_after_generate": "fixed",
                "steps": 20 if flux else 30,
                "cfg": 1.0 if flux else 6.0,
                "sampler_name": "euler",
                "scheduler": "simple" if flux else "normal",
            },
            {"model": model, "positive": positive, "negative": f"{prefix}neg.0", "latent_image": f"{prefix}latent.0"},
            None,
        ),
        (f"{prefix}decode", "VAEDecode", 1690, y, {}, {"samples": f"{prefix}sample.0", "vae": vae}, None),
        (
            f"{prefix}save",
            "SaveImage",
            1690,
            y + 110,
            {"filename_prefix": "ssr/merged"},
            {"images": f"{prefix}decode.0"},
            None,
        ),
    ]


def note(name: str, x: int, y: int, text: str) -> tuple:
    """A note in Markdown."""
    return (name, "MarkdownNote", x, y, {"": text}, {}, "Read me")


ONE = lora("one", 300, "subject_one.safetensors", "a photo of sks dog\nsks dog sitting in a garden", "First subject")
TWO = lora("two", 640, "subject_two.safetensors", "a photo of zwx cat\nzwx cat lying on a sofa", "Second subject")
MERGE = {"model": "ckpt.0", "clip": "ckpt.1", "loras.lora0": "one.0", "loras.lora1": "two.0"}

GRAPHS = {
    "two_subjects": [
        *SDXL,
        ONE,
        TWO,
        ("merge", "SSRMerge", 440, 150, {"width": 512, "height": 512}, MERGE, None),
        ("report", "PreviewAny", 440, 900, {}, {"source": "merge.4"}, "Report"),
        *sampling("a", "merge.0", "merge.1", "ckpt.2", 0, "a photo of sks dog and zwx cat sitting together on a sofa"),
        note(
            "note",
            0,
            -190,
            "**Two subjects in one picture.** Choose your two LoRA files, and write into each SSR LoRA what "
            "that LoRA alone shows, with its trigger word. Then name both in your prompt.",
        ),
    ],
    "subject_and_style": [
        *FLUX,
        lora("one", 480, "subject_one.safetensors", "a photo of sks dog", "Subject"),
        lora("two", 820, "style.safetensors", "a landscape in wtrclr style", "Style"),
        (
            "merge",
            "SSRMerge",
            440,
            150,
            {"width": 512, "height": 512},
            {"model": "unet.0", "clip": "clips.0", "loras.lora0": "one.0", "loras.lora1": "two.0"},
            None,
        ),
        ("report", "PreviewAny", 440, 900, {}, {"source": "merge.4"}, "Report"),
        *sampling("a", "merge.0", "merge.1", "vae.0", 0, "sks dog in a meadow, in wtrclr style", flux=True),
        note(
            "note",
            0,
            -190,
            "**A subject in a style.** The subject's prompt names the subject, the style's prompt names "
            "something else in that style: the difference is what the router learns.",
        ),
    ],
    "calibrate_once": [
        *SDXL,
        ONE,
        TWO,
        ("calibrate", "SSRCalibrate", 440, 0, {"width": 512, "height": 512}, MERGE, None),
        (
            "solve1",
            "SSRSolve",
            440,
            420,
            {"strengths": "1.0\n1.0"},
            {"model": "ckpt.0", "clip": "ckpt.1", "calibration": "calibrate.0"},
            "Solve: equal",
        ),
        (
            "solve2",
            "SSRSolve",
            440,
            960,
            {"strengths": "0.7\n1.0"},
            {"model": "ckpt.0", "clip": "ckpt.1", "calibration": "calibrate.0"},
            "Solve: first one weaker",
        ),
        *sampling(
            "a", "solve1.0", "solve1.1", "ckpt.2", 0, "a photo of sks dog and zwx cat sitting together on a sofa"
        ),
        *sampling(
            "b", "solve2.0", "solve2.1", "ckpt.2", 720, "a photo of sks dog and zwx cat sitting together on a sofa"
        ),
        note(
            "note",
            0,
            -190,
            "**Calibrate once, solve often.** Change the strengths in SSR Solve (one line for each LoRA) and "
            "run again: the calibration is not repeated.",
        ),
    ],
    "save_and_reuse": [
        *SDXL,
        ONE,
        TWO,
        ("merge", "SSRMerge", 440, 150, {"width": 512, "height": 512}, MERGE, None),
        ("savelora", "SSRSaveLoRA", 900, 0, {"filename_prefix": "loras/dog_and_cat"}, {"lora": "merge.2"}, None),
        (
            "savecal",
            "SSRSaveCalibration",
            900,
            200,
            {"filename_prefix": "dog_and_cat"},
            {"calibration": "merge.3"},
            None,
        ),
        (
            "use",
            "LoraModelLoader",
            900,
            400,
            {"strength_model": 1.0},
            {"model": "ckpt.0", "lora": "merge.2"},
            "The merged LoRA is an ordinary LoRA",
        ),
        *[
            (n, t, x + 500, y, w, li, ti)
            for n, t, x, y, w, li, ti in sampling(
                "a", "use.0", "merge.1", "ckpt.2", 0, "a photo of sks dog and zwx cat sitting together on a sofa"
            )
        ],
        note(
            "note",
            0,
            -190,
            "**Save and reuse.** After one run press R: `dog_and_cat_00001_` is in every LoRA loader, and the "
            "calibration in SSR Load Calibration. The metadata of the file says how it was made.",
        ),
    ],
}

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


def main() -> None:
    """Write all graphs."""
    OUT.mkdir(exist_ok=True)
    with comfy_page(sys.argv[1]) as page:
        for name, nodes in GRAPHS.items():
            graph = page.evaluate(BUILD, nodes)
            (OUT / f"{name}.json").write_text(json.dumps(graph, indent=1), encoding="utf-8")
            page.evaluate("() => app.canvas.ds.reset()")
            print(name, len(graph["nodes"]), "nodes", page.messages[:5])


if __name__ == "__main__":
    main()
