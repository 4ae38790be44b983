"""On quantised bases the merged LoRA acts in full: every layer adds what the saved LoRA says, base untouched."""

import statistics

import pytest

from .quantised import STORED, measure

FULL = [(case, kind) for case in ("flux-fused-split", "wan21") for kind in STORED]
CONVOLUTIONS = [(case, f"unscaled_fp8_{d}") for case in ("sdxl-convolutions", "sd15-convolutions") for d in ("e4m3fn",)]

# What patching weights loses at least in the median layer; measured, then halved.
LOST_BY_WEIGHTS = dict.fromkeys(STORED, 0.003) | {"packed": 0.0}


@pytest.mark.parametrize(("case", "kind"), FULL + CONVOLUTIONS)
def test_forward_adds_the_lora_exactly_and_weights_do_not(server, base, case, kind):
    forward = measure(server, base, case, kind, "forward")
    weights = measure(server, base, case, kind, "weights")
    assert forward.errors.keys() >= forward.deltas.keys()  # no layer slips by, called by weight or not
    worst = max(forward.errors.items(), key=lambda item: item[1])
    print(f"{case} {kind}: forward {worst[1]:.1e}, weights {statistics.median(weights.errors.values()):.1e}")
    assert worst[1] < 1e-5, worst
    assert not forward.changed and forward.hooks == 0
    assert statistics.median(weights.errors.values()) >= LOST_BY_WEIGHTS[kind]
