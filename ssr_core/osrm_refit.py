"""OSRM after training, for whole LoRAs: what is refit, and what that did to each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

import torch

from .adapters import Adapter, LoRALayer
from .finite import nonfinite_warnings
from .input_hooks import whole_module
from .moments import InputMoments
from .osrm import layer_generator, lost_tokens, pooled
from .osrm_layer import Range, RefitMode, RefitOptions, energy, refit_layer, white_energy
from .targets import Target
from .words import number_of

JudgedBy = Literal["inputs", "never reached", "not finite", "leave it silent"]

_BLIND: tuple[tuple[JudgedBy, str], ...] = (
    ("never reached", "its own prompts never reached them"),
    ("not finite", "all its own inputs there were NaN or infinite"),
    ("leave it silent", "on its own prompts they put out nothing"),
)
_REMEDY: dict[RefitMode, str] = {
    "contrast": "Lower the strength.",
    "project": "Lower the strength or the energy, or use mode contrast.",
    "analytic": "Use mode contrast.",
}
_UNREACHED = "no other LoRA's pass reached them"


@dataclass(frozen=True)
class RefitLayerReport:
    """What a refit did to one layer of one LoRA.

    Attributes:
        target: Module and rows.
        kept: Share of the energy of its function that the change leaves standing: 1 less the energy of the
            difference over that of the function, on its own inputs. Below 0 if it does harm. An estimate
            between bounds, as the others, where the inputs are sketched.
        judged_by: What `kept` was taken over: its own inputs; or its weights, because its own prompts
            "never reached" it, because their tokens were "not finite", or because they "leave it silent".
        before: Energy of its outputs on the others' inputs, relative to that on its own (or, for lack of
            those, to that of its weights on inputs of the same power in all directions).
        after: The same of the refit LoRA.
    """

    target: Target
    kept: Range
    judged_by: JudgedBy
    before: Range
    after: Range


@dataclass(frozen=True)
class RefitReport:
    """What a refit did to one LoRA.

    Attributes:
        name: The LoRA.
        layers: One entry for each layer that was refit.
        unchanged: Layers left as they were, with the reason.
        nonfinite: Tokens of its own passes left out because they were NaN or infinite, by layer.
    """

    name: str
    layers: tuple[RefitLayerReport, ...]
    unchanged: Mapping[Target, str]
    nonfinite: Mapping[Target, int] = field(default_factory=dict)

    @property
    def kept(self) -> Range:
        """Median over the layers; nan without any."""
        return _median([one.kept for one in self.layers])

    @property
    def interference(self) -> tuple[Range, Range]:
        """Energy on the others' inputs over that on its own, median over the layers, before and after."""
        return _median([one.before for one in self.layers]), _median([one.after for one in self.layers])


def compare(
    target: Target, old: LoRALayer, new: LoRALayer, own: InputMoments | None, others: InputMoments
) -> RefitLayerReport:
    """How much of its function a layer keeps, and what it does on the others' inputs."""
    judged_by: JudgedBy = "inputs"
    if own is None or own.tokens <= 0:
        judged_by = "not finite" if own is not None and own.nonfinite else "never reached"
    elif energy(old, own).high <= 0:
        judged_by = "leave it silent"
    if own is not None and judged_by == "inputs":
        function, change = energy(old, own), energy(new, own, minus=old)
    else:  # white inputs of the others' power
        power = others.trace / max(others.tokens, 1e-300) / others.width
        function, change = white_energy(old, power), white_energy(new, power, minus=old)
    lost = change.over(function)
    return RefitLayerReport(
        target,
        Range(1 - lost.high, 1 - lost.likely, 1 - lost.low),
        judged_by,
        energy(old, others).over(function),
        energy(new, others).over(function),
    )


@dataclass(frozen=True)
class RefitResult:
    """Refit LoRAs, in order, and what became of each."""

    adapters: tuple[Adapter, ...]
    reports: tuple[RefitReport, ...]


def osrm_refit(
    adapters: Sequence[Adapter],
    moments: Sequence[Mapping[Target, InputMoments]],
    options: RefitOptions,
    *,
    device: torch.device | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> RefitResult:
    """Refit every LoRA against the inputs of all others.

    Args:
        adapters: The LoRAs.
        moments: For each LoRA the moments of its own task's inputs, by module.
        options: How.
        device: Where to compute; None is the CPU.
        tick: Called with (layers done, layers in all); may raise to cancel.
    """
    total = sum(len(adapter.layers) for adapter in adapters)
    done = 0
    refitted: list[Adapter] = []
    reports = []
    for index, adapter in enumerate(adapters):
        layers = dict(adapter.layers)
        rows: list[RefitLayerReport] = []
        unchanged: dict[Target, str] = {}
        for target, layer in adapter.layers.items():
            tick(done, total)
            done += 1
            if white_energy(layer, 1.0).high <= 0:
                unchanged[target] = "they change nothing: their product is zero"
                continue
            module = whole_module(target)
            own = moments[index].get(module)
            passes = [one[module] for i, one in enumerate(moments) if i != index and module in one]
            rest = [one.to(device or torch.device("cpu")) for one in passes if one.tokens > 0]
            if not rest:
                lost = any(one.nonfinite for one in passes)
                unchanged[target] = "all other LoRAs' inputs were NaN or infinite" if lost else _UNREACHED
                continue
            own = None if own is None else own.to(device or torch.device("cpu"))
            others = pooled(rest)
            generator = layer_generator(options.seed, target, adapter.fingerprint)
            layers[target] = refit_layer(layer, own, others, options, generator)
            rows.append(compare(target, layer, layers[target], own, others))
        refitted.append(replace(adapter, layers=layers))
        reports.append(RefitReport(adapter.name, tuple(rows), unchanged, lost_tokens(moments[index : index + 1])))
    return RefitResult(tuple(refitted), tuple(reports))


def _median(values: Sequence[Range]) -> Range:
    """Of bounds and estimates, each; nan without any. The median of the true values lies between the bounds'."""
    if not values:
        return Range(math.nan, math.nan, math.nan)
    return Range(*(median(side) for side in zip(*values, strict=True)))


def _text(value: Range, unit: str = "", scale: float = 1.0) -> str:
    """A number as people read it, and what it lies between where it is an estimate."""
    low, likely, high = (f"{scale * one:.3g}" for one in value)
    return f"{likely}{unit}" + ("" if low == high else f" ({low} to {high})")


def _settings(options: RefitOptions) -> str:
    """Those that the mode heeds."""
    parts = {
        "contrast": f", strength {options.strength:g}, ridge {options.ridge:g}",
        "project": f", strength {options.strength:g}, energy {options.energy:g}",
        "analytic": f", energy {options.energy:g}",
    }
    return parts[options.mode]


def refit_markdown(reports: Sequence[RefitReport], options: RefitOptions) -> str:
    """The reports as people read them."""
    lines = [
        "# OSRM Refit",
        "",
        f"Mode {options.mode}{_settings(options)}. Medians over the layers:",
        "",
        "| LoRA | layers | keeps of its own function | interference before | after |",
        "|---|---|---|---|---|",
    ]
    for report in reports:
        before, after = (_text(one) if report.layers else "-" for one in report.interference)
        kept = _text(report.kept, " %", 100) if report.layers else "all"
        lines.append(f"| {report.name} | {len(report.layers)} | {kept} | {before} | {after} |")
    lines += [
        "",
        "Function: energy of the LoRA's output on its own prompts, less that of the change. Interference: energy "
        "of its output on the others' prompts, as a multiple of that on its own.",
    ]
    if any(one.after.low < one.after.high for report in reports for one in report.layers):
        lines += [
            "",
            "Wide layers are sketched: these figures are estimates that take the energy outside the sketch as spread "
            "evenly, and the truth lies between those in brackets. A larger exact_limit or sketch narrows them down.",
        ]
    for report in reports:
        worst = min(report.layers, key=lambda one: one.kept.likely, default=None)
        if worst is not None and report.kept.likely < 0.5:
            loses = "loses" if report.kept.high < 0.5 else "probably loses"
            lines.append(
                f"\nWarning: {report.name} {loses} most of its own function (least is kept in {worst.target}). "
                f"{_REMEDY[options.mode]}"
            )
        for kind, reason in _BLIND:
            blind = sum(one.judged_by == kind for one in report.layers)
            if blind:
                lines.append(
                    f"\n{report.name}: {number_of(blind, 'layer was', 'layers were')} judged by weights; {reason}."
                )
        lines += [f"\nWarning: {report.name}: {sentence}" for sentence in nonfinite_warnings(report.nonfinite)]
        reasons: dict[str, list[Target]] = {}
        for target, reason in report.unchanged.items():
            reasons.setdefault(reason, []).append(target)
        lines += [
            f"\n{report.name}: {number_of(len(t), 'layer')} unchanged ({r}), e.g. {t[0]}." for r, t in reasons.items()
        ]
    return "\n".join(lines) + "\n"
