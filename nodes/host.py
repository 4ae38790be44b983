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

from ..ssr_core import FileError, IncompatibleError, KeyTarget, LoRALayer, MergeResult, Part, Tap, Target, TextRows
from .model_info import key_target, root_of, weight_shapes
from .sampling import evaluate

CoreKeyMap = Mapping[str, Any]
"""Base name in a LoRA file -> key as ComfyUI's `add_patches` takes it (a string or a tuple)."""

CALIBRATION_FOLDER, CALIBRATION_SUFFIX = "calibrations", ".calibration.safetensors"

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
        shapes = weight_shapes(root_of(part, owner))
        for name, key in names.items():
            entry = key_target(part, key, shapes)
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


def output_path(prefix: str, suffix: str, folder: str = "") -> Path:
    """A new file below the output folder, numbered like ComfyUI's own files.

    Args:
        prefix: What the user typed: a name, possibly with folders.
        suffix: End of the file name.
        folder: Folder of the output folder that it is confined to.

    Raises:
        FileError: The prefix leads outside.
    """
    root = (Path(folder_paths.get_output_directory()) / folder).resolve()
    cleaned = prefix.replace("\\", "/").strip()
    if not cleaned or cleaned.endswith("/") or not (root / cleaned).resolve().is_relative_to(root):
        raise FileError(
            "the name leads outside the output folder.", file=prefix, remedy="use a name like loras/merged."
        )
    directory, name, counter, _, _ = folder_paths.get_save_image_path(cleaned, str(root))
    return Path(directory) / f"{name}_{counter:05}_{suffix}"


def _calibration_root() -> Path:
    return Path(folder_paths.get_output_directory(), CALIBRATION_FOLDER).resolve()


def calibration_files() -> list[str]:
    """Saved calibrations, by name below their folder."""
    root = _calibration_root()
    return sorted(str(path.relative_to(root).as_posix()) for path in root.rglob(f"*{CALIBRATION_SUFFIX}"))


def calibration_path(name: str) -> Path:
    """Full path of a listed calibration; confined to its folder."""
    root = _calibration_root()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise FileError("the name leads outside the output folder.", file=name)
    return path


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
        with tap.attached(executor.class_obj.model_patcher.model), _layers_called_as_modules():
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
def _layers_called_as_modules() -> Iterator[None]:
    """INT8 models hand some layers' weights to a fused kernel; for the block they are called, so that hooks fire."""
    original = getattr(comfy.ops, "linear_input_act", None)
    if original is None:  # ComfyUI before 0.27
        yield
        return
    comfy.ops.linear_input_act = lambda linear, x, act: linear(comfy.ops.INPUT_ACT_EAGER[act](x))
    try:
        yield
    finally:
        comfy.ops.linear_input_act = original


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


def apply(owner: Any, part: Part, result: MergeResult) -> Any:
    """A clone of MODEL or CLIP with the merged adapter as ordinary weight patches.

    Raises:
        IncompatibleError: The host did not take a patch.
    """
    clone = owner.clone()
    patches: dict[Any, Any] = {}
    for target, layer in result.layers.items():
        if target.part == part:
            patches[_patch_key(target, "weight")] = _host_adapter(layer)
    for (target, parameter), value in result.vectors.items():
        if target.part == part:
            patches[_patch_key(target, parameter)] = ("diff", (value,))
    taken = set(clone.add_patches(patches, 1.0))
    refused = [key for key in patches if key not in taken]
    if refused:
        raise IncompatibleError("the model has no such parameter.", layer=str(refused[0]))
    return clone


def _patch_key(target: Target, parameter: str) -> Any:
    key = f"{target.module_path}.{parameter}"
    return key if target.out_slice is None else (key, (0, *target.out_slice))


def _host_adapter(layer: LoRALayer) -> LoRAAdapter:
    up, down = layer.up, layer.down
    if layer.kernel:
        down = down.reshape(layer.rank, -1, *layer.kernel)
        up = up.reshape(*up.shape, *(1 for _ in layer.kernel))
    return LoRAAdapter(set(), (up, down, layer.alpha, None, None, None))


def apply_host_patches(
    owner: Any, tensors: Mapping[str, Tensor], names: Iterable[str], strength: float, core: CoreKeyMap
) -> Any:
    """A clone with some keys of a LoRA file as the host's own patches (DoRA, LoHa and the like).

    Raises:
        IncompatibleError: The host itself cannot apply one of the keys.
    """
    chosen = {name.removeprefix("base_model.model."): tensors[name] for name in names}
    try:
        patches = comfy.lora.load_lora(chosen, dict(core), log_missing=False)
    except KeyError as err:
        raise IncompatibleError(
            f"{err.args[0]} is missing beside its partner.", remedy="export the LoRA again, or leave it out."
        ) from err
    clone = owner.clone()
    taken = set(clone.add_patches(patches, strength))
    lost = _unused(chosen, patches) + [str(key) for key in patches if key not in taken]
    if lost:
        raise IncompatibleError(
            f"ComfyUI itself cannot apply {lost[0]}.", remedy="leave this LoRA out, or remove these keys from it."
        )
    return clone


def with_vectors(owner: Any, vectors: Mapping[tuple[Target, str], Tensor], strength: float) -> Any:
    """A clone with changes of biases and norms as weight patches."""
    clone = owner.clone()
    clone.add_patches({_patch_key(*key): ("diff", (value,)) for key, value in vectors.items()}, strength)
    return clone


def _unused(tensors: Mapping[str, Tensor], patches: Mapping[Any, Any]) -> list[str]:
    """Keys of a file that no patch was made from."""
    used = {name for patch in patches.values() for name in getattr(patch, "loaded_keys", ())}
    plain = (".diff", ".diff_b", ".w_norm", ".b_norm", ".set_weight")
    count = sum(isinstance(patch, tuple) for patch in patches.values())
    vectors = [name for name in tensors if name.endswith(plain) and name not in used]
    lost = [name for name in tensors if name not in used and name not in vectors]
    return lost + vectors[count:]


def reload_patches(path: Path, core: CoreKeyMap) -> tuple[dict[Any, Any], list[str]]:
    """Load a LoRA file the way ComfyUI's LoraLoader does.

    Returns:
        Patches by host key, and the keys that the loader did not take.
    """
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    converted = comfy.lora_convert.convert_lora(tensors)
    patches = comfy.lora.load_lora(converted, dict(core), log_missing=False)
    return patches, _unused(converted, patches)
