"""Nodes that stand in for what a user would connect."""

import json

import comfy.utils
import folder_paths
from comfy_api.latest import io

from .clips import KINDS, build_clip
from .families import FAMILIES

LORA_STACK = io.Custom("LORA_STACK")


class TinyConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TinyConditioning",
            category="ssr tests",
            inputs=[io.Combo.Input("family", options=list(FAMILIES)), io.Int.Input("seed", default=0)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, family, seed):
        return io.NodeOutput(FAMILIES[family]().text.sample(seed))


class TinyCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TinyCLIP",
            category="ssr tests",
            inputs=[io.Combo.Input("kind", options=list(KINDS)), io.Int.Input("seed", default=0)],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, kind, seed):
        return io.NodeOutput(build_clip(kind, seed))


class MakeStack(io.ComfyNode):
    """A LORA_STACK from JSON: [[name, strength_model, strength_clip], ...]."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MakeStack",
            category="ssr tests",
            inputs=[io.String.Input("entries")],
            outputs=[LORA_STACK.Output()],
        )

    @classmethod
    def execute(cls, entries):
        return io.NodeOutput([tuple(entry) for entry in json.loads(entries)])


class LoraModelFromFile(io.ComfyNode):
    """A LORA_MODEL, as training nodes emit it."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraModelFromFile",
            category="ssr tests",
            inputs=[io.String.Input("name")],
            outputs=[io.LoraModel.Output()],
        )

    @classmethod
    def execute(cls, name):
        path = folder_paths.get_full_path_or_raise("loras", name)
        return io.NodeOutput(dict(comfy.utils.load_torch_file(path, safe_load=True)))


SOURCE_NODES = [TinyConditioning, TinyCLIP, MakeStack, LoraModelFromFile]
