"""Every spelling of every trainer gives the same delta, and every key its record."""

import pytest
import torch
from helpers import F64, randn, rel
from torch import nn

from ssr_core import KeyTarget, Target, host_key, read_adapter

SPELLINGS = {
    "kohya": (".lora_up.weight", ".lora_down.weight"),
    "attention processor": ("_lora.up.weight", "_lora.down.weight"),
    "peft": (".lora_B.weight", ".lora_A.weight"),
    "diffusers": (".lora.up.weight", ".lora.down.weight"),
    "mochi": (".lora_B", ".lora_A"),
    "transformers": (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    "peft default": (".lora_B.default.weight", ".lora_A.default.weight"),
}
OUT, IN, RANK = 6, 8, 3
KEYS = {"blocks.0.fc": KeyTarget(Target("blocks.0.fc"), (OUT, IN))}
DOWN, UP = randn(1, RANK, IN), randn(2, OUT, RANK)


def read(tensors, keys=KEYS):
    adapter = read_adapter(tensors, keys, name="file", fingerprint="hash")
    assert [record.key for record in adapter.records] == list(tensors)  # each key exactly once, in order
    return adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling, alpha, dtype):
    up, down = SPELLINGS[spelling]
    tensors = {"blocks.0.fc" + up: UP.to(dtype), "blocks.0.fc" + down: DOWN.to(dtype)}
    if alpha is not None:
        tensors["blocks.0.fc.alpha"] = torch.tensor(alpha)
    adapter = read(tensors)
    expected = UP.to(dtype).double() @ DOWN.to(dtype).double() * (1 if alpha is None else alpha / RANK)
    assert rel(adapter.layers[Target("blocks.0.fc")].delta(), expected) < 1e-14
    assert adapter.layers[Target("blocks.0.fc")].down.dtype == dtype
    assert {record.status for record in adapter.records} == {"low_rank"}
    assert (adapter.name, adapter.fingerprint) == ("file", "hash")


def test_float8_factors_are_widened_exactly():
    up, down = UP.to(torch.float8_e4m3fn), DOWN.to(torch.float8_e4m3fn)
    adapter = read({"blocks.0.fc.lora_B.weight": up, "blocks.0.fc.lora_A.weight": down})
    expected = up.to(F64) @ down.to(F64)
    assert rel(adapter.layers[Target("blocks.0.fc")].delta(), expected) < 1e-14


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_peft_prefix(prefix):
    adapter = read({f"{prefix}blocks.0.fc.lora_B.weight": UP, f"{prefix}blocks.0.fc.lora_A.weight": DOWN})
    assert rel(adapter.layers[Target("blocks.0.fc")].delta(), UP @ DOWN) < 1e-14


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("base_model.model.fc.hada_w1_a", "fc.hada_w1_a"),
        ("base_model.model.attn.to_q.dora_scale", "base_model.model.attn.to_q.dora_scale"),
        ("base_model.model.attn.to_q_lora.up.weight", "base_model.model.attn.to_q_lora.up.weight"),
        ("fc.lokr_w1", "fc.lokr_w1"),
        ("base_model.model.unknown.lokr_w1", "base_model.model.unknown.lokr_w1"),
        ("base_model.model.fc.not_a_suffix", "base_model.model.fc.not_a_suffix"),
    ],
)
def test_pefts_prefix_goes_only_where_the_model_has_no_name_with_it(key, expected):
    """Some families (SD3, PixArt) have names that begin with it."""
    assert host_key(key, {"fc": 1, "base_model.model.attn.to_q": 2}) == expected


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("flat", [True, False])
def test_convolutions_act_as_up_after_down(dims, flat):
    """The delta is the kernel of the composed convolution: checked on data."""
    kernel, conv = (3, 2, 2)[:dims], (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[dims - 1]
    down, up = randn(3, RANK, 4, *kernel), randn(4, OUT, RANK, *(1 for _ in kernel))
    keys = {"c": KeyTarget(Target("c"), (OUT, 4, *kernel))}
    tensors = {"c.lora_up.weight": up, "c.lora_down.weight": down.flatten(1) if flat else down}
    layer = read(tensors, keys).layers[Target("c")]
    assert layer.kernel == kernel
    x = randn(5, 2, 4, *(5 for _ in kernel))
    assert rel(conv(x, layer.delta().reshape(OUT, 4, *kernel)), conv(conv(x, down), up)) < 1e-13


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_tucker_core_equals_the_dense_einsum_and_three_convolutions(alpha):
    down, mid, up = randn(3, RANK, 4, 1, 1), randn(4, RANK, RANK, 3, 3), randn(5, OUT, RANK, 1, 1)
    keys = {"c": KeyTarget(Target("c"), (OUT, 4, 3, 3))}
    tensors = {"c.lora_up.weight": up, "c.lora_down.weight": down, "c.lora_mid.weight": mid}
    if alpha:
        tensors["c.alpha"] = torch.tensor(alpha)
    scale = 1 if alpha is None else alpha / RANK
    adapter = read(tensors, keys)
    delta = adapter.layers[Target("c")].delta().reshape(OUT, 4, 3, 3)
    dense = torch.einsum("oa,abkl,bi->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    assert rel(delta, scale * dense) < 1e-13
    x, conv = randn(6, 1, 4, 6, 6), nn.functional.conv2d
    assert rel(conv(x, delta), scale * conv(conv(conv(x, down), mid), up)) < 1e-13
    assert {record.status for record in adapter.records} == {"low_rank"}


def test_row_order_says_which_file_row_is_which_weight_row():
    order = (4, 5, 0, 1, 2, 3)  # not its own inverse
    keys = {"norm.linear": KeyTarget(Target("mod"), (OUT, IN), order)}
    delta = (
        read({"norm.linear.lora_B.weight": UP, "norm.linear.lora_A.weight": DOWN}, keys).layers[Target("mod")].delta()
    )
    file_delta = UP @ DOWN
    for i, row in enumerate(order):
        assert torch.allclose(delta[i], file_delta[row], rtol=1e-14)


def test_bias_rows_follow_the_row_order_or_are_refused():
    order = (4, 5, 0, 1, 2, 3)
    keys = {"norm.linear": KeyTarget(Target("mod"), (OUT, IN), order)}
    bias = torch.arange(6.0)
    adapter = read(
        {"norm.linear.lora_B.weight": UP, "norm.linear.lora_A.weight": DOWN, "norm.linear.diff_b": bias}, keys
    )
    if adapter.records[2].status == "vector":
        assert torch.equal(adapter.vectors[(Target("mod"), "bias")], bias[list(order)])
    else:
        assert adapter.records[2].status == "unsupported"


def test_slices_of_a_fused_layer():
    keys = {f"to_{c}": KeyTarget(Target("qkv", (2 * i, 2)), (OUT, IN)) for i, c in enumerate("qkv")}
    tensors = {}
    for i, c in enumerate("qkv"):
        tensors[f"to_{c}.lora_B.weight"], tensors[f"to_{c}.lora_A.weight"] = UP[2 * i : 2 * i + 2], DOWN * (i + 1)
    layers = read(tensors, keys).layers
    for i in range(3):
        assert rel(layers[Target("qkv", (2 * i, 2))].delta(), UP[2 * i : 2 * i + 2] @ DOWN * (i + 1)) < 1e-14


def test_vectors_are_read_by_parameter():
    keys = {
        "norm": KeyTarget(Target("norm"), (5,)),
        "norm.scale": KeyTarget(Target("norm"), (5,), parameter="scale"),
        **KEYS,
    }
    weight, bias, scale = randn(1, 5), randn(2, 5), randn(3, 5)
    fc_bias = randn(4, OUT)
    tensors = {"norm.w_norm": weight, "norm.b_norm": bias, "norm.scale.diff": scale, "blocks.0.fc.diff_b": fc_bias}
    adapter = read(tensors, keys)
    assert {record.status for record in adapter.records} == {"vector"}
    assert torch.equal(adapter.vectors[(Target("norm"), "weight")], weight)
    assert torch.equal(adapter.vectors[(Target("norm"), "bias")], bias)
    assert torch.equal(adapter.vectors[(Target("norm"), "scale")], scale)
    assert torch.equal(adapter.vectors[(Target("blocks.0.fc"), "bias")], fc_bias)
