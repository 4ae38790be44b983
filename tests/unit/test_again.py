"""Two merged files compared: by what their layers do, and what counts as rounding."""

import pytest
import torch
from helpers import randn

from ssr_core import FileError, largest_difference, rounding, write_safetensors


def written(path, up, down, **more):
    write_safetensors(
        path, {"a.lora_up.weight": up, "a.lora_down.weight": down, "a.alpha": torch.tensor(2.0), **more}, {}
    )
    return path


def test_other_factors_of_the_same_change_are_no_difference(tmp_path):
    up, down, turn = randn(0, 5, 2), randn(1, 2, 7), randn(2, 2, 2)
    one = written(tmp_path / "one.safetensors", up, down)
    turned = written(tmp_path / "turned.safetensors", up @ turn, torch.linalg.inv(turn) @ down)
    assert largest_difference(one, turned) < 1e-12
    assert largest_difference(one, written(tmp_path / "b.safetensors", 1.25 * up, down)) == pytest.approx(0.25)
    with pytest.raises(FileError, match="other tensors"):
        largest_difference(one, written(tmp_path / "c.safetensors", up, down, more=up.clone()))


def test_rounding_is_that_of_the_files_dtype(tmp_path):
    up, down = randn(0, 5, 2), randn(1, 2, 7)
    assert rounding(written(tmp_path / "a.safetensors", up, down)) == 1e-4
    half = written(tmp_path / "b.safetensors", up.bfloat16(), down.bfloat16())
    assert rounding(half) == 2 * torch.finfo(torch.bfloat16).eps
