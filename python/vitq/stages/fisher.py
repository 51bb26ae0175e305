"""allocate.fisher: bits by the Fisher information of layers, compared by type, then updated from measured errors.

LampQ (arXiv 2511.10004, AAAI 2026) [P]: sensitivity Ω_l = α_type·tr(F_l), bits by an integer linear program under the
budget, then iterative updates from what quantization does; its code leaves all three out. Reconstructed [R]:

- F over the model's own predictions, no labels, see ``vitq.fisher``.
- error of b bits: Ω_l·‖Q_b(W_l) − W_l‖²/(N·K), the trace's share of the second-order loss.
- types are qkv, proj, fc1, fc2. α_type makes the mean error of a type at the recipe's bits 1: the layers of a type
  compete by their traces, the types have the same weight.
- update: the model is quantized at the bits found, each layer alone is moved to its neighbouring candidates, and the
  program is solved again among the neighbours with the measured errors of the logits. A round that does not lower the
  measured error is taken back and ends the updates.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..allocation.sensitivity import block_sensitivities, distance
from ..fisher import fisher_traces
from ..quantizers import SimLinear
from .base import Calibration, method
from .bits import Allocation, ProbeOptions, blocks, float_logits, noted


class FisherOptions(ProbeOptions):
    """
    Args:
        draws: per image, for the traces.
        rounds: most updates; 0 keeps the program's bits.
    """

    draws: int = Field(4, ge=1)
    rounds: int = Field(3, ge=0)


@method("allocate", "fisher")
def fisher(calibration: Calibration, options: FisherOptions) -> None:
    """Leaves the bits in the layers' formats, with the traces as ``metrics["allocation"]``."""
    allocation = Allocation(calibration, options)
    paths, images = list(allocation.layers), calibration.images[: options.images]
    generator = calibration.generator("draws")
    traces = noted(
        calibration,
        "traces",
        lambda: fisher_traces(calibration.reference, calibration.batches(images), paths, options.draws, generator),
    )
    chosen = _solve(allocation, _errors(allocation, traces))
    allocation.give(chosen)
    logits = float_logits(calibration, images)
    history = [_measure(calibration, options, images, logits)]
    for index in range(options.rounds):
        calibration.progress(calibration.step, index, options.rounds)
        updated = _updated(allocation, chosen, history[-1], images, logits)
        allocation.give(updated)
        measured = _measure(calibration, options, images, logits)
        if measured >= history[-1]:
            allocation.give(chosen)
            break
        history.append(measured)
        chosen = updated
    allocation.note(chosen, traces=traces, errors=history)


def _solve(
    allocation: Allocation, errors: dict[str, list[float]], offered: dict[str, list[int]] | None = None
) -> dict[str, int]:
    """Path -> index of the choice with the least Σ errors within the budget."""
    frontier, picked = allocation.best(allocation.components(errors, offered))
    return {
        path: j if offered is None else offered[path][j] for path, j in zip(errors, frontier.chosen[picked].tolist())
    }


def _errors(allocation: Allocation, traces: dict[str, float]) -> dict[str, list[float]]:
    """α_type·tr(F)·‖Q_b(W) − W‖²/(N·K) of each choice."""
    calibration = allocation.calibration
    probe = calibration.reference.twin()
    losses: dict[str, list[float]] = {}
    of_types: dict[str, list[float]] = {}
    for path, trace in traces.items():
        linear = probe.linears[path]
        own = []
        for choice in allocation.choices:
            allocation.setting(path, choice)(linear)
            own.append(trace * _lost(linear))
        losses[path] = own
        at_recipe = trace * _lost(calibration.sim.linears[path])
        of_types.setdefault(calibration.sim.sites[path].role, []).append(at_recipe)
    mean = {role: sum(values) / len(values) or 1.0 for role, values in of_types.items()}
    return {path: [e / mean[calibration.sim.sites[path].role] for e in own] for path, own in losses.items()}


def _lost(linear: SimLinear) -> float:
    """‖Q(W) − W‖²/(N·K)"""
    with torch.no_grad():
        return float((linear.codes() * linear.quant.scale.unsqueeze(1) - linear.weight).square().mean())


def _measure(calibration: Calibration, options: FisherOptions, images: Tensor, logits: Tensor) -> float:
    """The error of the quantized model against the float ``logits``."""
    with torch.no_grad():
        found = torch.cat([calibration.sim(part) for part in calibration.batches(images)])
    return distance(logits, found, options.metric)


def _updated(
    allocation: Allocation, chosen: dict[str, int], error: float, images: Tensor, logits: Tensor
) -> dict[str, int]:
    """The program's solution among ``chosen``, whose ``error`` is given, and each layer's neighbours of it."""
    calibration, options, choices = allocation.calibration, allocation.options, allocation.choices
    offered = {path: [k for k in (j, j - 1, j + 1) if 0 <= k < len(choices)] for path, j in chosen.items()}
    errors: dict[str, list[float]] = {}
    for block in blocks(calibration):
        paths = [site.path for site in block.linears]
        settings = {p: [allocation.setting(p, choices[j]) for j in offered[p][1:]] for p in paths}
        restore = {p: allocation.setting(p, choices[chosen[p]]) for p in paths}
        moved = block_sensitivities(
            calibration.sim, block, images, logits, settings, options.metric, calibration.batch, restore
        )
        errors |= {path: [error, *own] for path, own in moved.items()}
    return _solve(allocation, errors, offered)
