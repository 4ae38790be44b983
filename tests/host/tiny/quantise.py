"""Tiny checkpoints in every quantised storage that the host's own quantiser can write.

The matrices that fit a format's block sizes are quantised, the others stay float32, as in real files.
"""

import json
from pathlib import Path

import comfy.quant_ops
import folder_paths
import torch
from comfy_api.latest import io
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nodes

BLOCK = 128
"""Every dimension of a quantised matrix is a multiple of this; the widest block of any format."""

FORMATS: dict[str, tuple[str, dict]] = {
    "float8_e4m3fn": ("float8_e4m3fn", {}),
    "float8_e5m2": ("float8_e5m2", {}),
    "mxfp8": ("mxfp8", {}),
    "nvfp4": ("nvfp4", {}),
    "nvfp4_smoothed": ("nvfp4", {}),
    "int8": ("int8_tensorwise", {}),
    "int8_convrot": ("int8_tensorwise", {"convrot": True, "convrot_groupsize": 64}),
    "convrot_w4a4": ("convrot_w4a4", {"convrot_groupsize": 64}),
    "asym_w4a8_int8": ("asym_w4a8_int8", {"convrot_groupsize": 64}),
}
KINDS = (*FORMATS, "scaled_fp8")


def fits(name: str, value: torch.Tensor) -> bool:
    """Whether a tensor of a checkpoint is quantised."""
    return name.endswith(".weight") and value.ndim == 2 and all(n % BLOCK == 0 for n in value.shape)


class QuantisedLoader(io.ComfyNode):
    """UNETLoader of a checkpoint that is written first if it is not there yet."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantisedLoader",
            category="ssr tests",
            inputs=[io.String.Input("family"), io.Combo.Input("kind", options=list(KINDS))],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, family, kind):
        path = Path(folder_paths.models_dir, "diffusion_models", f"tiny_{family}_{kind}.safetensors")
        if not path.exists():
            _write(path.with_name(f"tiny_{family}.safetensors"), path, kind)
        return io.NodeOutput(*nodes.UNETLoader().load_unet(path.name, "default"))


def _write(plain: Path, path: Path, kind: str) -> None:
    with safe_open(plain, "pt") as file:
        metadata = file.metadata()
    state = load_file(plain)
    tensors = _scaled_fp8(state) if kind == "scaled_fp8" else _mixed_precision(state, kind)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)


def _mixed_precision(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """comfy_quant: packed weight, its scales, and a description beside it."""
    name_of_format, settings = FORMATS[kind]
    layout = comfy.quant_ops.QUANT_ALGOS[name_of_format]["comfy_tensor_layout"]
    options = dict(settings)
    if name_of_format.startswith("float8"):
        options["scale"] = "recalculate"
    if settings.get("convrot"):
        options["per_channel"] = True
    out = {}
    for name, value in state.items():
        if not fits(name, value):
            out[name] = value
            continue
        base = name.removesuffix("weight")
        if kind == "nvfp4_smoothed":  # as ModelOpt's AWQ: the layer multiplies its input by this first
            scale = torch.linspace(0.5, 2.0, value.shape[1])
            value, out[base + "pre_quant_scale"] = value / scale, scale
        packed = comfy.quant_ops.QuantizedTensor.from_float(value.to(torch.bfloat16), layout, **options)
        out.update(packed.state_dict(name))
        description = json.dumps({"format": name_of_format, **settings}).encode()
        out[base + "comfy_quant"] = torch.tensor(list(description), dtype=torch.uint8)
    return out


def _scaled_fp8(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The older layout: one scale a matrix and a marker in the file."""
    out = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}  # two elements: multiply in full precision
    for name, value in state.items():
        if not fits(name, value):
            out[name] = value
            continue
        scale = value.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        out[name] = (value / scale).to(torch.float8_e4m3fn)
        out[name.removesuffix("weight") + "scale_weight"] = scale.float()
    return out


def quantised_parameters(root: torch.nn.Module):
    """(name, float value as the layer means it) of every parameter that is not stored as a wide float."""
    for path, module in root.named_modules():
        for name, value in module.named_parameters(recurse=False):
            if hasattr(value, "unpacked"):
                yield f"{path}.{name}", value.unpacked()
            elif isinstance(value, comfy.quant_ops.QuantizedTensor):
                dense = value.dequantize().double()
                scale = getattr(module, "pre_quant_scale", None)
                yield f"{path}.{name}", dense if scale is None else dense * scale.double()
            elif value.dtype.itemsize == 1:
                yield f"{path}.{name}", value.double()


QUANTISED_NODES = [QuantisedLoader]
