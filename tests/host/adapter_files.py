"""Files of every adapter kind for the tiny models, on fused, split, reordered and convolution layers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from perturbations import KINDS  # of the unit tests: what each kind's tensors look like
from safetensors.torch import save_file
from torch import Tensor

from .loras import model_shapes
from .merging import MergeGraph
from .server import Server
from .weights import base_weights

ADAPTERS = ("loha", "lokr", "glora", "oft", "boft", "dora", "difference")
MODULES = {
    "flux": (
        "img_in",
        "double_blocks.0.img_attn.proj",
        "double_blocks.0.img_attn.qkv",
        "double_blocks.1.txt_mod.lin",
        "single_blocks.1.linear2",
    ),
    "sd15": (
        "input_blocks.0.0",
        "input_blocks.1.0.in_layers.2",
        "input_blocks.1.1.proj_in",
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
        "middle_block.1.transformer_blocks.0.ff.net.0.proj",
        "output_blocks.1.0.skip_connection",
    ),
}
PARTS = {
    "flux": {
        "transformer.transformer_blocks.1.attn.to_k": "double_blocks.1.img_attn.qkv",
        "transformer.single_transformer_blocks.0.proj_mlp": "single_blocks.0.linear1",
        "transformer.norm_out.linear": "final_layer.adaLN_modulation.1",
    },
    "sd15": {},
}
"""Names of some rows of a fused layer, or of reordered rows, and the layer."""

ROWS = {"transformer.transformer_blocks.1.attn.to_k": 128, "transformer.single_transformer_blocks.0.proj_mlp": 512}


def layer_shapes(base: Path, family: str) -> dict[str, tuple[int, ...]]:
    """Shape of the change under each name."""
    shapes = model_shapes(base, family)
    names = {f"diffusion_model.{module}": shapes[module] for module in MODULES[family]}
    for name, module in PARTS[family].items():
        whole = shapes[module]
        names[name] = (ROWS.get(name, whole[0]), *whole[1:])
    return names


def changed_weights(family: str) -> set[str]:
    """The host's names of the weights that `adapter_file` changes."""
    return {f"diffusion_model.{module}.weight" for module in (*MODULES[family], *PARTS[family].values())}


def adapter_tensors(base: Path, family: str, kind: str, seed: int = 1) -> dict[str, Tensor]:
    """One kind on all layers, large enough to be seen beside the weights."""
    rng, tensors = random.Random(f"{kind}{seed}"), {}
    for name, shape in layer_shapes(base, family).items():
        group = KINDS[kind](rng, shape)
        while ".lokr_t2" in group:  # ComfyUI 0.33 cannot apply it: it refuses its own einsum's strides
            group = KINDS[kind](rng, shape)
        for suffix, value in group.items():
            grown = 3.0 if any(word in suffix for word in ("hada", "lora", "lokr")) else 1.0
            tensors[name + suffix] = grown * value
    return tensors


def write_lora(base: Path, name: str, tensors: Mapping[str, Tensor]) -> str:
    save_file({key: value.contiguous() for key, value in tensors.items()}, base / "models" / "loras" / name)
    return name


def adapter_file(base: Path, family: str, kind: str, seed: int = 1) -> str:
    return write_lora(base, f"{kind}_{family}_{seed}.safetensors", adapter_tensors(base, family, kind, seed))


def plain_file(base: Path, family: str, deltas: Mapping[str, Tensor], name: str) -> str:
    """Dense changes by the host's weight names as an ordinary LoRA, without the rounding of W + delta - W.

    Noise must go: each direction is a coordinate of the router, however small the LoRA is along it.
    """
    weights, tensors = base_weights(base, family), {}
    for weight, delta in deltas.items():
        u, s, vh = torch.linalg.svd(delta.double().flatten(1), full_matrices=False)
        noise = torch.finfo(torch.float32).eps * float(weights[weight].norm())
        kept = max(1, int((s > noise).sum()))
        up, down = (u[:, :kept] * s[:kept].sqrt()).float(), (s[:kept].sqrt()[:, None] * vh[:kept]).float()
        if delta.ndim > 2:
            up, down = up[:, :, None, None], down.reshape(kept, *delta.shape[1:])
        tensors |= {weight.removesuffix("weight") + "lora_up.weight": up}
        tensors |= {weight.removesuffix("weight") + "lora_down.weight": down}
    return write_lora(base, name, tensors)


class ConversionGraph(MergeGraph):
    """SSR Merge of files by name, each with a conditioning of its own."""

    def __init__(self, server: Server, family: str, **convert: object) -> None:
        super().__init__(server)
        self.family, self.convert = family, {"convert_rank": 1024, "convert_error": 1e-6} | convert

    def entries(self, files: Sequence[tuple[str, float]]) -> list:
        self._server.schemas(refresh=True)
        return [
            self.pack(
                "SSRLoRA",
                lora=file,
                strength_model=strength,
                strength_clip=strength,
                conditioning=self.conditioning(self.family, 501 + index),
                **self.convert,
            )
            for index, (file, strength) in enumerate(files)
        ]

    def of(self, *files: tuple[str, float], kind: str = "SSRMerge", **options: object):
        options.setdefault("model", self.checkpoint(self.family))
        options.setdefault("latent", self.latent(self.family))
        return self.join(kind, self.entries(files), **options)

    def chain(self, *files: tuple[str, float], model: object = None):
        """Core's own loaders, one after the other."""
        model = self.checkpoint(self.family) if model is None else model
        for file, strength in files:
            model = self.core_lora(model, file, strength)
        return model


def run_both(server: Server, ours: ConversionGraph, merged: object, theirs: ConversionGraph, model: object):
    """Dumps of a merge and of a chain."""
    ours.dump(merged, "conv_ours")
    theirs.dump(model, "conv_core")
    first = server.run(ours.prompt).ok()
    server.run(theirs.prompt).ok()
    return first


def change_errors(
    ours: Mapping[str, Tensor], core: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, float]:
    """Distance of two changes relative to the second, by weight; infinite where only one has any."""
    errors = {}
    for name, weight in before.items():
        change = (core[name].double() - weight.double()).norm()
        gap = (ours[name].double() - core[name].double()).norm()
        if change > 0 or gap > 0:
            errors[name] = float(gap / change) if change > 0 else float("inf")
    return errors
