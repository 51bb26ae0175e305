"""Which calls the C++ GPU kernels serve unasked: those in which a committed measurement saw them beat Triton's.

``<gpu>.cuda.json`` beside this file, which bench/update_docs.py makes of what ``make gpu-check`` measured on that GPU:
``{"gpu", "commit", "date", "rows": [[op, weight layout or "", *sizes, speedup], ...]}``, sizes as ``backends.resolve``
takes them (M, or what else a request changes, first), speedup the least one over Triton of all that was timed at them.
A call is judged by the rows whose sizes behind M are nearest, and among those by the nearest M, on a log scale. A GPU
without such a file has Triton's kernels serve every call.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from functools import cache
from pathlib import Path

import torch

from ..triton import host
from . import slug

LEAST = 1.03
"""Speed-up from which on it is one: two medians of the same kernel differ by less."""
ENDING = ".cuda.json"
FOLDER = Path(__file__).parent

Ranges = tuple[tuple[float, bool], ...]
"""(up to this M, whether the C++ kernel serves) in the order of M; the last one is infinite."""


@cache
def _table(gpu: str) -> dict[tuple[str, str], tuple[tuple[tuple[int, ...], Ranges], ...]]:
    """(op, layout) → (sizes behind M, ranges of M) of the file of a GPU, if there is one."""
    path = FOLDER / f"{slug(gpu)}{ENDING}"
    if not path.exists():
        return {}
    found = defaultdict(lambda: defaultdict(list))
    for op, layout, m, *rest, speedup in json.loads(path.read_text())["rows"]:
        found[op, layout][tuple(rest)].append((m, speedup >= LEAST))
    return {key: tuple((rest, _ranges(sorted(won))) for rest, won in sizes.items()) for key, sizes in found.items()}


def _ranges(won: list[tuple[int, bool]]) -> Ranges:
    """Each measured M reaches halfway to the next, on a log scale."""
    ends = [math.sqrt(a * b) for (a, _), (b, _) in itertools.pairwise(won)]
    return tuple((end, yes) for end, (_, yes) in zip([*ends, math.inf], won))


def _measured(op: str, layout: str) -> tuple[tuple[tuple[int, ...], Ranges], ...]:
    name = host.name()
    return () if name is None else _table(name).get((op, layout), ())


_measured._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import the compiler


def _nearest(op: str, layout: str, rest: tuple[int, ...]) -> Ranges:
    best, least = (), math.inf
    for sizes, ranges in _measured(op, layout):
        apart = 1.0
        for a, b in zip(sizes, rest):
            apart *= max(a, b, 1) / max(min(a, b), 1)
        if apart < least:
            best, least = ranges, apart
    return best


_remembered = cache(_nearest)


def forget() -> None:
    """Read the files anew."""
    _table.cache_clear()
    _remembered.cache_clear()


def cuda_serves(op: str, layout: str | None, sizes: tuple[int, ...]) -> bool:
    """Whether the C++ kernel is to serve such a call on this machine's GPU, if it can.

    A compiled graph that serves several M guards on the range; an exported one takes the C++ kernel only where it wins
    at every M.
    """
    if host.assumed():  # another GPU is compiled for, whose Triton kernels are wanted
        return False
    m, *rest = sizes
    nearest = _nearest if torch.compiler.is_compiling() else _remembered
    ranges = nearest(op, layout or "", tuple(rest))
    if torch.compiler.is_exporting():
        return bool(ranges) and all(won for _, won in ranges)
    for end, won in ranges:
        if m <= end:
            return won
    return False


def cuda_serves_some(op: str, layout: str, rest: tuple[int, ...]) -> bool:
    """Whether there is an M for which it does."""
    return not host.assumed() and any(won for _, won in _remembered(op, layout, rest))
