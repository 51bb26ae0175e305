"""The exact Pareto frontier of a sum of choices: what is lost against what it costs, at every budget at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST = 1_000_000


@dataclass(frozen=True)
class Component:
    """Something with a choice of its own.

    Args:
        name: of it.
        errors: Ω of each choice, finite.
        costs: [choice][axis] whole numbers ≥ 0 (bytes, bit operations, nanoseconds): sums of them are exact.
    """

    name: str
    errors: tuple[float, ...]
    costs: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.errors or len(self.errors) != len(self.costs):
            raise ValueError(
                f"component {self.name!r} has {len(self.errors)} errors and {len(self.costs)} costs, "
                "expected as many of each, at least one"
            )
        if not np.isfinite(self.errors).all():
            raise ValueError(f"component {self.name!r} has errors {self.errors}, expected finite numbers")
        for cost in self.costs:
            if any(isinstance(c, bool) or not isinstance(c, int) or c < 0 for c in cost):
                raise ValueError(f"component {self.name!r} has costs {cost}, expected whole numbers >= 0")


@dataclass(frozen=True)
class Frontier:
    """Every combination of choices that no other one beats in all costs and in error.

    Attributes:
        components: as given.
        costs: [P, A] int64, sorted lexicographically.
        errors: [P] float64, Σ Ω.
        chosen: [P, n] int16, index of each component's choice.
    """

    components: tuple[Component, ...]
    costs: np.ndarray
    errors: np.ndarray
    chosen: np.ndarray

    def __len__(self) -> int:
        return len(self.errors)

    def pick(self, limits: Sequence[int]) -> int:
        """Index of the point of least error whose costs are at most ``limits`` [A]; of equals the cheapest.

        Raises: ValueError if none fits, with the least cost there is.
        """
        if len(limits) != self.costs.shape[1]:
            raise ValueError(f"limits is {tuple(limits)}, expected one per cost axis ({self.costs.shape[1]})")
        fits = np.flatnonzero((self.costs <= np.array(limits)).all(1))
        if not len(fits):
            least = tuple(int(c) for c in self.costs.min(0))
            raise ValueError(f"limits is {tuple(limits)}, expected something that fits: the least costs are {least}")
        return int(fits[self.errors[fits].argmin()])


def pareto_frontier(components: Sequence[Component], most: int = MOST) -> Frontier:
    """min ΣΩ_i(b_i) at every budget: add components one at a time, keep (costs, ΣΩ), drop dominated pairs.

    Exact for an additive objective: a prefix that another one beats in every cost and in error stays beaten whatever
    follows, in floating point too (costs are integers, and rounded addition is monotone); errors are summed from the
    first component to the last in float64. Equal to the integer linear program's optimum at every budget.

    Args:
        components: with one or two cost axes, the same number each.
        most: a frontier of more points than this is refused: nothing is approximated.

    Complexity: with n components of at most b choices and at most P points after any of them, O(n·b·P·log(b·P)) time
    and O(n·P) memory. P is at most the number of distinct costs (one axis: Σ max cost / their greatest common divisor,
    some hundreds for bytes or BitOps of a ViT, whose layers repeat), of distinct pairs of costs with two axes.

    Raises:
        ValueError: no components, another number of axes, costs whose sum exceeds int64, or more than ``most`` points.
    """
    components = tuple(components)
    axes = {len(cost) for c in components for cost in c.costs}
    if not components or axes - {1, 2} or len(axes) != 1:
        raise ValueError(f"components have {sorted(axes)} cost axes, expected 1 or 2, the same for all")
    if max(sum(max(c.costs[j][a] for j in range(len(c.costs))) for c in components) for a in range(min(axes))) >> 62:
        raise ValueError("costs add up to more than 2^62, expected a coarser unit")
    costs, errors = np.zeros((1, axes.pop()), np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # (point before, choice) of every point
    for component in components:
        own = np.array(component.costs, np.int64)
        before, count = len(errors), len(own)
        all_costs = (costs[:, None] + own).reshape(before * count, -1)
        all_errors = (errors[:, None] + np.array(component.errors)).reshape(-1)
        kept = _undominated(all_costs, all_errors)
        if len(kept) > most:
            raise ValueError(
                f"the frontier has {len(kept)} points at component {component.name!r}, expected at most {most}: "
                "budget one axis only, offer fewer bits, or raise the limit"
            )
        costs, errors = all_costs[kept], all_errors[kept]
        steps.append((kept // count, kept % count))
    chosen = np.empty((len(errors), len(components)), np.int16)
    point = np.arange(len(errors))
    for i, (parent, choice) in reversed(list(enumerate(steps))):
        chosen[:, i] = choice[point]
        point = parent[point]
    return Frontier(components, costs, errors, chosen)


def _undominated(costs: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Indices of the points that no other is at most as costly and as wrong as, sorted by cost; one of equals."""
    order = np.lexsort((errors, *costs.T[::-1]))
    errors = errors[order]
    if costs.shape[1] == 1:
        least = np.minimum.accumulate(errors)
        return order[np.concatenate([[True], errors[1:] < least[:-1]])]
    # By rising first cost: a staircase of rising second costs and falling errors holds all that can dominate.
    seconds: list[int] = []
    stairs: list[float] = []
    kept = []
    for index, second, error in zip(order.tolist(), costs[order, 1].tolist(), errors.tolist()):
        at = bisect_right(seconds, second)
        if at and stairs[at - 1] <= error:
            continue
        kept.append(index)
        start = at - 1 if at and seconds[at - 1] == second else at
        end = at
        while end < len(stairs) and stairs[end] >= error:
            end += 1
        seconds[start:end], stairs[start:end] = [second], [error]
    return np.array(kept)
