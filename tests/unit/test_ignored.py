"""Parameters that the host never patches: their keys are listed with the reason, not counted as summed."""

import torch
from helpers import randn

from ssr_core import KeyTarget, SumMerge, Target, Task, merge, read_adapter

WHY = "the host never applies it"


def test_a_change_of_an_ignored_parameter_is_reported_and_not_merged():
    keys = {
        "fc": KeyTarget(Target("fc"), (6, 8)),
        "block.modulation": KeyTarget(Target("block"), (1, 6), None, "modulation", ignored=WHY),
    }
    tensors = {
        "fc.lora_B.weight": randn(1, 6, 2),
        "fc.lora_A.weight": randn(2, 2, 8),
        "block.modulation.diff": torch.ones(1, 6),
    }
    adapter = read_adapter(tensors, keys, name="file", fingerprint="hash")
    assert not adapter.vectors and not adapter.dense
    result = merge([Task(adapter)], SumMerge())
    account = result.report.files[0]
    assert account.fates == {"passed_through": 2, "unmatched": 1}
    assert account.details == (("block.modulation.diff", "unmatched", WHY),)
    assert any(WHY in warning for warning in result.report.warnings)
