"""OSRM after training: LoRAs that exist, changed so that they do less on the other tasks' inputs.

    analytic   down_t from the others' inputs, up_t = dW_t pinv(down_t)          (the paper's post-OSRM)
    project    down_t (I - s V V^T), V the top directions of the others' inputs
    contrast   down_t (I - s C_o (C_t + s C_o + mu I)^-1), C_t and C_o the moments of own and others' inputs

The first is blind to what the LoRA reads: it keeps only the part of dW_t that happens to lie in
directions chosen without it. The second keeps the LoRA but for directions that the others use most,
used by its own task or not. The third is the minimiser of the change of its own outputs plus s times
the energy of its outputs on the others' inputs: it gives a direction up as far as the others use it
more than the LoRA's own task. Ranks, ups and alphas stay as they are in the last two, and a LoRA
whose down the others' inputs do not reach is unchanged by both; of a sketch the contrast assumes that
what it does not know of them is spread evenly over all other directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .adapters import LoRALayer
from .errors import IncompatibleError
from .moments import InputMoments
from .osrm import analytic_down, top_directions

RefitMode = Literal["contrast", "project", "analytic"]
REFIT_MODES: tuple[RefitMode, ...] = ("contrast", "project", "analytic")


@dataclass(frozen=True)
class RefitOptions:
    """How LoRAs are refit.

    Attributes:
        mode: See the module.
        strength: project: share s of the others' top directions that is removed, 0 to 1; contrast: weight s
            of the others' inputs against the own ones, 0 or more. 0 changes nothing. analytic ignores it.
        energy: project and analytic: share of the energy of the others' inputs that counts as theirs.
        ridge: contrast: mu, as a share of the mean eigenvalue of both moments. Directions that neither task
            uses much stay as they are; too little of it fits the change to these very tokens.
        seed: analytic: of the random bases.
    """

    mode: RefitMode = "contrast"
    strength: float = 1.0
    energy: float = 0.9
    ridge: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        most = 1.0 if self.mode == "project" else math.inf
        if not 0 <= self.strength <= most or not 0 < self.energy <= 1 or not self.ridge > 0:
            raise IncompatibleError(
                f"strength {self.strength:g}, energy {self.energy:g} or ridge {self.ridge:g} has no meaning in mode "
                f"{self.mode}.",
                remedy="use a strength of 0 to 1 (contrast: 0 or more), an energy above 0, up to 1, a ridge above 0.",
            )


def refit_layer(
    layer: LoRALayer, own: InputMoments | None, others: InputMoments, options: RefitOptions, generator: torch.Generator
) -> LoRALayer:
    """One layer of a LoRA, refit against the inputs of the other tasks.

    Args:
        layer: The layer.
        own: Moments of its own task's inputs; None, or no tokens, counts all directions alike.
        others: Moments of the other tasks' inputs.
        options: How.
        generator: Of analytic's random basis.

    Returns:
        A layer of the same rank, alpha and dtype.
    """
    down = layer.down.to(others.total.device, torch.float64)
    if options.mode == "analytic":
        new = analytic_down(others, min(layer.rank, others.width), generator, options.energy)
        up = layer.up.to(new) @ (down @ new.T)  # dW pinv(D) = dW D^T for orthonormal rows
        missing = layer.rank - new.shape[0]
        new = torch.nn.functional.pad(new, (0, 0, 0, missing))
        up = torch.nn.functional.pad(up, (0, missing))
        return replace(layer, down=new.to(layer.down), up=up.to(layer.up))
    if options.mode == "project":
        top = top_directions(others, options.energy)
        new = down - options.strength * (down @ top) @ top.T
    else:
        new = down - _contrast(down, own, others, options)
    return replace(layer, down=new.to(layer.down))


def _contrast(down: Tensor, own: InputMoments | None, others: InputMoments, options: RefitOptions) -> Tensor:
    """What contrast takes off down, (r, d): s down C_o (C_t + s C_o + mu I)^-1.

    Computed in a basis of all directions that the moments know. To what a sketch does not know it gives
    the mean of the energy there, in both moments: with C' alone, which is less than C, energy that the
    sketch happens to know on one side and not on the other would pass for a difference.
    """
    theirs = others.per_token()
    power, outside = theirs.trace / theirs.width, options.strength * theirs.unexplained
    if own is None or own.tokens <= 0:
        basis = theirs.spectrum.vectors
        mine, kept = power * torch.eye(basis.shape[1]).to(basis), power
    else:
        own = own.per_token()
        basis, kept = _joint_basis(own, theirs), own.unexplained
        mine, power = own.filled_gram(basis.T), power + own.trace / own.width
    if power <= 0:
        return torch.zeros_like(down)
    gram = options.strength * theirs.filled_gram(basis.T)
    total = mine + gram + options.ridge * power * torch.eye(basis.shape[1]).to(basis)
    reached = down @ basis
    taken: Tensor = torch.linalg.solve(total, (reached @ gram).T).T
    beyond = outside / (kept + outside + options.ridge * power)
    return taken @ basis.T + beyond * (down - reached @ basis.T)


def _joint_basis(own: InputMoments, theirs: InputMoments) -> Tensor:
    """(d, p) orthonormal columns that span both moments' directions."""
    if own.exact and theirs.exact:
        return torch.eye(own.width).to(own.total.device, torch.float64)
    both = torch.cat([theirs.spectrum.vectors, own.spectrum.vectors], dim=1)
    vectors, sizes, _ = torch.linalg.svd(both, full_matrices=False)
    spanned: Tensor = vectors[:, sizes > 1e-9]
    return spanned


class Range(NamedTuple):
    """What is known of a number: between which two it lies, and an estimate. All are equal where it is exact."""

    low: float
    likely: float
    high: float

    def over(self, other: Range) -> Range:
        """The quotient of two that are not negative."""
        low, likely, high = (max(one, 1e-300) for one in other)
        return Range(self.low / high, self.likely / likely, self.high / low)


def energy(layer: LoRALayer, moments: InputMoments, minus: LoRALayer | None = None) -> Range:
    """Mean squared norm of a layer's output, or of the difference of two, over the tokens: tr(dW C dW^T).

    Of a sketch C' <= C it is known within `tr(C - C') |dW|_2^2`, and estimated as if `C - C'` were spread
    evenly over the directions outside: a refit fits what the sketch knows, so that its lower bound alone
    would flatter it.

    Args:
        layer: The change dW; never made dense.
        moments: C.
        minus: Subtracted from it.
    """
    up, down = _difference(layer, minus, moments.total.device)
    known = moments.per_token()
    outer = up.T @ up
    least = max(0.0, float((outer * known.gram_of(down)).sum()))
    if known.exact:
        return Range(least, least, least)
    core = torch.linalg.qr(up)[1] @ torch.linalg.qr(down.T)[1].T
    most = least + known.spectrum.rest * float(torch.linalg.matrix_norm(core, 2)) ** 2
    return Range(least, min(max(least, float((outer * known.filled_gram(down)).sum())), most), most)


def white_energy(layer: LoRALayer, power: float, minus: LoRALayer | None = None) -> Range:
    """The same for inputs with this power in every direction: power * tr(dW dW^T)."""
    up, down = _difference(layer, minus, layer.up.device)
    value = max(0.0, power * float(((up.T @ up) * (down @ down.T)).sum()))
    return Range(value, value, value)


def _difference(layer: LoRALayer, minus: LoRALayer | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factors (out, R) and (R, d) of one change less another."""
    parts = [(layer, 1.0), *([(minus, -1.0)] if minus is not None else [])]
    up = torch.cat([sign * one.scale * one.up.to(device, torch.float64) for one, sign in parts], dim=1)
    return up, torch.cat([one.down.to(device, torch.float64) for one, _ in parts])
