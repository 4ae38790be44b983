"""What a refit keeps and leaves on noise it was not fitted on; `-s` prints the table of docs/benchmarks/osrm.md."""

import pytest
from safetensors.torch import load_file

from .merging import SEED, MergeGraph
from .osrm import FAMILIES, deltas, record
from .reference import Recording
from .test_osrm_refit import refit, refit_loras

SETTINGS = {
    "contrast": {},
    "contrast, ridge 0.001": {"ridge": 0.001},
    "project": {"mode": "project"},
    "analytic": {"mode": "analytic"},
}


def moments(base, prefix):
    recording = Recording(base, prefix)

    def of(name):
        x = recording.rows(name)
        return x.T @ x / len(x)

    return of


def median(values):
    return sorted(values)[len(values) // 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_contrast_keeps_most_and_leaves_little(server, base, family):
    tasks = refit_loras(base, family)
    seen = {}
    for noise in (SEED, SEED + 1):
        for index, task in enumerate(tasks):
            prefix = f"heldout_{family}_{noise}_{index}"
            record(server, family, task.text_seed, prefix, (task.file.name, task.strength), noise)
            seen[noise, index] = moments(base, prefix)
    result = {}
    for number, (setting, options) in enumerate(SETTINGS.items()):
        graph = MergeGraph(server)
        node = refit(server, graph, family, tasks, **options)
        graph.pack("SSRSaveLoRA", lora=node.out(1), filename_prefix=f"loras/heldout_{family}_{number}")
        server.run(graph.prompt).ok()
        files = sorted((base / "output" / "loras").glob(f"heldout_{family}_{number}_*.safetensors"))
        for noise in (SEED, SEED + 1):
            kept, left = [], []
            for index, (task, path) in enumerate(zip(tasks, files, strict=True)):
                for name, new in deltas(load_file(path)).items():
                    old = task.file.truth[name].delta.flatten(1)
                    own, other, change = seen[noise, index](name), seen[noise, 1 - index](name), new - old
                    kept.append(1 - float((change @ own * change).sum() / (old @ own * old).sum()))
                    left.append(float((new @ other * new).sum() / (old @ other * old).sum()))
            result[setting, noise] = median(kept), median(left)
        (a, b), (c, d) = result[setting, SEED], result[setting, SEED + 1]
        print(f"\n| {family} | {setting} | {a:.3f} | {b:.3f} | {c:.3f} | {d:.3f} |", end="")
    kept, left = result["contrast", SEED + 1]
    assert kept > 0.8 and left < 0.35
    assert kept > result["project", SEED + 1][0] > result["analytic", SEED + 1][0]
    assert result["analytic", SEED][0] < 0.2  # blind to what the LoRA reads
