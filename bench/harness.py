"""One case: checked first, then timed in turn with its baseline. A row per pair of ours and a baseline."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from vitq.bench.latency import Timing, interleave, threads

from .registry import Benchmark, Prepared


def measure(
    bench: Benchmark, case: str, n_threads: int, seconds: float, peer: str | None = None, rounds: int = 200
) -> list[dict[str, Any]]:
    """Rows of one case.

    Args:     seconds: about how long each contender may take; peer: whom to add; rounds: at most so many.
    Returns:  see :func:`rows_of`.
    Raises:   AssertionError: a result of ours is wrong; nothing was timed. registry.Absent: the peer cannot take part.
    """
    with torch.inference_mode(), threads(n_threads):
        prepared = bench.prepare(case, peer) if bench.peers else bench.prepare(case)
        samples = interleave(prepared.calls, seconds, rounds, prepared.turn)
    return rows_of({"bench": bench.name, "case": case, "threads": n_threads}, prepared, samples, peer)


def rows_of(
    key: dict[str, Any], prepared: Prepared, samples: dict[str, list[float]], peer: str | None
) -> list[dict[str, Any]]:
    """A row per way of ours, against the peer if there is one, else against the baseline.

    ours_ms, p20, p80: milliseconds of ours. ratio: baseline_ms / ours_ms; ratio_p20, ratio_p80: of that ratio over the
    rounds, in each of which both were timed. baseline_speedup: of a peer, over the benchmark's own baseline. What is
    known ``about`` the two is prefixed with ours_ and baseline_.
    """
    first, *others = samples
    names = [name for name in others if name != peer]
    baseline = peer or first
    base = Timing.of(samples[baseline])
    rows = []
    for name in names:
        ours = Timing.of(samples[name])
        pairs = Timing.of([b / o for b, o in zip(samples[baseline], samples[name])])
        row = {
            **key, "ours": name, "ours_ms": ours.median, "baseline": baseline, "baseline_ms": base.median,
            "ratio": base.median / ours.median, "p20": ours.p20, "p80": ours.p80,
            "ratio_p20": pairs.p20, "ratio_p80": pairs.p80, "rounds": ours.calls,
        }  # fmt: skip
        if peer:
            row["baseline_speedup"] = statistics.median(samples[first]) / base.median
        for side, of in (("ours", name), ("baseline", baseline)):
            row |= {f"{side}_{k}": v for k, v in prepared.about.get(of, {}).items()}
        rows.append(row)
    return rows
