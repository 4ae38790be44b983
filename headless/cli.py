"""Arguments, messages and exit codes of the command."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..ssr_core import OSRMRecipe, Recipe

OK, FAILED, MISUSED, INTERRUPTED, STOPPED = 0, 1, 2, 130, 143

_EPILOG = """\
exit codes: 0 done; 1 it failed (the message says where and what to do; nothing half-written is left);
2 wrong arguments or a wrong recipe; 130 Ctrl-C; 143 stopped by a signal, e.g. because another process failed.

examples:
  python headless --example > recipe.json
  python headless recipe.json --comfyui ~/ComfyUI --output merged.safetensors
  python headless merged.safetensors --comfyui ~/ComfyUI          make a merged file again from its metadata
  torchrun --nproc-per-node 4 headless recipe.json --comfyui ~/ComfyUI       share the passes
  python headless recipe.json --comfyui ~/ComfyUI -- --cpu        ComfyUI's own options come after --
  python headless osrm.json --comfyui ~/ComfyUI         a recipe with osrm_init or osrm_refit: docs/headless.md

docs/headless.md describes recipes; docs/recipe.schema.json is their schema."""

_NO_CLIP = "A recipe names clip and clip_type beside unet in its model, or give --clip and --clip-type."
_OTHER = "choose another --output."

EXAMPLE = {
    "model": {"checkpoint": "sd_xl_base_1.0.safetensors"},
    "sources": [
        {"name": "dog.safetensors", "strength_model": 1.0, "prompts": ["a photo of sks dog"]},
        {"name": "cat.safetensors", "strength_model": 0.8, "prompts": ["a photo of zwx cat"]},
    ],
    "method": "ssr",
    "parameters": {"ridge": 0.01},
    "calibration": {"settings": {"seed": 0, "steps": 4, "width": 512, "height": 512}},
    "key_style": "comfy",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="headless",
        description="Merges LoRAs by a recipe with a ComfyUI installation, without its server: calibrates, merges, "
        "reports, saves. The same recipe is in the metadata of every merged file. Also makes starts for training (OSRM "
        "Init) and refits LoRAs (OSRM Refit).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("recipe", nargs="?", type=Path, help="a recipe (JSON), or a merged .safetensors that is to be made again")
    add("--comfyui", metavar="PATH", help="folder with ComfyUI's main.py; default: $COMFYUI_PATH, or around the pack")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="merged file, OSRM Init's start, or folder of refit LoRAs; default: numbered in output/loras",
    )
    add("--overwrite", action="store_true", help="replace the output, its reports and the saved calibration")
    add("--save-calibration", type=Path, metavar="FILE", help="keep the calibration")
    add(
        "--again",
        action="store_true",
        help="insist that the recipe is a merged file, and fail if it comes out otherwise (beyond rounding)",
    )
    add("--trust-graph", action="store_true", help="run any node and custom node pack that a merged file's graph names")
    add(
        "--patience",
        type=_hours,
        metavar="HOURS",
        help="under torchrun: how long to wait for a process that hangs, or whose machine is gone; default: 12",
    )
    add("--check", action="store_true", help="only check the recipe")
    add("--example", action="store_true", help="print an example recipe")
    add("--quiet", action="store_true", help="no progress bar")
    model = made.add_argument_group("model", "replaces what the recipe says, or says what a file's metadata lacks")
    model.add_argument("--checkpoint", metavar="NAME", help="file in ComfyUI's checkpoints folder")
    model.add_argument("--unet", metavar="NAME", help="file in ComfyUI's diffusion_models folder")
    model.add_argument(
        "--clip", metavar="NAME", action="append", help="text encoder of --unet; again for each of several"
    )
    model.add_argument("--clip-type", metavar="TYPE", help="its type, as in ComfyUI's CLIP loader")
    return made


def _hours(text: str) -> timedelta:
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0 < hours <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of hours above 0, at most 10000")
    return timedelta(hours=hours)


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit code."""
    arguments = list(arguments)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    made = parser()
    given = made.parse_args(arguments[:at])
    if given.example:
        print(json.dumps(EXAMPLE, indent=2))  # noqa: T201
        return OK
    if given.recipe is None:
        made.print_usage(sys.stderr)
        _say("a recipe is missing; --help says more.")
        return MISUSED
    _one_gpu_each()
    signal.signal(signal.SIGTERM, _stop)
    try:
        return _run(given, arguments[at + 1 :])
    except KeyboardInterrupt:
        _say("interrupted; no file is half-written.")
        return INTERRUPTED
    except _Stopped:
        _say(f"{_who()}stopped by a signal, as when another process failed; no file is half-written.")
        return STOPPED


class _Stopped(BaseException):
    """SIGTERM: cleans up like Ctrl-C does."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped


def _one_gpu_each() -> None:
    """Under torchrun every process has a GPU of its own; to be said before torch is imported."""
    if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    local, visible = int(os.environ["LOCAL_RANK"]), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(local)
    elif visible:
        devices = visible.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local % len(devices)]


def _who() -> str:
    return f"process {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _say(text: str) -> None:
    print(text if text.startswith("SSR-Merge") else f"SSR-Merge: {text}", file=sys.stderr, flush=True)  # noqa: T201


def _is_merge(given: argparse.Namespace) -> bool:
    return bool(given.recipe.suffix.lower() == ".safetensors")


def _recipe(given: argparse.Namespace) -> Recipe | OSRMRecipe:
    """What is to be made, with what the options replace.

    Raises:
        SSRMergeError: It cannot be read, or does not go with the options.
    """
    from ..ssr_core import FileError, check_graph, read_any

    again = _is_merge(given)
    if given.again and not again:
        raise FileError("--again takes a merged .safetensors.", file=str(given.recipe))
    if given.output is not None and given.output.resolve() == given.recipe.resolve():
        raise FileError("the output would replace what it is made from.", file=str(given.output), remedy=_OTHER)
    recipe = read_any(given.recipe)
    options = {name: getattr(given, name) for name in ("checkpoint", "unet", "clip", "clip_type")}
    named = {name: value for name, value in options.items() if value is not None}
    if named and {"checkpoint", "unet"}.isdisjoint(named) and "unet" in recipe.model:
        named = {"unet": recipe.model["unet"], **named}  # a text encoder alone joins the recipe's own model
    recipe = replace(recipe, model=named) if named else recipe
    if again and not given.trust_graph:
        check_graph(recipe.model, given.recipe.name)
    if given.save_calibration is not None and not _makes_calibration(recipe):
        remedy = "leave --save-calibration out."
        raise FileError("this recipe makes no calibration.", file=str(given.recipe), remedy=remedy)
    return recipe


def _makes_calibration(recipe: Recipe | OSRMRecipe) -> bool:
    """Whether passes are run for a merge, or their records put together."""
    from ..ssr_core import OSRMRecipe

    if isinstance(recipe, OSRMRecipe) or recipe.calibration_file is not None:
        return False
    return recipe.settings is not None or bool(recipe.runs) or recipe.records is not None


def _run(given: argparse.Namespace, host_options: Sequence[str]) -> int:
    from ..ssr_core import OSRMRecipe, SSRMergeError, joined
    from ..ssr_core.errors import ClipMissingError
    from . import installation

    first = os.environ.get("RANK", "0") == "0"
    try:
        recipe = _recipe(given)
        again = _is_merge(given)
        if given.check:
            _say("the recipe is right.")
            return OK
        checkout = installation.find(given.comfyui)
    except SSRMergeError as err:
        _say(str(err))
        return MISUSED
    try:
        started = installation.start(checkout, host_options)
        from . import work

        gpu = None if "--cpu" not in host_options else False
        waiting = () if given.patience is None else (given.patience,)
        with _bar(started, shown=first and not given.quiet), joined(gpu, *waiting) as ranks:
            wanted = work.Wanted(given.output, given.overwrite, given.save_calibration, given.recipe.absolute().parent)
            if isinstance(recipe, OSRMRecipe):
                from . import osrm

                paths, remarks = osrm.carry_out(recipe, wanted, ranks)
            else:
                paths, remarks = work.carry_out(recipe, wanted, ranks)
                remarks = [*recipe.remarks, *remarks]
        for remark in remarks if first else ():
            _say(remark)
        for path in paths:
            print(path)  # noqa: T201
        if again and paths:
            _compare(given, paths[0])
    except SSRMergeError as err:
        _say(f"{err} {_NO_CLIP}" if isinstance(err, ClipMissingError) else str(err))
        return FAILED
    return OK


def _compare(given: argparse.Namespace, made: Path) -> None:
    """Say how far a merge made again is from the file that it was made from.

    Raises:
        FileError: Further than rounding, where --again insists.
    """
    from ..ssr_core import FileError, largest_difference, rounding

    difference, allowed = largest_difference(given.recipe, made), rounding(given.recipe)
    _say(f"largest relative difference to {given.recipe.name}: {difference:.1e}")
    if given.again and not difference <= allowed:
        remedy = "compare model, LoRAs and versions with those of then, or leave --again out."
        raise FileError(f"it is another merge: rounding is at most {allowed:.1e}.", file=str(made), remedy=remedy)


class _bar:  # noqa: N801
    """A tqdm bar that follows ComfyUI's progress."""

    def __init__(self, started: object, shown: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=100, unit="%", disable=not shown, bar_format="{l_bar}{bar}| {elapsed}<{remaining}")
        started.show_progress(self._tell)  # type: ignore[attr-defined]

    def _tell(self, done: int, total: int) -> None:
        self._bar.update(max(0.0, 100 * done / max(1, total) - self._bar.n))

    def __enter__(self) -> _bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
