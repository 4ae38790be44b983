"""The model at work: calibration passes, and wrappers around samplings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ops
import comfy.patcher_extension
import comfy.samplers
import torch
from torch import Tensor

from ...ssr_core import InputTap, Tap
from ..sampling import evaluate


def run_calibration_pass(
    model: Any,
    conditioning: list[Any],
    tap: Tap | InputTap,
    *,
    noise: Tensor,
    latent: Tensor,
    sigmas: Tensor,
    seed: int,
    on_step: Callable[[int, Tensor], None],
) -> None:
    """Evaluate the model once at each sigma, positive prompt only, with the tap's hooks attached."""
    clone = model.clone()
    clone.remove_additional_models("multigpu")  # hooks do not reach onto other GPUs' copies
    for kind, key in _STRIPPED_WRAPPERS:
        clone.remove_wrappers_with_key(kind, key)

    def attach(executor: Any, *args: Any, **kwargs: Any) -> Any:
        # The guider may have swapped in another patcher; hook the module that will really run.
        with tap.attached(executor.class_obj.model_patcher.model) as modules, layers_called_as_modules(modules):
            return executor(*args, **kwargs)

    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "ssr_merge", attach)
    guider = comfy.samplers.CFGGuider(clone)
    guider.inner_set_conds({"positive": conditioning})
    guider.sample(
        noise,
        latent,
        comfy.samplers.KSAMPLER(evaluate),
        sigmas,
        callback=lambda step, x0, x, total: on_step(step, x0),
        disable_pbar=True,
        seed=seed,
    )


_Wrappers = comfy.patcher_extension.WrappersMP
_STRIPPED_WRAPPERS = (
    (_Wrappers.APPLY_MODEL, "torch.compile"),  # hooks do not reach into a graph that is compiled already
    *((kind, "easycache") for kind in (_Wrappers.OUTER_SAMPLE, _Wrappers.CALC_COND_BATCH, _Wrappers.DIFFUSION_MODEL)),
    *((kind, "lazycache") for kind in (_Wrappers.OUTER_SAMPLE, _Wrappers.PREDICT_NOISE)),  # they skip steps
)


@contextmanager
def layers_called_as_modules(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """INT8 models hand some layers' weights to a fused kernel; for the block these are called, so that hooks fire."""
    original = getattr(comfy.ops, "linear_input_act", None)
    if original is None:  # ComfyUI before 0.27
        yield
        return
    ours = frozenset(id(module) for module in modules)

    def call(linear: Any, x: Tensor, act: str) -> Tensor:
        if id(linear) in ours:
            return linear(comfy.ops.INPUT_ACT_EAGER[act](x))
        return original(linear, x, act)

    comfy.ops.linear_input_act = call
    try:
        yield
    finally:
        comfy.ops.linear_input_act = original


def around_sampling(model: Any, key: str, wrapper: Callable[..., Any], before_run: Callable[[Any], None]) -> Any:
    """A clone of MODEL whose samplings run inside `wrapper`; `before_run` is told of each MODEL about to run."""
    clone = model.clone()
    clone.add_wrapper_with_key(_Wrappers.OUTER_SAMPLE, key, wrapper)
    clone.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_PRE_RUN, key, before_run)
    return clone
