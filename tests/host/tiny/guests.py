"""What other packs put on a MODEL or a conditioning: an attention patch as IP-Adapter's, a control signal."""

import comfy.controlnet
import node_helpers
import torch
from comfy_api.latest import io


class AttentionGuest(io.ComfyNode):
    """Adds a fixed share of the queries to every cross-attention's output."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AttentionGuest",
            category="ssr tests",
            inputs=[io.Model.Input("model"), io.Float.Input("share", default=0.3)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, share):
        clone = model.clone()
        clone.set_model_attn2_output_patch(lambda out, options: out + share * out.flip(-1))
        return io.NodeOutput(clone)


class _Signal(comfy.controlnet.ControlBase):
    """A control net whose answer is a constant."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        return {"middle": [torch.full((1, 1, 1, 1), 0.5, device=x_noisy.device, dtype=x_noisy.dtype)]}

    def copy(self):
        other = _Signal()
        self.copy_to(other)
        return other


class ControlGuest(io.ComfyNode):
    """A conditioning with a control signal."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ControlGuest",
            category="ssr tests",
            inputs=[io.Conditioning.Input("conditioning")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning):
        values = {"control": _Signal(), "control_apply_to_uncond": True}
        return io.NodeOutput(node_helpers.conditioning_set_values(conditioning, values))


GUEST_NODES = [AttentionGuest, ControlGuest]
