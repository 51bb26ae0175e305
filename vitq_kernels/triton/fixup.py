"""Finishing a row tile inside the launch that computes it: what needs whole rows, behind tiles that hold parts of them.

Every program of a row tile stores its part to memory and calls :func:`arrive`. The last one to come finishes the
tile's rows, in units that :func:`take` hands out, and all call :func:`leave`, which leaves the counters zero again.
``host.counters`` provides ``COUNTERS`` of them per row tile.

Why the finishing program sees every part: its threads' loads come after those threads' stores in causality order.

* A program's stores precede its ``debug_barrier`` and with it the one thread that counts up: releasing at gpu scope, it
  releases them all.
* Whoever reads the full count acquires from every earlier increment (they are one chain of read-modify-writes), and the
  broadcast of the count to the other threads is a barrier again. Neither compiler moves loads above it; acquiring
  also drops the lines that this processor's first-level cache holds of what others wrote since.

Nobody waits for a program that may not be running. Those for whom waiting is free, because no program is queued behind
them, look a few times whether the tile has become complete and then take units as well: at the end of a launch, when
most processors are idle, a row tile is finished by several.
"""

from __future__ import annotations

import triton
import triton.language as tl

COUNTERS = tl.constexpr(3)
"""Per row tile: programs that have arrived, units taken, programs that have left."""
LOOKS = tl.constexpr(8)
"""How often a program that may wait looks; estimated half a microsecond each: tiles of a wave end closer together."""


@triton.jit
def arrive(counters, programs, patient):
    """True if all ``programs`` of the row tile have arrived, now or, where this one is ``patient``, soon."""
    tl.debug_barrier()
    arrived = tl.atomic_add(counters, 1, sem="acq_rel", scope="gpu") + 1
    looks = tl.where(patient, LOOKS, 0)
    while (arrived < programs) & (looks > 0):
        arrived = tl.atomic_add(counters, 0, sem="acquire", scope="gpu")
        looks -= 1
    return arrived == programs


@triton.jit
def take(counters):
    """The next unit of a complete row tile; units have no order, and one too many says that none is left."""
    return tl.atomic_add(counters + 1, 1, sem="relaxed", scope="gpu")


@triton.jit
def leave(counters, programs):
    """The last program to leave, after which none looks at the counters, resets them for the next launch."""
    left = tl.atomic_add(counters + 2, 1, sem="acq_rel", scope="gpu") + 1
    if left == programs:
        tl.store(counters, 0)
        tl.store(counters + 1, 0)
        tl.store(counters + 2, 0)
