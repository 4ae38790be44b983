"""Nodes that watch the pack convert adapters, from inside the server."""

import json
import sys
import time
from pathlib import Path

import comfy.lora
import comfy.model_management
import torch
from comfy_api.latest import io

STRENGTHS = (0.7, 0.7)
_STATE = {"calls": 0, "delay": 0.0}


def pack(module: str):
    """A module of the pack as ComfyUI loaded it (its name is a path)."""
    return next(loaded for name, loaded in sys.modules.items() if name.endswith(f"ssr-merge.{module}"))


def _watch():
    """Count dense changes, and slow them down if asked to."""
    changes = pack("nodes.conversion").DenseChanges
    original = changes.__call__
    if getattr(original, "watched", False):
        return

    def call(self, group):
        _STATE["calls"] += 1
        time.sleep(_STATE["delay"])
        return original(self, group)

    call.watched = True
    changes.__call__ = call


class ConversionProbe(io.ComfyNode):
    """How many dense changes were computed since the last time; sets how long each takes from now on."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConversionProbe",
            category="ssr tests",
            is_output_node=True,
            inputs=[io.Float.Input("delay", default=0.0), io.String.Input("tag", default="")],
        )

    @classmethod
    def execute(cls, delay, tag):
        _watch()
        calls, _STATE["calls"], _STATE["delay"] = _STATE["calls"], 0, delay
        return io.NodeOutput(ui={"text": [json.dumps(calls)]})


class LoadEach(io.ComfyNode):
    """Reads and converts every LoRA file of a folder by itself, as SSR Merge does; says what became of each."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoadEach",
            category="ssr tests",
            is_output_node=True,
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip", optional=True),
                io.String.Input("folder"),
                io.Int.Input("convert_rank", default=4),
            ],
        )

    @classmethod
    def execute(cls, model, folder, convert_rank, clip=None):
        found = {p.name: _outcome(p, model, clip, convert_rank) for p in sorted(Path(folder).glob("*.safetensors"))}
        return io.NodeOutput(ui={"text": [json.dumps(found)]})


def _outcome(path, model, clip, convert_rank):
    """`["loaded" | "refused" | "crashed", words, seconds]`; loaded ones are merged and put onto the model as well."""
    core, host = pack("ssr_core"), pack("nodes.host")
    comfy.model_management.throw_exception_if_processing_interrupted()
    start = time.monotonic()
    try:
        words = _load(path, model, clip, core.ConvertOptions(convert_rank, 1e-3), host.Progress(model))
        status = "loaded"
    except core.SSRMergeError as err:
        status, words = "refused", str(err)
    except Exception as err:  # noqa: BLE001 (what the test is after)
        status, words = "crashed", f"{type(err).__name__}: {err}"
    return [status, words, time.monotonic() - start]


def _load(path, model, clip, options, progress):
    """Merge the file with nothing; the first thing that is wrong with the result, in words."""
    core, loading, patches = pack("ssr_core"), pack("nodes.loading"), pack("nodes.patches")
    tensors, _ = core.read_safetensors(path)
    entry = pack("nodes.entries").LoRAEntry(path.name, path.name, *STRENGTHS, ("p",), tensors=tensors, convert=options)
    loaded = loading.load((entry,), model, clip, progress)
    adapter = loaded.tasks[0].adapter
    result = core.merge(loaded.tasks, core.SumMerge(), unsupported="pass_through")
    wrong = ""
    for part, owner, keys in zip(
        ("model", "clip"), (model, clip), pack("nodes.host").core_key_map(model, clip), strict=True
    ):
        if owner is not None:
            changed = loading.rest(loaded, 0, part, owner, keys)
            changed = patches.apply(loading.pass_through(loaded, 0, part, changed, keys), part, result)
            wrong = wrong or _difference(changed, _by_core(owner, tensors, keys))
    fates = result.report.files[0]
    if [record.key for record in adapter.records] != list(tensors) or sum(fates.fates.values()) != len(tensors):
        return "keys without a fate"
    return wrong


def _by_core(owner, tensors, keys):
    """Weights of a MODEL or CLIP with the file as LoraLoader puts it on; without those that it stumbles over."""
    clone, weights, found = owner.clone(), pack("nodes.host.weights"), {}
    try:
        clone.add_patches(comfy.lora.load_lora(dict(tensors), dict(keys), log_missing=False), STRENGTHS[0])
    except (RuntimeError, KeyError, IndexError, TypeError):
        return None
    for key in clone.patches:
        try:
            found[key] = weights.current_weight(clone, key, torch.device("cpu"))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NameError):
            found[key] = None
    return found


def _difference(ours, core):
    """The first weight that LoraLoader would change otherwise; biases are left to other tests."""
    weights, device = pack("nodes.host.weights"), torch.device("cpu")
    for key in sorted(set(ours.patches) | set(core or {})) if core is not None else ():
        if key.endswith(".bias") or core.get(key, 0) is None:
            continue
        base = weights.base_weight(ours, key, device)
        a, b = weights.current_weight(ours, key, device), core.get(key, base)
        gap, change, size = float((a - b).norm()), float((b - base).norm()), float(base.norm())
        if not gap <= 1e-3 * change + 1e-6 * size:
            return f"{key} differs from LoraLoader's by {gap}, its change is {change}, the weight {size}"
    return ""


CONVERSION_NODES = [ConversionProbe, LoadEach]
