"""Files that do not fit or are broken are refused, with file and layer in the message."""

import math

import pytest
import torch
from helpers import randn

from ssr_core import IncompatibleError, KeyTarget, Target, read_adapter

OUT, IN, RANK = 6, 8, 3
KEYS = {
    **{f"b{i}": KeyTarget(Target(f"b{i}"), (OUT, IN)) for i in range(4)},
    "norm": KeyTarget(Target("norm"), (OUT,)),
    "conv": KeyTarget(Target("conv"), (OUT, 4, 3, 3)),
}
UP, DOWN = randn(1, OUT, RANK), randn(2, RANK, IN)


def pair(base, up=UP, down=DOWN):
    return {f"{base}.lora_up.weight": up, f"{base}.lora_down.weight": down}


def refused(tensors):
    with pytest.raises(IncompatibleError) as caught:
        read_adapter(tensors, KEYS, name="my_file", fingerprint="hash")
    assert caught.value.file == "my_file" and "my_file" in str(caught.value)
    return caught.value


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["up", "down"])
def test_values_that_are_not_finite(role, bad):
    tensors = pair("b0", UP.clone(), DOWN.clone())
    tensors[f"b0.lora_{role}.weight"][1, 1] = bad
    assert f"b0.lora_{role}.weight" in str(refused(tensors))


@pytest.mark.parametrize("alpha", [torch.tensor(math.nan), torch.tensor(math.inf), torch.ones(2)])
def test_alpha_that_is_not_one_finite_number(alpha):
    assert "b0.alpha" in str(refused({**pair("b0"), "b0.alpha": alpha}))


def test_vector_with_nan():
    assert "norm.diff" in str(refused({**pair("b0"), "norm.diff": torch.full((OUT,), math.nan)}))


def test_integer_factors():
    assert "int" in str(refused(pair("b0", UP.to(torch.int32))))


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (randn(1, OUT + 1, RANK), DOWN),
        (UP, randn(1, RANK, IN - 1)),
        (UP, randn(1, RANK + 1, IN)),
        (UP.T.contiguous(), DOWN),
        (UP, DOWN.T.contiguous()),
    ],
)
def test_wrong_shapes_name_the_layer(up, down):
    error = refused({**pair("b1"), **pair("b0", up, down)})
    assert error.layer == "b0" and str(tuple(up.shape)) in str(error) and str(tuple(down.shape)) in str(error)


@pytest.mark.parametrize("role", ["up", "down"])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_factors_that_are_no_matrices(role, shape):
    tensors = pair("b0")
    tensors[f"b0.lora_{role}.weight"] = torch.ones(shape)
    assert refused(tensors).layer == "b0"


@pytest.mark.parametrize("alpha", [True, False])
def test_rank_zero(alpha):
    tensors = pair("b0", torch.zeros(OUT, 0), torch.zeros(0, IN))
    if alpha:
        tensors["b0.alpha"] = torch.tensor(1.0)
    assert refused(tensors).layer == "b0"


@pytest.mark.parametrize(
    ("down", "mid"),
    [
        (randn(1, RANK, 4, 1, 1), randn(2, RANK, RANK + 1, 3, 3)),
        (randn(1, RANK, 4, 1, 1), randn(2, RANK)),
        (randn(1, RANK, 4, 1, 1), randn(2, RANK, RANK, 3)),
        (randn(1, RANK), randn(2, RANK, RANK, 3, 3)),
        (randn(1, RANK, 4, 3, 3), randn(2, RANK, RANK, 3, 3)),
    ],
)
def test_tucker_cores_that_do_not_fit(down, mid):
    tensors = {**pair("conv", randn(3, OUT, RANK, 1, 1), down), "conv.lora_mid.weight": mid}
    refused(tensors)


@pytest.mark.parametrize("suffix", [".diff", ".diff_b"])
def test_vectors_of_the_wrong_length(suffix):
    assert refused({**pair("b0"), "norm" + suffix: torch.ones(OUT + 1)}).layer == "norm"


def test_wrong_base_model_says_how_many_layers_match_and_names_one():
    tensors = {**pair("b0"), **{k: v for i in range(3) for k, v in pair(f"down_blocks.{i}.attn").items()}}
    message = str(refused(tensors))
    assert "1 of its 4 layers" in message and "down_blocks.0.attn" in message


def test_exactly_half_of_the_layers_is_enough():
    tensors = {**pair("b0"), **pair("b1"), **pair("zz.0"), **pair("zz.1")}
    assert len(read_adapter(tensors, KEYS, name="f", fingerprint="h").layers) == 2
    refused({**tensors, **pair("zz.2")})


def test_no_layer_at_all():
    refused({"whatever": torch.ones(2)})
    refused({})
