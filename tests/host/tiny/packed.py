"""A loader in the manner of the GGUF packs: packed weights that show their logical shape, own layers, own patcher."""

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

from .quantise import fits

_GROUP = 32


class PackedTensor(torch.Tensor):
    """Groups of 32 values as int8 with one float16 scale: (groups, 34) bytes that claim to be (out, in)."""

    @staticmethod
    def pack(value: torch.Tensor) -> "PackedTensor":
        groups = value.float().reshape(-1, _GROUP)
        scale = (groups.abs().amax(1, keepdim=True) / 127).to(torch.float16)
        numbers = (groups / scale.float().clamp_min(1e-8)).round().clamp(-127, 127).to(torch.int8)
        data = torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], dim=1)
        return PackedTensor.like(data, value.shape)

    @staticmethod
    def like(data: torch.Tensor, shape: torch.Size, patches: tuple = ()) -> "PackedTensor":
        packed = data.as_subclass(PackedTensor)
        packed.logical, packed.patches = torch.Size(shape), patches
        return packed

    @property
    def shape(self):
        return self.logical if hasattr(self, "logical") else super().shape

    def unpacked(self) -> torch.Tensor:
        data = self.as_subclass(torch.Tensor)
        scale = data[:, :2].contiguous().view(torch.float16).float()
        return (scale * data[:, 2:].contiguous().view(torch.int8).float()).reshape(self.logical)

    def to(self, *args, **kwargs):
        moved = super().to(*args, **kwargs)
        return PackedTensor.like(moved.as_subclass(torch.Tensor), self.logical, self.patches)

    def detach(self):
        return PackedTensor.like(self.as_subclass(torch.Tensor).detach(), self.logical, self.patches)

    def clone(self, *args, **kwargs):
        return PackedTensor.like(self.as_subclass(torch.Tensor).clone(), self.logical, self.patches)


class PackedOps(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        comfy_cast_weights = True

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def _load_from_state_dict(self, state_dict, prefix, *_):
            self.weight = torch.nn.Parameter(state_dict[f"{prefix}weight"], requires_grad=False)
            if f"{prefix}bias" in state_dict:
                self.bias = torch.nn.Parameter(state_dict[f"{prefix}bias"], requires_grad=False)

        def _apply(self, fn):
            return self

        def forward_comfy_cast_weights(self, input):
            weight = self.weight
            if isinstance(weight, PackedTensor):
                dense = weight.unpacked().to(input.dtype)
                for patches, key in weight.patches:
                    dense = comfy.lora.calculate_weight(patches, dense, key)
                weight = dense
            return torch.nn.functional.linear(input, weight, self.bias)


class PackedPatcher(comfy.model_patcher.ModelPatcher):
    """Leaves packed weights packed: patches are added whenever a layer unpacks."""

    def patch_weight_to_device(self, key, device_to=None, *args, **kwargs):
        weight = comfy.utils.get_attr(self.model, key)
        if not isinstance(weight, PackedTensor):
            return super().patch_weight_to_device(key, device_to, *args, **kwargs)
        weight.patches = ((self.patches[key], key),) if key in self.patches else ()
        return None

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            for module in self.model.modules():
                if isinstance(getattr(module, "weight", None), PackedTensor):
                    module.weight.patches = ()
        return super().unpatch_model(device_to, unpatch_weights)

    def load(self, *args, **kwargs):
        super().load(*args, **kwargs)
        for name, module in self.model.named_modules():
            if isinstance(getattr(module, "weight", None), PackedTensor):
                self.patch_weight_to_device(f"{name}.weight")


class PackedLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PackedLoader",
            category="ssr tests",
            inputs=[io.String.Input("family")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, family):
        path = folder_paths.get_full_path_or_raise("diffusion_models", f"tiny_{family}.safetensors")
        state, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
        for name, value in state.items():
            if fits(name, value):
                state[name] = PackedTensor.pack(value)
        options = {"custom_operations": PackedOps, "dtype": torch.float32}
        model = comfy.sd.load_diffusion_model_state_dict(state, options, metadata=metadata)
        patcher = PackedPatcher.__new__(PackedPatcher)
        patcher.__dict__.update(model.__dict__)
        return io.NodeOutput(patcher)


PACKED_NODES = [PackedLoader]
