"""Names under prefixes that the host's own table does not have."""

import pytest
import torch
from helpers import randn

from ssr_core import IncompatibleError, KeyTarget, Target, read_adapter
from ssr_core.naming import NameIndex

OUT, IN, RANK = 6, 8, 3
UP, DOWN = randn(1, OUT, RANK), randn(2, RANK, IN)
QKV = Target("blocks.0.attn.qkv")
KEYS = {
    "lora_unet_blocks_0_attn_qkv": KeyTarget(QKV, (3 * OUT, IN)),
    "diffusion_model.blocks.0.attn.qkv": KeyTarget(QKV, (3 * OUT, IN)),
    "transformer.layers.0.to_q": KeyTarget(Target("blocks.0.attn.qkv", (0, OUT)), (3 * OUT, IN)),
    "transformer.proj_out": KeyTarget(Target("final"), (OUT, IN)),
    "diffusion_model.proj.out": KeyTarget(Target("other"), (OUT, IN)),
    "lora_te_proj_in": KeyTarget(Target("te.proj", part="clip"), (OUT, IN)),
}


def read(base, rows=OUT):
    up = randn(3, rows, RANK)
    tensors = {f"{base}.lora_B.weight": up, f"{base}.lora_A.weight": DOWN}
    return up, read_adapter(tensors, KEYS, name="file", fingerprint="hash")


@pytest.mark.parametrize(
    "base",
    [
        "blocks.0.attn.qkv",
        "transformer.blocks.0.attn.qkv",
        "base_model.model.blocks.0.attn.qkv",
        "base_model.model.diffusion_model.blocks.0.attn.qkv",
        "lycoris_blocks_0_attn_qkv",
        "unet.blocks.0.attn.qkv",
    ],
)
def test_the_same_path_under_another_prefix_is_the_same_layer(base):
    up, adapter = read(base, 3 * OUT)
    assert torch.equal(adapter.layers[QKV].up, up)
    assert {record.loader_key.partition(".lora_")[0] for record in adapter.records} <= KEYS.keys()


@pytest.mark.parametrize("base", ["lora_unet_layers_0_to_q", "diffusion_model.layers.0.to_q", "layers.0.to_q"])
def test_rows_of_a_fused_module_too(base):
    assert set(read(base)[1].layers) == {Target("blocks.0.attn.qkv", (0, OUT))}


def test_a_name_of_the_host_comes_first():
    _, adapter = read("transformer.proj_out")
    assert set(adapter.layers) == {Target("final")}
    assert [record.loader_key for record in adapter.records] == [record.key for record in adapter.records]


@pytest.mark.parametrize("base", ["proj_out", "lora_unet_proj_out", "lycoris_proj_out"])
def test_a_path_of_two_layers_is_nobodys(base):
    """`proj_out` and `proj.out` are the same path once dots are underscores."""
    with pytest.raises(IncompatibleError, match="only 0 of its 1 layers"):
        read(base)


@pytest.mark.parametrize("base", ["proj_in", "lora_unet_proj_in", "text_encoder.proj.in"])
def test_text_encoders_and_models_are_not_mixed_up(base):
    with pytest.raises(IncompatibleError):
        read(base)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("base_model.model.fc", "fc"),
        ("base_model.model.attn.to_q", "base_model.model.attn.to_q"),
        ("fc", "fc"),
        ("base_model.model.unknown", None),
    ],
)
def test_pefts_prefix_goes_only_where_the_model_has_no_name_with_it(base, expected):
    """Some families (SD3, PixArt) have names that begin with it."""
    keys = {"fc": KeyTarget(Target("fc"), (OUT, IN)), "base_model.model.attn.to_q": KeyTarget(Target("q"), (OUT, IN))}
    assert NameIndex(keys).find(base) == expected
