"""Which implementation serves a call: one table, resolved from metadata, never by trying and falling back.

An implementation is registered per op as ``(name, unavailable(device), supports(**meta))``; both answer None for yes
or the reason why not. ``resolve`` walks the preference order of the device and raises an error that lists every reason
if nothing serves the call. Between the two back ends of a GPU it goes by what was measured (``tuning.serving``). A
module's ``backend``, else ``with backend(name)``, else ``VITQ_BACKEND=<name>`` (read at import) pins the choice; a
pinned back end that does not serve the call is an error, too.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.compiler import is_compiling

from .tuning import serving

NAMES = ("cuda", "triton", "cpu", "ref")
# The C++ GPU kernels ("cuda") come before these where they were measured to win, and serve who asks for them.
_PREFERENCE = {"cuda": ("triton", "ref"), "cpu": ("cpu", "ref")}


@dataclass(frozen=True)
class Implementation:
    """One back end's kernel of one op.

    Args:
        name: one of ``NAMES``.
        fn: takes the op's flat schema arguments.
        unavailable: device type → None, or why this back end cannot run there at all (does not change in a process).
        layouts: weight layouts that ``fn`` reads (empty for ops without a weight), best first.
        slow: device → those of them that are no gain there.
    """

    name: str
    fn: Callable
    unavailable: Callable[[str], str | None]
    layouts: tuple[str, ...] = ()
    slow: Callable[[torch.device], tuple[str, ...]] = lambda device: ()

    def served(self, device: torch.device) -> tuple[str, ...]:
        """``layouts`` that are worth choosing on ``device``."""
        return tuple(layout for layout in self.layouts if layout not in self.slow(device))

    @property
    def branch(self) -> torch.dtype:
        """dtype in which modules hold low-rank branches for this back end: what its units multiply fastest."""
        return torch.float16 if self.name in ("triton", "cuda") else torch.float32


# Read once: a look-up of the environment in every call costs as much as a small kernel.
_ENVIRONMENT = os.environ.get("VITQ_BACKEND")

_table: dict[str, dict[str, Implementation]] = {}
_resolved: dict[tuple[str, str, str | None, str | None, bool], Implementation] = {}


class _Pin(threading.local):
    def __init__(self) -> None:
        self.name: str | None = None


_pin = _Pin()


def register(op: str, implementation: Implementation) -> None:
    """Add ``implementation`` to ``op``'s row of the table (once per name)."""
    if implementation.name not in NAMES:
        raise ValueError(f"name is {implementation.name!r}, expected one of {NAMES}")
    row = _table.setdefault(op, {})
    if implementation.name in row:
        raise ValueError(f"back end {implementation.name!r} of {op} is registered already")
    row[implementation.name] = implementation
    forget()


def forget() -> None:
    """Resolve anew: what may serve a device has changed."""
    _resolved.clear()
    serving.forget()


def table() -> dict[str, dict[str, Implementation]]:
    """A copy of the table: op → back end → implementation."""
    return {op: dict(row) for op, row in _table.items()}


def replace(op: str, implementation: Implementation) -> None:
    """Put ``implementation`` in the place of the one of its name, e.g. of an instrumented one."""
    if implementation.name not in _table.get(op, ()):
        raise ValueError(f"{op} has no back end {implementation.name!r} to replace")
    _table[op][implementation.name] = implementation
    forget()


def _checked(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where} is {name!r}, expected one of {', '.join(NAMES)}")
    return name


def pinned() -> str | None:
    """The back end that ``with backend(...)`` or ``VITQ_BACKEND`` asks for, or None."""
    return _pin.name or _ENVIRONMENT or None


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Pin every call inside, of this thread, to one back end: ``with backend("ref"): model(x)``."""
    outer, _pin.name = _pin.name, _checked(name, "backend")
    try:
        yield
    finally:
        _pin.name = outer


def resolve(
    op: str, device: str, layout: str | None = None, pin: str | None = None, sizes: tuple[int, ...] = ()
) -> Implementation:
    """The implementation of ``op`` that serves tensors on ``device`` (and weights in ``layout``).

    Args:   pin: the caller's own choice of a back end, which wins over :func:`pinned`.
            sizes: what the choice between two back ends of a GPU depends on: M, then N and K of a product, K of rows,
            keys and head_dim of an attention, whose M is the number of its heads.
    Raises: ValueError listing every back end with its reason if none serves the call.
    """
    want = pin or _pin.name or _ENVIRONMENT
    cuda = not want and device == "cuda" and bool(sizes) and serving.cuda_serves(op, layout, sizes)
    if is_compiling():  # a trace must neither guard on the memory of earlier calls nor write to it
        return _resolve(op, device, layout, want, cuda)
    key = (op, device, layout, want, cuda)
    found = _resolved.get(key)
    if found is None:
        found = _resolved[key] = _resolve(op, device, layout, want, cuda)
    return found


def layouts(op: str, device: torch.device, n: int, k: int, pin: str | None = None) -> tuple[str, ...]:
    """Weight layouts for an [N, K] layer of ``op`` on ``device``, best first.

    Those of the back end that serves it, behind those that only the C++ GPU kernels choose, where these win at some M;
    Triton's read them, too.
    """
    found = resolve(op, device.type, pin=pin).served(device)
    if (pin or pinned()) is None and device.type == "cuda" and "cuda" in _table[op]:
        cuda = _table[op]["cuda"]
        if winning := {x for x in cuda.layouts if x not in found and serving.cuda_serves_some(op, x, (n, k))}:
            found = (*(x for x in cuda.served(device) if x in winning), *found)
    return found


def _resolve(op: str, device: str, layout: str | None, want: str | None, cuda: bool) -> Implementation:
    row = _table[op]
    if want:
        names = (_checked(want, "VITQ_BACKEND" if want == _ENVIRONMENT else "backend"),)
    else:
        names = ("cuda",) * cuda + _PREFERENCE.get(device, ("ref",))
    reasons = []
    for name in names:
        impl = row.get(name)
        if impl is None:
            reasons.append(f"{name}: has no {op}")
            continue
        reason = impl.unavailable(device)
        if reason is None and layout is not None and layout not in impl.layouts:
            # A back end that could serve the layer in another layout is not passed over for a slow one.
            reasons.append(f"{name}: reads weight layouts {', '.join(impl.layouts)}, not {layout} (repack the weight)")
            break
        if reason is None:
            return impl
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"no back end serves {op} on {device}: " + "; ".join(reasons))


def status() -> dict[str, str | None]:
    """For every back end: None if it is live on this machine for at least one op, else the reason why not."""
    out: dict[str, str | None] = {}
    for name in NAMES:
        device = "cpu" if name in ("cpu", "ref") else "cuda"
        reasons = [row[name].unavailable(device) for row in _table.values() if name in row]
        if not reasons:
            out[name] = "not built into this version"
        else:
            out[name] = None if None in reasons else reasons[0]
    return out
