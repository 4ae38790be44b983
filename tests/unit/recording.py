"""Records in a small world of their own: a module, LoRAs on it, passes, a library."""

from dataclasses import replace

import torch
from helpers import decaying, linear64, lora, randn, task
from torch import nn

from ssr_core import (
    KeyTarget,
    RecordIdentity,
    RecordLibrary,
    RecordOptions,
    Share,
    Target,
    build_stacks,
    calibrate,
    record,
    records_of,
)

WIDE, OUT = 60, 8
SETTINGS = {"seed": 7, "sigmas": [1.0], "latent": [1, 4, 8, 8], "padding": "balance"}
NAMES = ("q", "k", "v", "o")


class Attention(nn.Module):
    """q, k, v of one tensor; o of another."""

    def __init__(self, width=WIDE):
        super().__init__()
        for number, name in enumerate(NAMES):
            layer = linear64(width, OUT if name == "o" else width)
            layer.weight.data.copy_(randn(50 + number, *layer.weight.shape) / width**0.5)
            setattr(self, name, layer)

    def forward(self, x):
        return self.o(self.q(x) + self.k(x) + self.v(x))


def key_map(width=WIDE):
    return {name: KeyTarget(Target(name), (OUT if name == "o" else width, width)) for name in NAMES}


def recorded_tasks(count, rank=3, width=WIDE, names=NAMES):
    return [
        task(
            f"lora{k}",
            {Target(n): lora(10 * k + i, OUT if n == "o" else width, width, rank) for i, n in enumerate(names)},
        )
        for k in range(count)
    ]


def tokens(seed, count=200, width=WIDE, rate=0.9):
    return decaying(1000 + 10 * seed, count, width, rate)


def identity_of(one, **changes):
    record_of = records_of([one])[0]
    return replace(RecordIdentity(record_of, "model-id", "", SETTINGS), **changes)


def record_all(tmp_path, model, tasks, inputs, options=None, library=None):
    """One record for each task and each of its inputs; prompts are numbered."""
    options = options or RecordOptions(columns=8, exact_limit=0, sampled_tokens=16)
    library = library or RecordLibrary(tmp_path / "records")
    shares = []
    for one, mine in zip(tasks, inputs, strict=True):
        shares.append([])
        for prompt, x in zip(one.prompts, mine, strict=True):
            single = replace(one, prompts=(prompt,))
            layers = record(model, single, key_map(x.shape[-1]), lambda tap, x=x: model(x), options)
            shares[-1].append(Share(library.save(identity_of(single), options, layers)))
    return shares, library


def exact_calibration(model, tasks, inputs, sample=None):
    def run_pass(index, tap):
        for x in inputs[index]:
            model(x)

    return calibrate(model, tasks, build_stacks(tasks), run_pass, sample=sample)


def smallest_eigenvalue(gram):
    return float(torch.linalg.eigvalsh(gram.double()).min() / gram.double().diagonal().abs().max())
