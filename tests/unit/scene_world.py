"""Three LoRAs on one layer, with joint and neutral prompts; and the router by lstsq."""

import torch
from helpers import (
    F64,
    LAYER,
    conflicting_tasks,
    factors_of,
    linear64,
    svd_coordinates,
    task_tokens,
)
from torch import nn

from ssr_core import (
    Scene,
    SSRMerge,
    build_stacks,
    calibrate,
    merge,
)

IN, OUT, RANK, K = 14, 9, 2, 3
TASKS = conflicting_tasks(K, OUT, IN, RANK)
SCENES = (Scene("both", (0, 1)), Scene("everyone", (0, 1, 2)), Scene("nobody"))
TOKENS = [task_tokens(k, 30 + k, IN) for k in range(K)]
SEEN = [task_tokens(50 + j, 20 + 3 * j, IN) for j in range(len(SCENES))]


def calibrated(tokens=TOKENS, seen=SEEN, scenes=SCENES, tasks=TASKS, **more):
    module = linear64(IN, OUT)
    return calibrate(
        nn.ModuleDict({"layer": module}),
        tasks,
        build_stacks(tasks),
        lambda index, tap: module(tokens[index]),
        scenes=scenes,
        run_scene=lambda number, tap: module(seen[number]),
        **more,
    )


def merged(calibration, method=None, tasks=TASKS):
    result = merge(tasks, method or SSRMerge(refine=False), calibration, dtype=F64)
    return result.layers[LAYER].delta(F64), result.report


def masses(scenes, count, joint=SSRMerge.joint_weight, neutral=SSRMerge.neutral_weight):
    """What each pass weighs: the LoRAs' own, then the scenes'."""
    silent = sum(not scene.tasks for scene in scenes)
    return [1.0] * count + [joint * len(one.tasks) if one.tasks else neutral * count / silent for one in scenes]


def least_squares(tokens, seen, scenes, ridge=0.01, tasks=TASKS, **weights):
    """The router by lstsq over all passes; `ridge` of the mean signal pulls toward the plain sum."""
    coordinates = [svd_coordinates(*pair) for pair in factors_of(tasks)]
    basis, ups = torch.cat([v for v, _ in coordinates]), torch.cat([b for _, b in coordinates], dim=1)
    owner = torch.cat([torch.full((len(v),), k) for k, (v, _) in enumerate(coordinates)])
    passes = [(x, (k,)) for k, x in enumerate(tokens)]
    passes += [(x, scene.tasks) for x, scene in zip(seen, scenes, strict=True)]
    left, right = [], []
    for (x, acting), mass in zip(passes, masses(scenes, len(tokens), **weights), strict=True):
        z = x @ basis.T * (mass / len(x)) ** 0.5
        left.append(z)
        right.append(z * torch.isin(owner, torch.tensor(acting, dtype=torch.int64)))
    mu = ridge * sum(z.square().sum() for z in left) / len(basis)
    left.append(mu.sqrt() * torch.eye(len(basis), dtype=F64))
    right.append(left[-1])
    router = torch.linalg.lstsq(torch.cat(left), torch.cat(right)).solution.T
    return ups @ router @ basis
