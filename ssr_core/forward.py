"""A LoRA in the forward pass: added to the layers' outputs, never to their weights.

    output[rows] += scale * up (down x)

Rounding a small change into 8 or 4 bit storage loses most of it; this loses nothing beyond the
rounding of the activations themselves.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import LoRALayer
from .errors import IncompatibleError
from .projection import add, columns, compute_dtype, project
from .targets import Target

_Signature = tuple[Any, ...]


class ForwardLoRA:
    """Low-rank changes by target, for the length of a `with` block; it holds no state of a model.

    Args:
        layers: What to add; targets may share a module and overlap. All are relative to one root.
    """

    def __init__(self, layers: Mapping[Target, LoRALayer]) -> None:
        self._by_module: dict[str, list[tuple[Target, LoRALayer]]] = {}
        for target, layer in layers.items():
            self._by_module.setdefault(target.module_path, []).append((target, layer))
        self._roots: list[nn.Module] = []

    @property
    def paths(self) -> list[str]:
        """Modules that it acts on."""
        return list(self._by_module)

    def nbytes(self, dtype: torch.dtype) -> int:
        """Memory that the factors take beside activations of this dtype."""
        layers = [layer for group in self._by_module.values() for _, layer in group]
        return sum(layer.down.numel() + layer.up.numel() for layer in layers) * compute_dtype(dtype).itemsize

    def is_attached(self, root: nn.Module) -> bool:
        """Whether it acts on this model now."""
        return any(one is root for one in self._roots)

    @contextmanager
    def attached(self, root: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[list[nn.Module]]:
        """Add the LoRA to the layers below `root` for the length of the block; always taken off again.

        Attached a second time to the same root inside the block, it stays single.

        Args:
            root: The model.
            device: Where its layers compute; the factors are uploaded before the block begins.
            dtype: Of its activations; a layer that computes in another gets its own copy.

        Yields:
            The modules that carry it.

        Raises:
            IncompatibleError: A layer is no module of `root`.
        """
        if self.is_attached(root):
            yield []
            return
        changes = [_Change(path, group) for path, group in self._by_module.items()]
        self._roots.append(root)
        try:
            yield [change.attach(root, device, dtype) for change in changes]
        finally:
            self._roots = [one for one in self._roots if one is not root]
            for change in reversed(changes):
                change.detach()


class _Change:
    """The hook pair of one module, during one block."""

    def __init__(self, path: str, parts: list[tuple[Target, LoRALayer]]) -> None:
        self.path, self.parts, self.kernel = path, parts, parts[0][1].kernel
        self.rows = [target.out_slice for target, _ in parts]
        ends = [sum(layer.rank for _, layer in parts[: i + 1]) for i in range(len(parts))]
        self.spans = [slice(end - layer.rank, end) for end, (_, layer) in zip(ends, parts, strict=True)]
        self.down: Tensor | None = None
        self.ups: list[Tensor] = []
        self.pending: list[Tensor] = []
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.module: nn.Module | None = None
        self.unmarked: Any = None

    def attach(self, root: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Upload the factors and register the hooks."""
        try:
            module = root.get_submodule(self.path)
        except AttributeError as err:
            raise IncompatibleError("the model has no such layer.", layer=self.path) from err
        self.prepare(device, dtype)
        signature = tuple((target.out_slice, layer.rank, layer.kernel) for target, layer in self.parts)
        self.module, self.unmarked = module, module.__class__
        module.__class__ = _marked(self.unmarked, signature)
        self.handles.append(module.register_forward_pre_hook(self.before))
        self.handles.append(module.register_forward_hook(self.after))
        return module

    def detach(self) -> None:
        """Leave the module as it was, and let go of the factors."""
        for handle in self.handles:
            handle.remove()
        if self.module is not None:
            self.module.__class__ = self.unmarked
        self.module, self.down = None, None
        self.handles.clear()
        self.ups.clear()
        self.pending.clear()

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Factors where and as the layer computes; the scale goes into `up`."""
        compute = compute_dtype(dtype)
        self.down = torch.cat([layer.down.to(device, compute) for _, layer in self.parts])
        self.ups = []
        for _, layer in self.parts:
            up = layer.up.to(device)
            exact = torch.promote_types(up.dtype, torch.float32)
            self.ups.append((up.to(exact) * layer.scale).to(compute))

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Pre-hook: project. Some fp8 kernels clamp the input in place afterwards."""
        if not args or not isinstance(args[0], Tensor):
            raise IncompatibleError("the model calls this layer without a tensor.", layer=self.path)
        x = args[0]
        if self.down is None or self.down.device != x.device or self.down.dtype != compute_dtype(x.dtype):
            self.prepare(x.device, x.dtype)
        assert self.down is not None
        self.pending.append(project(module, x, self.down, self.kernel, self.path))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Hook: add, in the rows of each part."""
        z = self.pending.pop()
        if output.requires_grad:  # training through the model: a view must not be changed in place
            output = output.clone()
        for rows, span, up in zip(self.rows, self.spans, self.ups, strict=True):
            add(output, columns(z, span, self.kernel), up, rows, self.kernel, self.path)
        return output


@functools.lru_cache(maxsize=2048)
def _marked(kind: Any, signature: _Signature) -> Any:
    """A class that is `kind` in all but identity.

    torch.compile does not look whether a module's hooks came or went since it made its graph, but
    it does check the module's class. With the class changed while hooks are on, a graph with them
    is never taken for one without, and equal structures share one graph.
    """
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return types.new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(names))
