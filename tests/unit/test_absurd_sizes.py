"""Small files that would make the host allocate terabytes are refused while they are read, from shapes alone."""

import math
import random
import time

import pytest
import torch
from helpers import randn, rel
from perturbations import KINDS

from ssr_core import IncompatibleError, KeyTarget, Target, read_adapter
from ssr_core.intermediates import largest_intermediate

OUT, IN, HUGE = 32, 24, 50_000
KEYS = {
    "fc": KeyTarget(Target("fc"), (OUT, IN)),
    "conv": KeyTarget(Target("conv"), (OUT, 8, 3, 3)),
    "big": KeyTarget(Target("big"), (400, 300)),
}


def ones(*shape):
    """Takes no memory however large it is."""
    return torch.ones(()).expand(shape)


ABSURD = {
    "loha": {"hada_w1_a": ones(HUGE, 1), "hada_w1_b": ones(1, HUGE), "hada_w2_a": ones(8, 1), "hada_w2_b": ones(1, 8)},
    "loha core": {
        **{f"hada_t{i}": ones(1, 1, 3, 3) for i in (1, 2)},
        **{f"hada_w{i}_a": ones(1, HUGE) for i in (1, 2)},
        **{f"hada_w{i}_b": ones(1, HUGE) for i in (1, 2)},
    },
    "loha core's own ranks": {
        **{f"hada_t{i}": ones(HUGE, 1, 1, 1) for i in (1, 2)},
        **{f"hada_w{i}_a": ones(HUGE, 1) for i in (1, 2)},
        **{f"hada_w{i}_b": ones(1, HUGE) for i in (1, 2)},
    },
    "lokr": {"lokr_w1": ones(HUGE, 1), "lokr_w2": ones(1, HUGE)},
    "lokr factors": {"lokr_w1_a": ones(HUGE, 1), "lokr_w1_b": ones(1, HUGE), "lokr_w2": ones(2, 2)},
    "lokr that cancels out": {"lokr_w1_a": ones(HUGE, 0), "lokr_w1_b": ones(0, HUGE), "lokr_w2": ones(2, 2)},
    "glora": {
        "a1.weight": ones(IN, 2),
        "a2.weight": ones(2, IN),
        "b1.weight": ones(HUGE, 1),
        "b2.weight": ones(1, HUGE),
    },
    "glora of old": {
        "a1.weight": ones(2, IN),
        "a2.weight": ones(IN, 2),
        "b1.weight": ones(1, HUGE),
        "b2.weight": ones(HUGE, 1),
    },
    "glora on the weight": {
        "a1.weight": ones(1, HUGE),
        "a2.weight": ones(HUGE, 1),
        "b1.weight": ones(2, IN),
        "b2.weight": ones(OUT, 2),
    },
    "dora": {"lora_up.weight": ones(HUGE, 1), "lora_down.weight": ones(1, HUGE), "dora_scale": ones(OUT, 1)},
    "dora scale": {"lora_up.weight": ones(OUT, 1), "lora_down.weight": ones(1, IN), "dora_scale": ones(HUGE, OUT, 1)},
    "oft": {"oft_blocks": ones(1, HUGE, 1)},
    "boft": {"oft_blocks": ones(1, 1, HUGE, 1), "alpha": torch.tensor(0.0)},
    "boft rescale": {"oft_blocks": ones(1, 8, 4, 4), "rescale": ones(HUGE, 1, 1), "alpha": torch.tensor(0.0)},
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_products_are_refused_at_once(name):
    tensors = {f"fc.{suffix}": value for suffix, value in ABSURD[name].items()}
    start = time.monotonic()
    with pytest.raises(IncompatibleError) as caught:
        read_adapter(tensors, KEYS, name="file", fingerprint="h")
    assert time.monotonic() - start < 5
    assert caught.value.file == "file" and caught.value.layer == "fc" and "values" in str(caught.value)


@pytest.mark.parametrize("base", KEYS)
@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "glora", "oft", "boft", "difference"])
def test_sound_files_need_no_more_than_the_weight(kind, base):
    rng, shape = random.Random(3), KEYS[base].weight_shape
    for _ in range(30):
        tensors = {f"{base}{suffix}": value for suffix, value in KINDS[kind](rng, shape).items()}
        size = math.prod(shape)
        assert 0 < largest_intermediate(tensors, shape) <= size or kind in ("oft", "boft")
        adapter = read_adapter(tensors, KEYS, name="file", fingerprint="h")
        assert len(adapter.dense) == 1


def pair(down, mid, up=None):
    up = randn(3, OUT, 2, 1, 1) if up is None else up
    return {"conv.lora_up.weight": up, "conv.lora_down.weight": down, "conv.lora_mid.weight": mid}


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.bfloat16, torch.float64)])
def test_a_tucker_core_of_another_dtype(dtypes):
    down, mid = randn(1, 2, 8, 1, 1).to(dtypes[0]), randn(2, 2, 2, 3, 3).to(dtypes[1])
    adapter = read_adapter(pair(down, mid), KEYS, name="file", fingerprint="h")
    expected = torch.einsum("oa,abkl,bi->oikl", randn(3, OUT, 2), mid.double(), down.double()[:, :, 0, 0])
    assert rel(adapter.layers[Target("conv")].delta(), expected.flatten(1)) < 1e-6


@pytest.mark.parametrize(
    "tensors",
    [
        pair(randn(1, 2, 0, 1, 1), randn(2, 2, 2, 3, 3)),
        pair(randn(1, 0, 8, 1, 1), randn(2, 0, 0, 3, 3), randn(3, OUT, 0, 1, 1)),
        pair(ones(1, HUGE, 1, 1), ones(1, 1, HUGE, 100), ones(OUT, 1, 1, 1)),
        pair(60000 * torch.ones(2, 8, 1, 1).half(), 60000 * torch.ones(2, 2, 3, 3).half()),
    ],
    ids=["no columns", "no rank", "absurd", "overflow"],
)
def test_tucker_cores_that_cannot_be_folded(tensors):
    with pytest.raises(IncompatibleError, match=r"conv\.lora_mid") as caught:
        read_adapter(tensors, KEYS, name="file", fingerprint="h")
    assert caught.value.file == "file"


@pytest.mark.parametrize("blocks", [1, 4])
def test_rotations_of_all_rows_are_no_absurdity(blocks):
    """OFT on a layer of many rows and few inputs (a patch embedding): the rotation is larger than the weight."""
    keys = {"tall": KeyTarget(Target("tall"), (96, 4))}
    tensors = {"tall.oft_blocks": torch.zeros(blocks, 96 // blocks, 96 // blocks)}
    adapter = read_adapter(tensors, keys, name="file", fingerprint="1")
    assert [group.kind for group in adapter.dense] == ["OFT"]
