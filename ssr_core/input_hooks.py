"""One pre-hook a layer that adds its input to second moments; what siblings read together is added once."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CalibrationError, IncompatibleError
from .moments import CHUNK, InputMoments, MomentOptions, MomentsAccumulator, sketch_matrix
from .projection import patches
from .sampling import SampleOptions, TokenSampler
from .taps import PassState, input_of
from .targets import KeyMap, Part, Target


@dataclass(frozen=True, order=True)
class InputLayer:
    """A linear layer or convolution whose inputs are gathered.

    Attributes:
        target: The whole module.
        in_features: Inputs d; of a convolution in * prod(kernel).
        out_features: Outputs.
        kernel: Spatial kernel; empty for linear layers.
    """

    target: Target
    in_features: int
    out_features: int
    kernel: tuple[int, ...] = ()


def input_layers(key_map: KeyMap, part: Part) -> list[InputLayer]:
    """All linear layers and convolutions of one part that hooks can watch, by path."""
    found = {
        entry.target.module_path: InputLayer(
            Target(entry.target.module_path, None, part), entry.in_features, entry.weight_shape[0], entry.kernel
        )
        for entry in key_map.values()
        if entry.target.part == part and entry.is_map and entry.tapped and not entry.ignored
    }
    return [found[path] for path in sorted(found)]


def whole_module(target: Target) -> Target:
    """The module of a slice: all its rows read the same inputs."""
    return Target(target.module_path, None, target.part)


class SketchMatrices:
    """Sketch matrices by width, on the devices that need them.

    Args:
        options: What is kept of a layer.
        sample: Tokens that are kept as they are, beside the moments; None for none.
    """

    def __init__(self, options: MomentOptions, sample: SampleOptions | None = None) -> None:
        self.options, self.sample = options, sample
        self._ready: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def of(self, layer: InputLayer, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """Omega of a layer, the same for all of its width; None where the moments are exact."""
        width = layer.in_features
        columns = self.options.columns(width)
        if columns == width:
            return None
        key = (width, device, dtype)
        if key not in self._ready:
            self._ready[key] = sketch_matrix(width, columns).to(device, dtype)
        return self._ready[key]


@dataclass
class Family:
    """The layers of one parent module: those that read the very same tensor share their moments (q, k, v)."""

    last: weakref.ref[Tensor] | None = None
    version: int | None = None
    weight: Tensor | None = None
    leader: InputHook | None = None


def family_of(layer: InputLayer) -> tuple[str, int]:
    """Parent module and width: layers that agree in both may turn out to read the very same tensor."""
    return layer.target.module_path.rpartition(".")[0], layer.in_features


def _version(x: Tensor) -> int | None:
    """Counts changes in place; inference tensors keep no count."""
    return None if x.is_inference() else x._version


class InputHook:
    """The pre-hook of one module for one task."""

    def __init__(self, state: PassState, layer: InputLayer, family: Family | None, matrices: SketchMatrices) -> None:
        self.state, self.layer, self.family, self.matrices = state, layer, family, matrices
        self.path = layer.target.module_path
        self.own: MomentsAccumulator | None = None
        self.sampler = None if matrices.sample is None else TokenSampler(matrices.sample, held_out=0)
        self.own_calls = 0
        self.shared: Counter[InputHook] = Counter()

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Add the input, or note that a sibling has added this very tensor."""
        x = input_of(args, self.path)
        leading: Sequence[int] = () if self.layer.kernel else (x.shape[:-1] if x.ndim > 1 else (1,))
        weight = self.state.weights(self.path, leading, x.device) if leading else None
        self.state.calls[self.path] += 1
        if self._follows(x, weight):
            return
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.no_grad():
            if self.own is None:
                omega = self.matrices.of(self.layer, x.device, dtype)
                self.own = MomentsAccumulator(self.layer.in_features, self.matrices.options, omega, x.device, dtype)
            if self.own.total.device != x.device:
                raise CalibrationError("the layer moved to another device during its pass.", layer=self.path)
            self.own.add(*self._chunks(module, x.detach(), weight))
            if self.sampler is not None:
                finite = [torch.isfinite(chunk.abs().amax(dim=-1)) for chunk in self._chunks(module, x, None)[0]]
                chunks, weight = self._chunks(module, x.detach(), weight)
                usable = torch.cat(finite, dim=1).flatten()
                self.sampler.add(chunks, usable, None if weight is None else weight.flatten())
        self.own_calls += 1

    def _follows(self, x: Tensor, weight: Tensor | None) -> bool:
        family = self.family
        if family is None:
            return False
        same = family.last is not None and family.last() is x and family.version == _version(x)
        leader = family.leader
        if same and leader is not None and leader is not self and family.weight is weight:
            self.shared[leader] += 1
            return True
        family.last, family.version, family.weight, family.leader = weakref.ref(x), _version(x), weight, self
        return False

    def _chunks(self, module: nn.Module, x: Tensor, weight: Tensor | None) -> tuple[Iterable[Tensor], Tensor | None]:
        if self.layer.kernel:
            return patches(module, x, self.layer.kernel, self.path), None
        width = self.layer.in_features
        if x.shape[-1] != width:
            raise IncompatibleError(f"the layer reads {x.shape[-1]} inputs, not {width}.", layer=self.path)
        samples = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1, width)
        weight = None if weight is None else weight.reshape(samples.shape[:2])
        return samples.split(max(1, CHUNK // max(1, samples.shape[0])), dim=1), weight

    def take(self) -> InputMoments | None:
        """What this hook added itself, handed over; None if a sibling added everything."""
        if self.own is None:
            return None
        sample = None if self.sampler is None else self.sampler.result()
        found, self.own, self.sampler = replace(self.own.result(), sample=sample), None, None
        return found

    def parts(self) -> list[InputHook]:
        """The hooks whose accumulators make up this layer's moments.

        Raises:
            SharingError: A sibling added inputs that this layer did not read.
        """
        if any(count != leader.own_calls for leader, count in self.shared.items()):
            raise SharingError(
                "it reads the same input as its neighbour in one step and another in the next.", self.path
            )
        return [*self.shared, *([self] if self.own_calls else [])]


class SharingError(CalibrationError):
    """Layers that shared their moments went apart; gather again with `share=False`."""

    def __init__(self, what: str, path: str) -> None:
        super().__init__(what, layer=path, remedy="gather the moments with share=False.")
