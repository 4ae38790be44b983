"""Adapter files of every kind and spelling for a small model, and the ways in which strangers get them wrong.

Torch and the standard library only: the host's fuzz test writes files with it too.
"""

import math
import random
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

File = dict[str, Tensor]
Shape = tuple[int, ...]

PAIRS = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
)


def noise(rng: random.Random, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return 0.1 * torch.randn(shape, generator=generator)


def _split(number: int) -> tuple[int, int]:
    """A divisor and its partner, as LoKr and OFT cut an axis."""
    small = max(d for d in range(1, int(number**0.5) + 1) if number % d == 0)
    return small, number // small


def lora(rng: random.Random, shape: Shape) -> File:
    (out, *rest), rank = shape, rng.choice((1, 2, 4))
    up, down = rng.choice(PAIRS)
    ones = [1] * (len(shape) - 2)
    file = {up: noise(rng, out, rank, *ones), down: noise(rng, rank, *rest)}
    if len(shape) > 2 and up == ".lora_up.weight" and rng.random() < 0.5:
        file = {up: file[up], down: noise(rng, rank, rest[0], *ones)}
        file[".lora_mid.weight"] = noise(rng, rank, rank, *rest[1:])
    return file


def dora(rng: random.Random, shape: Shape) -> File:
    ones = [1] * (len(shape) - 2)
    scale = (shape[0], 1, *ones) if rng.random() < 0.5 else (1, shape[1], *ones)
    return {**rng.choice((lora, loha, lokr))(rng, shape), ".dora_scale": 1 + noise(rng, *scale)}


def loha(rng: random.Random, shape: Shape) -> File:
    (out, first, *kernel), rank = shape, rng.choice((1, 2, 4))
    if len(kernel) == 2 and rng.random() < 0.5:
        cores = {f".hada_t{i}": noise(rng, rank, rank, *kernel) for i in (1, 2)}
        sides = {f".hada_w{i}_a": noise(rng, rank, out) for i in (1, 2)}
        return {**cores, **sides, **{f".hada_w{i}_b": noise(rng, rank, first) for i in (1, 2)}}
    width = math.prod(shape[1:])
    sides = {f".hada_w{i}_a": noise(rng, out, rank) for i in (1, 2)}
    return {**sides, **{f".hada_w{i}_b": noise(rng, rank, width) for i in (1, 2)}}


def lokr(rng: random.Random, shape: Shape) -> File:
    (a, b), (c, d), kernel = _split(shape[0]), _split(shape[1]), shape[2:]
    first = {".lokr_w1": noise(rng, a, c)}
    if rng.random() < 0.4:
        first = {".lokr_w1_a": noise(rng, a, 2), ".lokr_w1_b": noise(rng, 2, c)}
    second = {".lokr_w2": noise(rng, b, d, *kernel)}
    if len(kernel) == 2 and rng.random() < 0.5:
        second = {".lokr_t2": noise(rng, 2, 2, *kernel), ".lokr_w2_a": noise(rng, 2, b), ".lokr_w2_b": noise(rng, 2, d)}
    elif rng.random() < 0.4:
        second = {".lokr_w2_a": noise(rng, b, 2), ".lokr_w2_b": noise(rng, 2, d * math.prod(kernel))}
    return first | second


def glora(rng: random.Random, shape: Shape) -> File:
    (out, width), rank = (shape[0], shape[1]), 2
    wide = math.prod(shape[1:])
    if len(shape) > 2 or rng.random() < 0.5:  # W A1 A2 + B1 B2
        sizes = {"a1": (width, rank), "a2": (rank, width), "b1": (out, rank), "b2": (rank, wide)}
    else:  # the older W A2 A1 + B2 B1
        sizes = {"a1": (rank, width), "a2": (width, rank), "b1": (rank, wide), "b2": (out, rank)}
    return {f".{name}.weight": noise(rng, *size) for name, size in sizes.items()}


def oft(rng: random.Random, shape: Shape) -> File:
    blocks, size = _split(shape[0])
    file = {".oft_blocks": noise(rng, blocks, size, size)}
    return file if rng.random() < 0.7 else {**file, ".rescale": 1 + noise(rng, shape[0], *[1] * (len(shape) - 1))}


def boft(rng: random.Random, shape: Shape) -> File:
    stages = 1 if shape[0] % 8 else 2
    file = {".oft_blocks": noise(rng, stages, shape[0] // 4, 4, 4), ".alpha": torch.tensor(0.0)}
    return file if rng.random() < 0.7 else {**file, ".rescale": 1 + noise(rng, shape[0], *[1] * (len(shape) - 1))}


def difference(rng: random.Random, shape: Shape) -> File:
    return {rng.choice((".diff", ".set_weight")): noise(rng, *shape)}


def bias(rng: random.Random, shape: Shape) -> File:
    file = {rng.choice((".diff_b", ".b_norm")): noise(rng, shape[0])}
    return file if rng.random() < 0.5 else {**lora(rng, shape), ".lora_B.bias": noise(rng, shape[0])}


def stranger(rng: random.Random, shape: Shape) -> File:
    suffix = rng.choice((".oft_diag", ".on_input", ".reshape_weight", ".lora_magnitude_vector", ".w_norm"))
    return {**(lora(rng, shape) if rng.random() < 0.5 else {}), suffix: noise(rng, *shape)}


KINDS: dict[str, Callable[[random.Random, Shape], File]] = {
    one.__name__: one for one in (lora, dora, loha, lokr, glora, oft, boft, difference, bias, stranger)
}


def random_file(rng: random.Random, layers: Mapping[str, Shape]) -> File:
    """A valid file: some of the layers, each of one kind; vectors get differences."""
    file: File = {}
    names = rng.sample(sorted(layers), rng.randint(1, min(5, len(layers))))
    favourite = rng.choice(sorted(KINDS))
    for name in names:
        shape = layers[name]
        kind = favourite if rng.random() < 0.7 else rng.choice(sorted(KINDS))
        tensors = KINDS[kind](rng, shape) if len(shape) > 1 else difference(rng, shape)
        if rng.random() < 0.4 and kind != "boft":
            tensors[".alpha"] = torch.tensor(rng.choice((1.0, 4.0, -2.0, 0.0)))
        file |= {name + suffix: value for suffix, value in tensors.items()}
    return file


# ---------------------------------------------------------------- what goes wrong

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
)
ODD_NAMES = ("", ".", ".alpha", "…", "ключ.lora_up.weight", "__proto__", " ", "a" * 300, "lora_unet_", "\n.diff", "\0")
VALUES = (math.nan, math.inf, -math.inf, 0.0, 1e-45, 1e38, -1e38, 1e-38, 65504.0, 1e19)


_SUFFIX = re.compile(
    r"(_lora\.|\.(lora|hada|lokr|oft|dora|diff|set_w|alpha|rescale|[wb]_norm|reshape|on_input|[ab][12]\.weight)).*",
    re.S,
)


def base_of(key: str) -> str:
    """The layer that a key speaks of."""
    return _SUFFIX.sub("", key)


def drop_key(rng: random.Random, file: File, key: str) -> None:
    del file[key]


def rename(rng: random.Random, file: File, key: str) -> None:
    at = rng.randrange(len(key) + 1) if key else 0
    other = rng.choice(sorted(file))
    new = rng.choice(
        (
            key[:at] + key[at + 1 :],
            key[:at] + rng.choice("._aW0é/") + key[at:],
            key[: max(0, at - 2)] + key[at : at + 1] + key[max(0, at - 2) : at] + key[at + 1 :],
            rng.choice(("transformer.", "base_model.model.", "lora_unet_", "model.")) + key,
            key + rng.choice((".weight", ".default", " ", ".alpha", "_", ".lora_up.weight")),
            base_of(key) + other[len(base_of(other)) :],
            key.replace("up", "down") if "up" in key else key.replace("_a", "_b"),
            rng.choice(ODD_NAMES),
        )
    )
    file[new] = file.pop(key)


def copy_key(rng: random.Random, file: File, key: str) -> None:
    other = rng.choice(sorted(file))
    file[base_of(key) + other[len(base_of(other)) :]] = file[key].clone()


def reshape(rng: random.Random, file: File, key: str) -> None:
    value = file[key]
    file[key] = rng.choice(
        (
            lambda: value.transpose(0, -1) if value.ndim > 1 else value[None],
            lambda: value.unsqueeze(rng.randint(0, value.ndim)),
            lambda: value[0] if value.ndim and len(value) else value[None],
            lambda: value.flatten(),
            lambda: value.new_zeros(0),
            lambda: value[:, :0] if value.ndim > 1 else value.new_zeros(0, 4),
            lambda: value.new_ones(()),
            lambda: value.repeat(2, *[1] * (value.ndim - 1)) if value.ndim else value.repeat(2),
            lambda: noise(rng, 500, *value.shape[1:]),
            lambda: noise(rng, *value.shape[:1], 500),
            lambda: noise(rng, *(rng.randint(1, 9) for _ in range(rng.randint(1, 5)))),
            lambda: noise(rng, 1, 5000) if rng.random() < 0.5 else noise(rng, 5000, 1),
        )
    )()


def retype(rng: random.Random, file: File, key: str) -> None:
    value = file[key].real if file[key].is_complex() else file[key]
    file[key] = value.to(rng.choice(DTYPES))


def revalue(rng: random.Random, file: File, key: str) -> None:
    value = file[key].clone()
    if value.is_floating_point() and value.element_size() > 1:
        picked = rng.choice(VALUES)
        if rng.random() < 0.5 and value.numel():
            value.view(-1)[rng.randrange(value.numel())] = picked
        else:
            value = torch.full_like(value, picked)
    file[key] = value


def scale_up(rng: random.Random, file: File, key: str) -> None:
    if file[key].is_floating_point():
        file[key] = (file[key].float() * rng.choice((1e-20, 1e10, 1e20, 1e30, -1.0))).to(file[key].dtype)


def odd_alpha(rng: random.Random, file: File, key: str) -> None:
    base = base_of(key)
    alphas = (torch.ones(2), torch.ones(1, 1), torch.zeros(0), torch.tensor(math.nan), torch.tensor(3))
    more = (torch.tensor(True), torch.tensor(1j), torch.tensor(1e38), torch.tensor(2.0).to(torch.float8_e4m3fn))
    file[f"{base}.alpha"] = rng.choice(alphas + more)


def mix_kinds(rng: random.Random, file: File, key: str) -> None:
    kind, sizes = rng.choice(sorted(KINDS)), file[key].shape
    shape = (12, 8) if rng.random() < 0.5 else (sizes[0], sizes[-1]) if len(sizes) > 1 and min(sizes) > 0 else (8, 8)
    file.update({base_of(key) + suffix: value for suffix, value in KINDS[kind](rng, shape).items()})


PERTURBATIONS = (drop_key, rename, copy_key, reshape, retype, revalue, scale_up, odd_alpha, mix_kinds)


def perturb(rng: random.Random, file: File) -> tuple[File, list[str]]:
    """A file with up to three things wrong, and what was done to it."""
    damaged, done = dict(file), []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        if not damaged:
            break
        change, key = rng.choice(PERTURBATIONS), rng.choice(sorted(damaged))
        change(rng, damaged, key)
        done.append(f"{change.__name__}({key!r})")
    order = list(damaged)
    rng.shuffle(order)
    return {key: damaged[key].contiguous().clone() for key in order}, done
