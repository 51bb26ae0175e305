"""What can be timed. A benchmark is a function that prepares a case; it is known once its module is imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


class Absent(Exception):
    """A peer that cannot take part; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """One case, built and checked.

    Attributes:
        calls: name → what is timed; the baseline first, then a peer if one is asked for, then ours.
        about: name → further columns of its rows, plain JSON values (accuracy, size).
        turn: seconds per turn, see ``vitq.bench.latency.interleave``.
    """

    calls: dict[str, Callable[[], object]]
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    turn: float = 0.0


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        prepare: (case) or, where ``peers``, (case, peer or None) → Prepared. It checks our results against an oracle
            first. Raises: AssertionError for a wrong one; Absent for a peer that cannot take part.
        cases: names of the cases; quick: those of a quick run.
    """

    name: str
    prepare: Callable[..., Prepared]
    cases: tuple[str, ...]
    quick: tuple[str, ...]
    peers: bool = False


benchmarks: dict[str, Benchmark] = {}


def benchmark(name: str, cases: Sequence[str], quick: Sequence[str], peers: bool = False) -> Callable:
    """Register ``prepare`` as benchmark ``name``. Raises: ValueError if the name is taken."""

    def register(prepare: Callable[..., Prepared]) -> Callable[..., Prepared]:
        if name in benchmarks:
            raise ValueError(f"benchmark {name!r} is registered already")
        benchmarks[name] = Benchmark(name, prepare, tuple(cases), tuple(quick), peers)
        return prepare

    return register


@dataclass(frozen=True)
class Peer:
    """Another way to run a float model.

    Attributes:
        build: (float model in eval mode, calibration images [B, C, H, W], example batch, threads) → what maps such a
            batch to logits. It leaves the model as it was. Raises: Absent.
        needs: modules to import, as ``pip install .[bench]`` brings them.
        overrides: environment variables that hold the peer to AVX2, {} where it follows torch's; None where nothing
            does, so that it has no place beside kernels that are held to AVX2.
    """

    name: str
    build: Callable[..., Callable[[Any], Any]]
    needs: tuple[str, ...] = ()
    overrides: dict[str, str] | None = field(default_factory=dict)


peers: dict[str, Peer] = {}


def peer(name: str, needs: Sequence[str] = (), overrides: dict[str, str] | None = {}) -> Callable:  # noqa: B006
    """Register ``build`` as peer ``name``. Raises: ValueError if the name is taken."""

    def register(build: Callable) -> Callable:
        if name in peers:
            raise ValueError(f"peer {name!r} is registered already")
        peers[name] = Peer(name, build, tuple(needs), overrides)
        return build

    return register
