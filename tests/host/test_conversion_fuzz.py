"""Broken adapter files through ComfyUI's own adapter classes: every key accounted for, or refused by name."""

import json
import random

import pytest
from perturbations import perturb, random_file
from safetensors.torch import save_file

from .adapter_files import layer_shapes
from .graphs import Graph
from .test_interrupt import state_of

FILES = 300
SLOW = 10.0


@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_broken_files(server, base, tmp_path, family):
    shapes = {name.replace("/", "."): shape for name, shape in layer_shapes(base, family).items()}
    done = {}
    for seed in range(FILES):
        rng = random.Random(f"{family}{seed}")
        damaged, changes = perturb(rng, random_file(rng, shapes))
        name = f"{family}_{seed:04}.safetensors"
        save_file(damaged, tmp_path / name)
        done[name] = changes
    before = state_of(server, family, f"fuzz_before_{family}")
    graph = Graph()
    node = graph.add("LoadEach", model=graph.checkpoint(family), folder=str(tmp_path), convert_rank=4)
    found = json.loads(server.run(graph.prompt, timeout=900).ok().text(node))
    assert len(found) == FILES
    wrong = {name: (one, done[name]) for name, one in found.items() if not _allowed(name, *one)}
    assert not wrong, "\n".join(f"{name}: {one}" for name, one in wrong.items())
    for status in ("loaded", "refused"):
        assert sum(one[0] == status for one in found.values()) > FILES // 10
    assert state_of(server, family, f"fuzz_after_{family}") == before


def _allowed(name, status, words, seconds):
    return seconds < SLOW and ((status == "loaded" and not words) or (status == "refused" and name in words))
