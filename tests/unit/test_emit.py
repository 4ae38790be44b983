"""A written LoRA, read again, is the same LoRA in every key style."""

import pytest
import torch
from helpers import F64, dense_by_module, lora, randn, rel, task

from ssr_core import (
    KEY_STYLES,
    IncompatibleError,
    KeyTarget,
    LoRALayer,
    SumMerge,
    Target,
    merge,
    read_adapter,
    to_tensors,
)
from ssr_core.merge import MergeResult

IN = 6
QKV, FC, CONV, MOD, NORM = Target("blk.qkv"), Target("blk.fc"), Target("conv"), Target("final.mod"), Target("norm")
CONV1D, CONV3D, TE = Target("c1"), Target("c3"), Target("t5.fc", part="clip")
SHAPES = {
    QKV: (12, IN),
    FC: (8, IN),
    CONV: (5, 3, 3, 3),
    CONV1D: (4, 3, 3),
    CONV3D: (4, 2, 1, 3, 2),
    MOD: (8, IN),
    TE: (8, IN),
}
ROWS = {target.module_path: shape[0] for target, shape in SHAPES.items()}
ORDER = (6, 7, 0, 1, 2, 3, 4, 5)  # not its own inverse
Q, K, V = (Target("blk.qkv", (4 * i, 4)) for i in range(3))


def names():
    found = {}
    for target, shape in SHAPES.items():
        if target.part == "clip":
            found["lora_te1_t5_fc"] = found["text_encoders.t5.fc"] = KeyTarget(target, shape)
            continue
        found["lora_unet_" + target.module_path.replace(".", "_")] = KeyTarget(target, shape)
        found["diffusion_model." + target.module_path] = KeyTarget(target, shape)
        if target not in (QKV, MOD):
            found["transformer." + target.module_path] = KeyTarget(target, shape)
    for letter, part in zip("qkv", (Q, K, V), strict=True):
        found[f"transformer.blk.to_{letter}"] = KeyTarget(part, SHAPES[QKV])
    found["transformer.norm_out.linear"] = KeyTarget(MOD, SHAPES[MOD], ORDER)
    for prefix in ("lora_unet_norm", "diffusion_model.norm", "transformer.norm"):
        found[prefix] = KeyTarget(NORM, (5,))
    return found


NAMES = names()


def layer_of(target, seed, rank=2, **more):
    shape = SHAPES[target]
    width = torch.Size(shape[1:]).numel()
    return lora(seed, shape[0], width, rank, kernel=shape[2:], **more)


def whole_result(dtype=F64, alpha=3.0):
    layers = {t: layer_of(t, i, alpha=alpha, dtype=dtype) for i, t in enumerate(SHAPES)}
    vectors = {
        (NORM, "weight"): randn(1, 5, dtype=dtype),
        (NORM, "bias"): randn(2, 5, dtype=dtype),
        (FC, "bias"): randn(3, 8, dtype=dtype),
        (MOD, "bias"): randn(4, 8, dtype=dtype),
    }
    return merge([task("a", layers, vectors=vectors, strength=0.5, clip=0.5)], SumMerge())


def reread(tensors):
    return read_adapter(tensors, NAMES, name="again", fingerprint="")


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("style", KEY_STYLES)
def test_round_trip_of_every_kind_of_layer(style, dtype, alpha):
    result = whole_result(dtype, alpha)
    tensors = to_tensors(result, NAMES, style)
    again = reread(tensors)
    assert {record.status for record in again.records} <= {"low_rank", "vector"}
    expected, got = dense_by_module(result.layers, ROWS), dense_by_module(again.layers, ROWS)
    assert expected.keys() == got.keys()
    for path in expected:
        assert rel(got[path], expected[path]) < 1e-6  # alpha is stored in float32
    assert again.vectors.keys() == result.vectors.keys()
    assert all(torch.equal(again.vectors[key], value) for key, value in result.vectors.items())
    assert {t.dtype for key, t in tensors.items() if not key.endswith(".alpha")} == {dtype}


@pytest.mark.parametrize("style", KEY_STYLES)
def test_names_suffixes_and_shapes_of_the_style(style):
    tensors = to_tensors(whole_result(), NAMES, style)
    suffixes = (
        (".lora_B.weight", ".lora_A.weight") if style == "diffusers" else (".lora_up.weight", ".lora_down.weight")
    )
    model_prefix = {"comfy": "diffusion_model.", "kohya": "lora_unet_", "diffusers": "transformer."}[style]
    for key, tensor in tensors.items():
        base = next(key.removesuffix(s) for s in (*suffixes, ".alpha", ".diff_b", ".diff") if key.endswith(s))
        assert base in NAMES
        entry = NAMES[base]
        if entry.target.part == "model":
            # ComfyUI drops a bias under a name of reordered rows: such a one gets ComfyUI's own name
            reordered = key.endswith(".diff_b") and base.startswith("diffusion_model.")
            assert base.startswith(model_prefix) or reordered
            assert not (key.endswith(".diff_b") and entry.row_order)
        else:
            assert base == ("lora_te1_t5_fc" if style == "kohya" else "text_encoders.t5.fc")
        kernel = entry.weight_shape[2:]
        if key.endswith(suffixes[0]):
            assert tuple(tensor.shape) == (entry.out_features, 2, *(1 for _ in kernel))
        if key.endswith(suffixes[1]):
            assert tuple(tensor.shape) == (2, *entry.weight_shape[1:])


@pytest.mark.parametrize("style", KEY_STYLES)
def test_no_two_tensors_share_memory(style):
    tensors = to_tensors(whole_result(), NAMES, style)
    pointers = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    assert len(set(pointers)) == len(pointers)
    assert all(
        t.is_contiguous() and t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors.values()
    )


@pytest.mark.parametrize("style", KEY_STYLES)
@pytest.mark.parametrize("present", [(Q, K, V), (K,), (Q, V)])
def test_slices_of_a_fused_layer(style, present):
    layers = {t: lora(i, 4, IN, 2, alpha=1.0) for i, t in enumerate(present)}
    result = merge([task("a", layers, strength=-0.75)], SumMerge())
    again = reread(to_tensors(result, NAMES, style))
    expected, got = dense_by_module(result.layers, ROWS), dense_by_module(again.layers, ROWS)
    assert rel(got["blk.qkv"], expected["blk.qkv"]) < 1e-6
    assert set(again.layers) == (set(present) if style == "diffusers" else {QKV})


def test_row_order_is_undone_on_writing():
    result = MergeResult({MOD: layer_of(MOD, 1)}, {}, None)
    tensors = to_tensors(result, NAMES, "diffusers")
    file_delta = (
        tensors["transformer.norm_out.linear.lora_B.weight"] @ tensors["transformer.norm_out.linear.lora_A.weight"]
    )
    for weight_row, file_row in enumerate(ORDER):
        assert torch.allclose(result.layers[MOD].delta()[weight_row], file_delta[file_row], rtol=1e-13)


@pytest.mark.parametrize("style", KEY_STYLES)
def test_passing_through_keeps_the_tensors_and_puts_the_strength_into_alpha(style):
    layer = layer_of(FC, 1, rank=4, alpha=2.0, dtype=torch.float16)
    result = merge([task("a", {FC: layer}, strength=-0.5)], SumMerge())
    tensors = to_tensors(result, NAMES, style)
    downs = [t for key, t in tensors.items() if "down" in key or "lora_A" in key]
    ups = [t for key, t in tensors.items() if "up" in key or "lora_B" in key]
    assert torch.equal(downs[0], layer.down) and torch.equal(ups[0], layer.up)
    assert [float(t) for key, t in tensors.items() if key.endswith(".alpha")] == [-1.0]
    assert torch.equal(reread(tensors).layers[FC].delta(), -0.5 * layer.delta())


@pytest.mark.parametrize("style", KEY_STYLES)
def test_merged_layers_of_two_files(style):
    a, b = ({t: layer_of(t, 10 * k + i, rank=k + 1) for i, t in enumerate(SHAPES)} for k in range(2))
    result = merge([task("a", a, strength=0.3, clip=0.3), task("b", b, strength=2.0, clip=2.0)], SumMerge())
    got = dense_by_module(reread(to_tensors(result, NAMES, style)).layers, ROWS)
    dense_a, dense_b = dense_by_module(a, ROWS), dense_by_module(b, ROWS)
    for path in dense_a:
        assert rel(got[path], 0.3 * dense_a[path] + 2.0 * dense_b[path]) < 1e-6


@pytest.mark.parametrize("target", [CONV, Q])
def test_a_style_that_lacks_a_name_is_an_error_that_names_the_layer(target):
    poor = {name: entry for name, entry in NAMES.items() if not name.startswith("transformer.")}
    layer = layer_of(CONV, 1) if target == CONV else lora(1, 4, IN, 2)
    with pytest.raises(IncompatibleError, match="diffusers") as caught:
        to_tensors(MergeResult({target: layer}, {}, None), poor, "diffusers")
    assert caught.value.layer == str(target) and "comfy" in caught.value.remedy


def test_a_vector_without_a_name_of_the_style_is_an_error_that_names_the_layer():
    poor = {name: entry for name, entry in NAMES.items() if entry.target != NORM}
    with pytest.raises(IncompatibleError) as caught:
        to_tensors(MergeResult({}, {(NORM, "weight"): torch.ones(5)}, None), poor, "comfy")
    assert caught.value.layer == "norm"


def test_a_parameter_with_a_name_of_its_own():
    keys = {**NAMES, "diffusion_model.norm.scale": KeyTarget(NORM, (5,), parameter="scale")}
    value = randn(1, 5)
    tensors = to_tensors(MergeResult({}, {(NORM, "scale"): value}, None), keys, "comfy")
    assert list(tensors) == ["diffusion_model.norm.scale.diff"]
    tensors = {**tensors, **to_tensors(MergeResult({FC: layer_of(FC, 1)}, {}, None), keys)}
    again = read_adapter(tensors, keys, name="a", fingerprint="")
    assert torch.equal(again.vectors[(NORM, "scale")], value)


def test_slices_that_no_name_tiles_are_written_as_one_layer_with_their_alphas():
    layers = {
        Q: lora(1, 4, IN, 2, alpha=5.0),
        Target("blk.qkv", (4, 8)): LoRALayer(randn(2, 3, IN), randn(3, 8, 3), 0.5),
    }
    tensors = to_tensors(MergeResult(layers, {}, None), NAMES, "kohya")
    got = dense_by_module(reread(tensors).layers, ROWS)["blk.qkv"]
    assert rel(got, dense_by_module(layers, ROWS)["blk.qkv"]) < 1e-12
