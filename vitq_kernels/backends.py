"""Which implementation serves a call: one table, resolved from metadata, never by trying and falling back.

An implementation is registered per op as ``(name, unavailable(device), supports(**meta))``; both answer None for yes
or the reason why not. ``resolve`` walks the preference order of the device and raises an error that lists every reason
if nothing serves the call. ``VITQ_BACKEND=<name>`` (read at import) or ``with backend(name)`` pin the choice; a pinned
back end that does not serve the call is an error, too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NAMES = ("cuda", "triton", "cpu", "ref")
_PREFERENCE = {"cuda": ("cuda", "triton", "ref"), "cpu": ("cpu", "ref")}


@dataclass(frozen=True)
class Implementation:
    """One back end's kernel of one op.

    Args:
        name: one of ``NAMES``.
        fn: takes the op's flat schema arguments.
        unavailable: device type → None, or why this back end cannot run there at all.
        layouts: weight layouts that ``fn`` reads (empty for ops without a weight), best first.
    """

    name: str
    fn: Callable
    unavailable: Callable[[str], str | None]
    layouts: tuple[str, ...] = ()


# Read once: a look-up of the environment in every call costs as much as a small kernel.
_ENVIRONMENT = os.environ.get("VITQ_BACKEND")

_table: dict[str, dict[str, Implementation]] = {}
_override: list[str] = []


def register(op: str, implementation: Implementation) -> None:
    """Add ``implementation`` to ``op``'s row of the table (once per name)."""
    if implementation.name not in NAMES:
        raise ValueError(f"name is {implementation.name!r}, expected one of {NAMES}")
    row = _table.setdefault(op, {})
    if implementation.name in row:
        raise ValueError(f"back end {implementation.name!r} of {op} is registered already")
    row[implementation.name] = implementation


def _checked(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where} is {name!r}, expected one of {', '.join(NAMES)}")
    return name


def pinned() -> str | None:
    """The back end that ``with backend(...)`` or ``VITQ_BACKEND`` asks for, or None."""
    if _override:
        return _override[-1]
    return _checked(_ENVIRONMENT, "VITQ_BACKEND") if _ENVIRONMENT else None


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Pin every call inside to one back end: ``with backend("ref"): model(x)``."""
    _override.append(_checked(name, "backend"))
    try:
        yield
    finally:
        _override.pop()


def resolve(op: str, device: str, layout: str | None = None) -> Implementation:
    """The implementation of ``op`` that serves tensors on ``device`` (and weights in ``layout``).

    Raises: ValueError listing every back end with its reason if none serves the call.
    """
    row = _table[op]
    want = pinned()
    names = (want,) if want else _PREFERENCE.get(device, ("ref",))
    reasons = []
    for name in names:
        impl = row.get(name)
        if impl is None:
            reasons.append(f"{name}: has no {op}")
            continue
        reason = impl.unavailable(device)
        if reason is None and layout is not None and layout not in impl.layouts:
            reason = f"reads weight layouts {', '.join(impl.layouts)}, not {layout}"
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
