"""Nodes that write what the host really uses: patched weights, leftover hooks, layer inputs."""

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import comfy.patcher_extension
import folder_paths
import torch
from comfy_api.latest import io
from safetensors.torch import save_file


def _output_path(prefix: str) -> Path:
    path = Path(folder_paths.get_output_directory()) / "probes" / f"{prefix}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class DumpWeights(io.ComfyNode):
    """Loads a MODEL or CLIP as a sampler would and writes every weight as the layers see it."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DumpWeights",
            category="ssr tests",
            is_output_node=True,
            inputs=[
                io.MultiType.Input("source", types=[io.Model, io.Clip]),
                io.String.Input("prefix"),
                io.Boolean.Input("base_only", default=False, optional=True),
                io.Boolean.Input("changed_only", default=False, optional=True),
            ],
        )

    @classmethod
    def execute(cls, source, prefix, base_only=False, changed_only=False):
        patcher = getattr(source, "patcher", source)
        comfy.model_management.load_models_gpu([patcher])
        state = patcher.model.state_dict()
        if changed_only:
            changed = {name: state[name].detach().cpu() for name in patcher.backup}
            save_file(changed, _output_path(prefix))
            return io.NodeOutput(ui={"text": [json.dumps({"changed": len(changed)})]})
        seen = {name: value.detach().cpu().clone() for name, value in state.items()}
        base = {name: patcher.backup[name].weight.cpu() if name in patcher.backup else seen[name] for name in seen}
        modules = list(patcher.model.modules())
        lazy = [getattr(m, name, None) for m in modules for name in ("weight_function", "bias_function")]
        facts = {
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
            "lazy_patches": sum(len(functions) for functions in lazy if functions),
            "base_hash": _hash(base),
        }
        if not base_only:
            save_file(seen, _output_path(prefix))
        return io.NodeOutput(ui={"text": [json.dumps(facts)]})


class DumpReport(io.ComfyNode):
    """Shows the whole report of a merge, every key with its fate, as JSON."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DumpReport",
            category="ssr tests",
            is_output_node=True,
            inputs=[io.LoraModel.Input("lora")],
        )

    @classmethod
    def execute(cls, lora):
        return io.NodeOutput(ui={"text": [json.dumps(lora.origin.result.report.to_json())]})


class RecordInputs(io.ComfyNode):
    """Passes a MODEL through; while it samples, keeps the full input of every linear and conv layer."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RecordInputs",
            category="ssr tests",
            inputs=[io.Model.Input("model"), io.String.Input("prefix")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, prefix):
        def record(executor, *args, **kwargs):
            with _recording(executor.class_obj.model_patcher.model, prefix):
                return executor(*args, **kwargs)

        recorded = model.clone()
        recorded.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "record_inputs", record)
        return io.NodeOutput(recorded)


class RecordTextInputs(io.ComfyNode):
    """Encodes a text and keeps the full input of every linear layer of the text encoder."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RecordTextInputs",
            category="ssr tests",
            is_output_node=True,
            inputs=[io.Clip.Input("clip"), io.String.Input("text"), io.String.Input("prefix")],
        )

    @classmethod
    def execute(cls, clip, text, prefix):
        with _recording(clip.cond_stage_model, prefix):
            clip.encode_from_tokens_scheduled(clip.tokenize(text))
        return io.NodeOutput()


@contextmanager
def _recording(root: torch.nn.Module, prefix: str):
    """Writes every layer's inputs, under the name of its weight, when the block ends."""
    seen: dict[str, list[torch.Tensor]] = {}
    geometry: dict[str, dict[str, list[int]]] = {}
    handles = []
    for name, module in root.named_modules():
        spatial = hasattr(module, "kernel_size")
        if getattr(module, "weight", None) is None or not (spatial or hasattr(module, "in_features")):
            continue
        key = f"{name}.weight"
        seen[key] = []
        if spatial:
            parts = ("kernel_size", "stride", "padding", "dilation")
            geometry[key] = {part: list(getattr(module, part)) for part in parts}
        handles.append(module.register_forward_pre_hook(_keep(seen[key], spatial)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        rows = {key: torch.cat(parts).contiguous() for key, parts in seen.items() if parts}
        save_file(rows, _output_path(prefix), metadata={"geometry": json.dumps(geometry)})


def _keep(rows: list[torch.Tensor], spatial: bool):
    def hook(_module, args):
        x = args[0].detach().float().cpu().clone()
        rows.append(x if spatial else x.reshape(-1, x.shape[-1]))

    return hook


PROBE_NODES = [DumpWeights, DumpReport, RecordInputs, RecordTextInputs]
