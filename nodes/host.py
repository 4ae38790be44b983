"""Everything this pack asks of ComfyUI's internals. No other module imports comfy or folder_paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.sd1_clip
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from ..ssr_core import FileError, IncompatibleError, KeyTarget, LoRALayer, Part, Tap, TextRows
from .model_info import key_target, root_of, tapped_modules, weight_shapes
from .sampling import evaluate

CoreKeyMap = Mapping[str, Any]
"""Base name in a LoRA file -> key as ComfyUI's `add_patches` takes it (a string or a tuple)."""

SCHEDULERS: list[str] = list(comfy.samplers.SCHEDULER_NAMES)


def core_key_map(model: Any | None, clip: Any | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """ComfyUI's own key maps of MODEL and CLIP. A fresh dict each: the default argument is shared."""
    unet = {} if model is None else comfy.lora.model_lora_keys_unet(model.model, {})
    text = {} if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    return unet, text


def key_map(model: Any | None, clip: Any | None) -> dict[str, KeyTarget]:
    """The engine's key map of the connected MODEL and CLIP."""
    unet, text = core_key_map(model, clip)
    entries: dict[str, KeyTarget] = {}
    parts: list[tuple[Part, dict[str, Any], Any]] = [("model", unet, model), ("clip", text, clip)]
    for part, names, owner in parts:
        if owner is None:
            continue
        root = root_of(part, owner)
        shapes, tapped = weight_shapes(root), tapped_modules(root)
        for name, key in names.items():
            entry = key_target(part, key, shapes, tapped)
            if entry is not None:
                entries[name] = entry
    return entries


def lora_files() -> list[str]:
    """LoRA files as ComfyUI lists them."""
    return list(folder_paths.get_filename_list("loras"))


def lora_path(name: str) -> Path:
    """Full path of a listed LoRA file.

    Raises:
        FileError: No loras folder has it.
    """
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise FileError("no loras folder has this file.", file=name, remedy="refresh the list (R) and choose again.")
    return Path(path)


def convert_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's renaming of the few formats that its key map does not know (BFL control, Wan Fun, USO)."""
    return dict(comfy.lora_convert.convert_lora(tensors))


def compute_device(model: Any) -> torch.device:
    """Where to solve: the model's CUDA device, else the CPU (others lack float64)."""
    device: torch.device = model.load_device
    return device if device.type == "cuda" else torch.device("cpu")


def activation_dtype(owner: Any) -> torch.dtype:
    """Dtype in which the model's layers compute."""
    get = getattr(owner.model, "get_dtype_inference", None)
    return get() if callable(get) else torch.float32


def memory_budgets(device: torch.device, limit_gb: float) -> tuple[int, int]:
    """Bytes for statistics on the device and in main memory; 0 GB: half of the device, half of the free memory."""
    if limit_gb > 0:
        return int(limit_gb * 2**30), int(limit_gb * 2**30)
    free = comfy.model_management.get_total_memory(device) if device.type != "cpu" else 0
    host = int(comfy.model_management.get_free_memory(torch.device("cpu")) / 2)
    return (int(free / 2) if free else host), host


def empty_latent(model: Any, width: int, height: int, frames: int) -> Tensor:
    """An empty latent of the right rank and channels for this model.

    Raises:
        IncompatibleError: The model's latents are no images or videos.
    """
    form = model.get_model_object("latent_format")
    if form.latent_dimensions not in (2, 3):
        raise IncompatibleError("this model's latents are no images.", remedy="connect a LATENT.")
    time = [max(1, (frames - 1) // form.temporal_downscale_ratio + 1)] if form.latent_dimensions == 3 else []
    space = [max(1, size // form.spacial_downscale_ratio) for size in (height, width)]
    return prepare_latent(model, {"samples": torch.zeros(1, form.latent_channels, *time, *space)})


def prepare_latent(model: Any, latent: Mapping[str, Any]) -> Tensor:
    """The samples of a LATENT, fixed for this model the way KSampler does it."""
    return comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    )


def shared_noise(latent: Tensor, seed: int) -> Tensor:
    """The noise that KSampler makes from this seed; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return comfy.sample.prepare_noise(latent, seed)


def step_sigmas(model: Any, scheduler: str, steps: int) -> Tensor:
    """Sigmas of a short sampling, (steps + 1,); the last one is not evaluated."""
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


@contextmanager
def text_rows(clip: Any, tell: Callable[[TextRows], None]) -> Iterator[list[Tensor]]:
    """While prompts are encoded: tell which rows of each text encoder's input are padding.

    Yields:
        The masks, (sections, T) bool, one for each encoder run.
    """
    masks: list[Tensor] = []

    def before(module: Any, args: tuple[Any, ...]) -> None:
        tokens = args[0]
        device = module.execution_device or module.transformer.get_input_embeddings().weight.device
        mask = module.process_tokens(tokens, device)[1].bool()
        tell(TextRows(mask, everywhere=True))
        masks.append(mask.cpu())

    encoders = [m for m in clip.cond_stage_model.modules() if isinstance(m, comfy.sd1_clip.SDClipModel)]
    handles = [encoder.register_forward_pre_hook(before) for encoder in encoders]
    try:
        yield masks
    finally:
        for handle in handles:
            handle.remove()


def encode(clip: Any, prompt: str) -> list[Any]:
    """A prompt as CONDITIONING."""
    return list(clip.encode_from_tokens_scheduled(clip.tokenize(prompt), show_pbar=False))


def run_calibration_pass(
    model: Any,
    conditioning: list[Any],
    tap: Tap,
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


def make_room(size: int, device: torch.device) -> None:
    """Let ComfyUI move models off the device until `size` bytes are free."""
    if device.type != "cpu":
        comfy.model_management.free_memory(size, device)


class Progress:
    """One progress bar with latent previews; every update is a chance to cancel."""

    _SCALE = 1000

    def __init__(self, model: Any) -> None:
        self._bar = comfy.utils.ProgressBar(self._SCALE)
        self._begin, self._end, self._units, self._done = 0.0, 1.0, 1, 0
        self._previewer = latent_preview.get_previewer(model.load_device, model.get_model_object("latent_format"))

    def stage(self, begin: float, end: float, units: int) -> None:
        """The coming `units` steps fill the bar from `begin` to `end` (shares of 1)."""
        self._begin, self._end, self._units, self._done = begin, end, max(1, units), 0

    @property
    def reached(self) -> float:
        """Share of the bar that is filled."""
        return self._begin + (self._end - self._begin) * min(1.0, self._done / self._units)

    def at(self, share: float) -> None:
        """Fill the bar up to a share of 1."""
        self.stage(share, 1.0, 1)
        self.step(0)

    def step(self, count: int = 1, x0: Tensor | None = None) -> None:
        """Advance by `count` units, showing `x0` if previews are on."""
        check_cancel()
        self._done += count
        preview = None
        if x0 is not None and self._previewer is not None:
            shown = x0.tensors[0] if getattr(x0, "is_nested", False) else x0
            preview = self._previewer.decode_latent_to_preview_image("JPEG", shown)
        self._bar.update_absolute(int(self._SCALE * self.reached), None, preview)


def check_cancel() -> None:
    """Raise ComfyUI's own exception if the user pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def is_out_of_memory(err: BaseException) -> bool:
    """Whether the host counts an exception as out of memory."""
    return bool(comfy.model_management.is_oom(err))


def output_directory() -> Path:
    """ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory()).resolve()


def numbered_file(prefix: str, root: Path, suffix: str) -> Path:
    """A new file below `root`, numbered like ComfyUI's own files; its folder is made."""
    directory, name, counter, _, _ = folder_paths.get_save_image_path(prefix, str(root))
    return Path(directory) / f"{name}_{counter:05}_{suffix}"


def lora_adapter(layer: LoRALayer) -> LoRAAdapter:
    """A low-rank change as the host's own weight patch."""
    up, down = layer.up, layer.down
    if layer.kernel:
        down = down.reshape(layer.rank, -1, *layer.kernel)
        up = up.reshape(*up.shape, *(1 for _ in layer.kernel))
    return LoRAAdapter(set(), (up, down, layer.alpha, None, None, None))


def read_patches(tensors: Mapping[str, Tensor], core: CoreKeyMap) -> dict[Any, Any]:
    """Patches by host key, as ComfyUI's LoRA loader makes them."""
    return dict(comfy.lora.load_lora(dict(tensors), dict(core), log_missing=False))


def load_file(path: Path) -> dict[str, Tensor]:
    """A LoRA file as ComfyUI's LoraLoader reads it."""
    return convert_names(comfy.utils.load_torch_file(str(path), safe_load=True))
