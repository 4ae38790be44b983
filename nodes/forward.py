"""Which layers of a merge act in the forward pass, and a MODEL that makes them do so while it samples."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..ssr_core import ForwardLoRA, IncompatibleError, LoRALayer, Target
from ..ssr_core.words import number_of
from . import host
from .model_info import FORWARD_ATTACHMENT, root_of
from .storage_kinds import quantised_as

Apply = Literal["auto", "weights", "forward"]
APPLY: tuple[Apply, ...] = get_args(Apply)


@dataclass(frozen=True)
class Division:
    """The layers of the diffusion model that act in the forward pass.

    Attributes:
        layers: Those layers; all others become weight patches.
        of: Layers of the diffusion model in all.
        storage: How many of them have which quantised storage.
        apply: What was asked for.
        rounded: Quantised layers that hooks do not reach, which get a patch whatever was asked for.
    """

    layers: Mapping[Target, LoRALayer]
    of: int
    storage: Mapping[str, int]
    apply: Apply
    rounded: tuple[str, ...] = ()

    def notes(self) -> tuple[str, ...]:
        """What the report says about it."""
        stored = ", ".join(f"{count} as {name}" for name, count in sorted(self.storage.items()))
        if not self.layers:
            if self.storage and self.apply == "weights":
                return (
                    f"Base weights are quantised ({stored}): apply weights rounds the merged LoRA into them; auto "
                    "keeps it exact.",
                )
            return ()
        missed = (
            f" Out of the hooks' reach, patched and rounded: {number_of(len(self.rounded), 'quantised layer')}, e.g. "
            f"{self.rounded[0]}."
            if self.rounded
            else ""
        )
        why = f"base weights are quantised: {stored}" if self.apply == "auto" else "apply is forward"
        return (
            f"{len(self.layers)} of {self.of} layers of the MODEL are applied in the forward pass ({why}). Nodes that "
            f"save or merge the MODEL itself do not see them: use SSR Save LoRA, or set apply to weights.{missed}",
        )


def divide(
    model: Any, layers: Mapping[Target, LoRALayer], apply: Apply, out_of_reach: Collection[Target] = ()
) -> Division:
    """Decide layer by layer. auto: forward where the base weight is quantised, a weight patch elsewhere.

    Layers that hooks do not reach get a weight patch in any case.
    """
    own = {target: layer for target, layer in layers.items() if target.part == "model"}
    root = root_of("model", model)
    stored = {target: quantised_as(root.get_submodule(target.module_path)) for target in own}
    chosen = {
        target: layer
        for target, layer in own.items()
        if target not in out_of_reach and (apply == "forward" or (apply == "auto" and stored[target] is not None))
    }
    quantised = [target for target in own if stored[target] is not None]
    missed = tuple(str(target) for target in quantised if apply != "weights" and target not in chosen)
    return Division(chosen, len(own), Counter(name for name in stored.values() if name is not None), apply, missed)


def put_on(model: Any, division: Division) -> Any:
    """A clone of MODEL that applies these layers while it samples; MODEL itself if there are none."""
    if not division.layers:
        return model
    patch = _SamplingPatch(ForwardLoRA(division.layers))
    key = f"{FORWARD_ATTACHMENT}{uuid.uuid4().hex}"  # of its own: merged MODELs may follow each other in a chain
    clone = host.around_sampling(model, key, patch, patch.check)
    clone.set_attachments(key, division.layers)
    return clone


class _SamplingPatch:
    """A wrapper around a whole sampling: the LoRA is on the model inside, and off it afterwards."""

    def __init__(self, lora: ForwardLoRA) -> None:
        self._lora = lora

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Sample with the LoRA on the model that will really run, and on its copies on other GPUs."""
        with ExitStack() as stack:
            modules: list[Any] = []
            # Inside the guider, which may have swapped in another patcher than the one that has this wrapper.
            main = executor.class_obj.model_patcher
            for patcher in (main, *main.get_additional_models_with_key("multigpu")):
                dtype, device = host.activation_dtype(patcher), patcher.load_device
                host.make_room(self._lora.nbytes(dtype), device)
                modules += stack.enter_context(self._lora.attached(patcher.model, device, dtype))
            stack.enter_context(host.layers_called_as_modules(modules))
            return executor(*args, **kwargs)

    def check(self, patcher: Any) -> None:
        """The host is about to run this MODEL: refuse if that happens outside of `__call__`.

        Raises:
            IncompatibleError: The LoRA would have no effect.
        """
        if not self._lora.is_attached(patcher.model):
            raise IncompatibleError(
                "a node runs this MODEL as a second model of a sampling, where a merge in the forward pass does not act.",
                remedy="set apply to weights in SSR Merge or SSR Solve.",
            )
