"""Tiny checkpoints in every quantised storage that the host's own quantiser can write.

The matrices that fit a format's block sizes are quantised, the others stay float32, as in real files.
"""

import json
from pathlib import Path

import comfy.quant_ops
import folder_paths
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

BLOCK = 128
"""Every dimension of a quantised matrix is a multiple of this; the widest block of any format."""

FAMILIES = ("flux", "wan21")
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


def checkpoint(family: str, kind: str) -> Path:
    return Path(folder_paths.models_dir, "diffusion_models", f"tiny_{family}_{kind}.safetensors")


def write_missing() -> None:
    """Write the files that are not there yet."""
    for family in FAMILIES:
        plain = checkpoint(family, "x").with_name(f"tiny_{family}.safetensors")
        with safe_open(plain, "pt") as file:
            metadata = file.metadata()
        state = load_file(plain)
        for kind in KINDS:
            path = checkpoint(family, kind)
            if path.exists():
                continue
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


def quantised_modules(root: torch.nn.Module):
    """(weight name, float weight as the layer means it) of every quantised layer."""
    for name, module in root.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "unpacked"):
            yield f"{name}.weight", weight.unpacked()
        elif isinstance(weight, comfy.quant_ops.QuantizedTensor):
            dense = weight.dequantize().double()
            scale = getattr(module, "pre_quant_scale", None)
            yield f"{name}.weight", dense if scale is None else dense * scale.double()
        elif weight is not None and weight.dtype.itemsize == 1:
            yield f"{name}.weight", weight.double()
