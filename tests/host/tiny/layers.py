"""What single layers really compute: recorded during a sampling, and again on a base model."""

import json

import comfy.model_management
import comfy.patcher_extension
import folder_paths
import torch
from comfy_api.latest import io
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .probes import _output_path
from .quantise import quantised_parameters


class RecordLayers(io.ComfyNode):
    """Passes a MODEL through; its next sampling writes input and output of the first call of every layer."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RecordLayers",
            category="ssr tests",
            inputs=[io.Model.Input("model"), io.String.Input("prefix")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, prefix):
        def record(executor, *args, **kwargs):
            root = executor.class_obj.model_patcher.model
            seen, geometry, handles = {}, {}, []
            for name, module in _layers(root):
                if hasattr(module, "kernel_size"):
                    parts = ("kernel_size", "stride", "padding", "dilation")
                    geometry[f"{name}.weight"] = {part: list(getattr(module, part)) for part in parts}
                handles.append(module.register_forward_pre_hook(_keeper(seen, f"{name}.weight:in")))
                handles.append(module.register_forward_hook(_keeper(seen, f"{name}.weight:out")))
            try:
                return executor(*args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()
                save_file(seen, _output_path(prefix), metadata={"geometry": json.dumps(geometry)})

        recorded = model.clone()
        recorded.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, f"record {prefix}", record)
        return io.NodeOutput(recorded)


class ReplayLayers(io.ComfyNode):
    """Feeds recorded inputs to the same layers of another MODEL, each on its own, and writes their outputs."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ReplayLayers",
            category="ssr tests",
            is_output_node=True,
            inputs=[
                io.Model.Input("model"),
                io.String.Input("prefix"),
                io.Latent.Input("after", optional=True, tooltip="Makes the recording come first."),
            ],
        )

    @classmethod
    def execute(cls, model, prefix, after=None):
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        modules, outputs = dict(_layers(model.model)), {}
        with safe_open(_output_path(prefix), "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key.endswith(":in"):
                    module = modules[key.removesuffix(".weight:in")]
                    outputs[key.removesuffix("in") + "base"] = module(file.get_tensor(key)).clone().contiguous()
        save_file(outputs, _output_path(f"{prefix}_base"))
        return io.NodeOutput()


class TwinModel(io.ComfyNode):
    """The float32 MODEL of a family with another MODEL's dequantised weights, plus dense changes from a file."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TwinModel",
            category="ssr tests",
            inputs=[
                io.Model.Input("plain", tooltip="The unquantised model, whose weights are replaced."),
                io.Model.Input("quantised"),
                io.String.Input("deltas", default="", tooltip="Safetensors below the output folder; empty for none."),
                io.String.Input("salt", default="", tooltip="Another value makes the node read its file again."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, plain, quantised, deltas, salt):
        changes = load_file(f"{folder_paths.get_output_directory()}/{deltas}") if deltas else {}
        # models share their modules with their clones: what an earlier graph patched must be off before reading
        comfy.model_management.load_models_gpu([plain, quantised])
        weights = {name: value.double() for name, value in quantised_parameters(quantised.model)}
        patches = {}
        state = plain.model.state_dict()
        for name, value in state.items():
            wanted = weights.get(name, value.double())
            if name in changes:
                wanted = wanted + changes[name].reshape(wanted.shape)
            if name in weights or name in changes:
                patches[name] = ("set", (wanted.float(),))
        missing = (weights.keys() | changes.keys()) - state.keys()
        assert not missing, sorted(missing)
        twin = plain.clone()
        assert set(twin.add_patches(patches)) == set(patches)
        return io.NodeOutput(twin)


def _layers(root):
    for name, module in root.named_modules():
        if getattr(module, "weight", None) is not None and (
            hasattr(module, "kernel_size") or hasattr(module, "in_features")
        ):
            yield name, module


def _keeper(seen, key):
    def hook(_module, *values):
        value = values[-1]
        value = value[0] if isinstance(value, tuple) else value
        if key not in seen:
            seen[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)

    return hook


LAYER_NODES = [RecordLayers, ReplayLayers, TwinModel]
