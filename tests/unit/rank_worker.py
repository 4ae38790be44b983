"""One process of a calibration that several share; started by test_ranks.py, and nothing else.

python rank_worker.py <folder for the answer> [lost] [stopped] [told] [sample] [scenes]
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from helpers import task  # noqa: E402

from demo.loras import SIGMA, noise, plant_loras, weight_of  # noqa: E402
from demo.model import StubTransformer  # noqa: E402
from ssr_core import (  # noqa: E402
    LoRALayer,
    SampleOptions,
    Scene,
    SSRMerge,
    SSRMergeError,
    Target,
    build_stacks,
    calibrate_sharded,
    joined,
    merge,
    save_calibration,
)
from ssr_core.ranks import PATIENCE  # noqa: E402

HUNG = timedelta(seconds=20)
"""How long the others wait for a process that hangs; starting all of them has to take less."""

SCENES = (Scene("a fox beside a cat", (0, 1)), Scene("an empty table"))
PROMPTS = (("a red fox", "a fox in snow", "fox"), ("a glass cat",), ("two teapots", "a teapot on a table"))


def world():
    """The stub transformer in float64, three LoRAs with unequal numbers of prompts."""
    model = StubTransformer(d=48, depth=1).double()
    planted = plant_loras(model.float(), [prompts[0] for prompts in PROMPTS], rank=3)
    model.double()
    layers = [
        {
            Target(path): LoRALayer(down.double(), up.double(), None, weight_of(model, path).shape[2:])
            for path, (down, up) in one.items()
        }
        for one in planted
    ]
    return model, [task(f"t{i}", one, prompts=PROMPTS[i]) for i, one in enumerate(layers)]


def calibration_of(ranks, before=lambda: None, sample=None, scenes=()):
    model, tasks = world()

    def run(index, prompt, tap):
        before()
        model(noise(7).double(), SIGMA, [tasks[index].prompts[prompt]])

    def run_scene(number, tap):
        model(noise(7).double(), SIGMA, [scenes[number].prompt])

    more = {"sample": sample, "scenes": scenes, "run_scene": run_scene}
    return tasks, calibrate_sharded(model, tasks, build_stacks(tasks), run, ranks, **more)


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)

    def leave():
        if "lost" in sys.argv and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if "stopped" in sys.argv and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)

    try:
        with joined(patience=HUNG if "stopped" in sys.argv else PATIENCE) as ranks:
            if "told" in sys.argv:
                words = "" if "nothing" in sys.argv else f"process {ranks.rank} says: größer"
                (folder / str(ranks.rank)).write_text(ranks.told(words), encoding="utf-8")
                return
            sample, scenes = SampleOptions(8) if "sample" in sys.argv else None, SCENES if "scenes" in sys.argv else ()
            tasks, calibration = calibration_of(ranks, leave, sample, scenes)
            result = merge(tasks, SSRMerge(), calibration)
            assert result.layers
            save_calibration(calibration, folder / f"rank{ranks.rank}.safetensors")
    except SSRMergeError as err:
        print(err, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
