"""allocate.greedy: bits lowered one layer at a time, by what the logits lose for what is saved (MPTQ-ViT).

MPTQ-ViT (arXiv 2401.14895): greedy mixed precision that weighs the model's performance against its compression [P].
Reconstructed [R]: all layers start at the most bits; while the budget is exceeded, the layer whose next lower
candidate loses least error of the logits per cost saved takes it; candidates that save nothing (several share one
time) are passed over. Errors are those of each layer quantized alone, as in ``allocate.pareto``, whose exact optimum
bounds what greed can reach. A layer's scales at its bits are searched anew by
squared error, whatever stage found the old ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..allocation.frontier import Component
from .base import Calibration, method
from .bits import Allocation, ProbeOptions, sensitivities


class GreedyOptions(ProbeOptions):
    """As in ProbeOptions; ``activation_bits`` is ``tied`` or ``fixed``: steps go down one ladder of candidates."""


@method("allocate", "greedy")
def greedy(calibration: Calibration, options: GreedyOptions) -> None:
    """Leaves the bits in the layers' formats, with the measured errors as ``metrics["allocation"]``."""
    if options.activation_bits == "free":
        raise ValueError("allocate.greedy has activation_bits 'free', expected 'tied' or 'fixed'")
    allocation = Allocation(calibration, options)
    omega = sensitivities(allocation, calibration.reference.twin())
    components = allocation.components(omega)
    chosen = lower(components, [int(limit) for limit in allocation.limits().values()])
    if chosen is None:
        axes = range(len(allocation.limits()))
        raise allocation.too_small([sum(min(cost[a] for cost in c.costs) for c in components) for a in axes])
    chosen = dict(zip(omega, chosen))
    allocation.give(chosen)
    allocation.note(chosen, sensitivity=omega)


def lower(components: Sequence[Component], limits: Sequence[int]) -> list[int] | None:
    """Indices of the components' choices, from the last ones down until the costs fit; None if they never do.

    Each step: the least (error gained)/(cost saved), the first of equals; a cost counts as a fraction of its limit, and
    only where that is exceeded.

    Args: components: choices by rising bits; one that costs no less than where a component is, is passed over.
    """
    at = [len(c.errors) - 1 for c in components]
    while True:
        spent = [sum(c.costs[j][a] for c, j in zip(components, at)) for a in range(len(limits))]
        over = [a for a, limit in enumerate(limits) if spent[a] > limit]
        if not over:
            return at
        steps: dict[int, tuple[float, int]] = {}
        for i, (c, now) in enumerate(zip(components, at)):
            for j in reversed(range(now)):
                saved = sum((c.costs[now][a] - c.costs[j][a]) / max(limits[a], 1) for a in over)
                if saved > 0:
                    steps[i] = (c.errors[j] - c.errors[now]) / saved, j
                    break
        if not steps:
            return None
        best = min(steps, key=lambda i: steps[i][0])
        at[best] = steps[best][1]
