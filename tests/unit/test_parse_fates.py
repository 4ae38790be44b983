"""Keys that are not simply low-rank: unsupported with a reason, shadowed, unmatched."""

import pytest
import torch
from helpers import randn

from ssr_core import KeyTarget, Target, read_adapter

OUT, IN, RANK = 6, 8, 3
FC = KeyTarget(Target("fc"), (OUT, IN))
KEYS = {"lora_unet_fc": FC, "diffusion_model.fc": FC, "ok": KeyTarget(Target("ok"), (OUT, IN))}
UP, DOWN = randn(1, OUT, RANK), randn(2, RANK, IN)
GOOD = {"ok.lora_B.weight": UP, "ok.lora_A.weight": DOWN}


def records(tensors, keys=KEYS):
    adapter = read_adapter(tensors, keys, name="file", fingerprint="hash")
    assert [record.key for record in adapter.records] == list(tensors)
    return adapter, {record.key: record for record in adapter.records}


UNSUPPORTED = {
    "LoHa": {f"lora_unet_fc.hada_{n}": torch.ones(2, 2) for n in ("w1_a", "w1_b", "w2_a", "w2_b")},
    "LoKr": {"lora_unet_fc.lokr_w1": torch.ones(2, 2), "lora_unet_fc.lokr_w2_a": torch.ones(2, 2)},
    "GLoRA": {"lora_unet_fc.a1.weight": torch.ones(2, 2), "lora_unet_fc.b1.weight": torch.ones(2, 2)},
    "OFT": {"lora_unet_fc.oft_blocks": torch.ones(2, 2, 2), "lora_unet_fc.rescale": torch.ones(2)},
    "DoRA": {"lora_unet_fc.lora_up.weight": UP, "lora_unet_fc.lora_down.weight": DOWN, "lora_unet_fc.dora_scale": UP},
    "shape": {
        "lora_unet_fc.lora_up.weight": UP,
        "lora_unet_fc.lora_down.weight": DOWN,
        "lora_unet_fc.reshape_weight": torch.ones(2),
    },
    "full difference": {"lora_unet_fc.diff": torch.ones(OUT, IN)},
    "replacement": {"lora_unet_fc.set_weight": torch.ones(OUT, IN)},
    "missing": {"lora_unet_fc.lora_up.weight": UP, "lora_unet_fc.alpha": torch.tensor(1.0)},
    "missing ": {"lora_unet_fc.lora_mid.weight": torch.ones(2, 2, 1, 1)},
    "several spellings": {"lora_unet_fc.lora_up.weight": UP, "lora_unet_fc.lora_A.weight": DOWN},
    "several ways": {
        "lora_unet_fc.lora_up.weight": UP,
        "lora_unet_fc.lora_down.weight": DOWN,
        "lora_unet_fc.diff": torch.ones(OUT, IN),
    },
}


def test_an_alpha_without_factors_is_reported_and_refuses_nothing():
    """Tools that prune layers leave it behind; ComfyUI's loader passes over it."""
    adapter, by_key = records({"lora_unet_fc.alpha": torch.tensor(1.0), **GOOD})
    assert set(adapter.layers) == {Target("ok")} and not adapter.keys_with("unsupported")
    record = by_key["lora_unet_fc.alpha"]
    assert (record.status, record.reason) == ("unmatched", "alpha without factors")


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_unsupported_with_a_reason_and_not_merged(reason):
    tensors = {**UNSUPPORTED[reason], **GOOD}
    adapter, by_key = records(tensors)
    assert set(adapter.layers) == {Target("ok")}
    for key in UNSUPPORTED[reason]:
        assert by_key[key].status == "unsupported" and by_key[key].target == Target("fc")
        assert reason.strip() in by_key[key].reason
    assert {by_key[key].status for key in GOOD} == {"low_rank"}


def test_low_rank_factors_of_a_vector_are_unsupported():
    keys = {"norm": KeyTarget(Target("norm"), (OUT,)), **KEYS}
    tensors = {"norm.lora_up.weight": UP, "norm.lora_down.weight": DOWN, **GOOD}
    assert records(tensors, keys)[1]["norm.lora_up.weight"].status == "unsupported"


def test_biases_of_slices_add_up_to_one_bias():
    """ComfyUI makes a nonsense key of them; here each lands in its rows."""
    keys = {name: KeyTarget(Target("qkv", (2 * i, 2)), (OUT, IN)) for i, name in enumerate(("to_q", "to_k", "to_v"))}
    tensors = {"to_q.diff_b": torch.tensor([1.0, 2.0]), "to_v.diff_b": torch.tensor([3.0, 4.0]), **GOOD}
    adapter, by_key = records(tensors, keys | KEYS)
    assert by_key["to_q.diff_b"].status == by_key["to_v.diff_b"].status == "vector"
    assert torch.equal(adapter.vectors[(Target("qkv"), "bias")], torch.tensor([1.0, 2.0, 0.0, 0.0, 3.0, 4.0]))


def test_the_bias_of_lora_b_is_scaled_like_its_output():
    """peft with lora_bias: y += scale * (B A x + b)."""
    tensors = {
        "lora_unet_fc.lora_B.weight": UP,
        "lora_unet_fc.lora_A.weight": DOWN,
        "lora_unet_fc.lora_B.bias": torch.arange(OUT, dtype=torch.float64),
        "lora_unet_fc.alpha": torch.tensor(6.0),
        **GOOD,
    }
    adapter, by_key = records(tensors)
    assert by_key["lora_unet_fc.lora_B.bias"].status == "vector"
    assert torch.equal(adapter.vectors[(Target("fc"), "bias")], 6.0 / RANK * torch.arange(OUT, dtype=torch.float64))


def test_an_alpha_beside_a_vector_is_accounted_for():
    tensors = {"lora_unet_fc.diff_b": torch.ones(OUT), "lora_unet_fc.alpha": torch.tensor(1.0), **GOOD}
    by_key = records(tensors)[1]
    assert by_key["lora_unet_fc.diff_b"].status == "vector" and by_key["lora_unet_fc.alpha"].status == "unmatched"


def test_two_names_of_one_layer_the_later_name_of_the_model_wins():
    """As in the host, which walks its key map in order and lets later entries overwrite."""
    tensors = {
        "diffusion_model.fc.lora_B.weight": 2 * UP,
        "diffusion_model.fc.lora_A.weight": DOWN,
        "lora_unet_fc.lora_up.weight": UP,
        "lora_unet_fc.lora_down.weight": DOWN,
        **GOOD,
    }
    adapter, by_key = records(tensors)
    assert torch.equal(adapter.layers[Target("fc")].up, 2 * UP)
    for key in ("lora_unet_fc.lora_up.weight", "lora_unet_fc.lora_down.weight"):
        assert by_key[key].status == "shadowed" and "diffusion_model.fc" in by_key[key].reason
    assert by_key["diffusion_model.fc.lora_B.weight"].status == "low_rank"


def test_the_alpha_of_a_shadowed_layer_is_shadowed_too():
    tensors = {
        "lora_unet_fc.lora_up.weight": UP,
        "lora_unet_fc.lora_down.weight": DOWN,
        "lora_unet_fc.alpha": torch.tensor(1.0),
        "diffusion_model.fc.lora_B.weight": UP,
        "diffusion_model.fc.lora_A.weight": DOWN,
        **GOOD,
    }
    adapter, by_key = records(tensors)
    assert adapter.layers[Target("fc")].alpha is None
    assert by_key["lora_unet_fc.alpha"].status == "shadowed"


def test_a_shadowed_vector_has_its_reason():
    adapter, by_key = records(
        {"lora_unet_fc.diff_b": torch.ones(OUT), "diffusion_model.fc.diff_b": torch.zeros(OUT), **GOOD}
    )
    assert by_key["lora_unet_fc.diff_b"].status == "shadowed"
    assert torch.equal(adapter.vectors[(Target("fc"), "bias")], torch.zeros(OUT))


def test_names_that_the_model_lacks():
    tensors = {"other.lora_B.weight": UP, "other.lora_A.weight": DOWN, "what.is_this": torch.ones(1), **GOOD}
    adapter, by_key = records(tensors)
    assert by_key["other.lora_B.weight"].status == "unmatched" and "no layer" in by_key["other.lora_B.weight"].reason
    assert by_key["what.is_this"].status == "unmatched" and "format" in by_key["what.is_this"].reason
    assert [record.key for record in adapter.keys_with("unmatched")] == list(tensors)[:3]


@pytest.mark.parametrize("base", ["lora_te1_text_model_fc", "text_encoder.fc", "text_encoders.t5.fc", "lora_te_fc"])
def test_text_encoder_keys_without_clip_are_unmatched_and_do_not_count_as_a_misfit(base):
    many = {f"{base}{i}.lora_{x}.weight": t for i in range(9) for x, t in (("up", UP), ("down", DOWN))}
    adapter, by_key = records({**many, **GOOD})
    assert set(adapter.layers) == {Target("ok")}
    assert all("no CLIP" in by_key[key].reason for key in many)


def test_text_encoder_keys_with_clip_are_layers_of_their_part():
    clip = Target("t5.fc", part="clip")
    keys = {"text_encoders.t5.fc": KeyTarget(clip, (OUT, IN)), **KEYS}
    adapter, _ = records(
        {"text_encoders.t5.fc.lora_B.weight": UP, "text_encoders.t5.fc.lora_A.weight": DOWN, **GOOD}, keys
    )
    assert set(adapter.layers) == {clip, Target("ok")}


def test_both_kinds_of_bias_of_one_layer_add_up():
    tensors = {
        "lora_unet_fc.lora_B.weight": UP,
        "lora_unet_fc.lora_A.weight": DOWN,
        "lora_unet_fc.lora_B.bias": torch.full((OUT,), 4.0),
        "lora_unet_fc.diff_b": torch.ones(OUT),
        **GOOD,
    }
    adapter, by_key = records(tensors)
    assert by_key["lora_unet_fc.diff_b"].status == by_key["lora_unet_fc.lora_B.bias"].status == "vector"
    assert torch.equal(adapter.vectors[(Target("fc"), "bias")], torch.full((OUT,), 5.0, dtype=torch.float32))


def test_a_refused_alias_replaces_the_one_before_it():
    """The host keeps the last name of a layer, whether or not it is one that can be merged."""
    tensors = {
        "lora_unet_fc.lora_up.weight": UP,
        "lora_unet_fc.lora_down.weight": DOWN,
        "diffusion_model.fc.lora_up.weight": UP,
        "diffusion_model.fc.lora_down.weight": DOWN,
        "diffusion_model.fc.diff": torch.ones(OUT, IN),
        **GOOD,
    }
    adapter, by_key = records(tensors)
    assert Target("fc") not in adapter.layers
    assert by_key["lora_unet_fc.lora_up.weight"].status == "shadowed"
    assert by_key["diffusion_model.fc.diff"].status == "unsupported"
