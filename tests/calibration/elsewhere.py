"""For tests only: a second device without hardware. Its tensors lie on the CPU, but refuse what a GPU refuses, too: ops
of tensors on two devices, except for single numbers among elements and CPU indices into a tensor of the device.

The device is one of torch's "private use", which a process has for good once it is registered: its tests run in a
process of their own (see test_devices.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "elsewhere"

aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Take CPU indices."""
WHOLE = {aten.cat.default, aten.stack.default}
"""Take no single number from another device either."""
COMPOSED = {torch.quantile, torch.Tensor.quantile, torch.nn.functional.adaptive_avg_pool1d}
"""Change the shape of a tensor in place on their way, which a wrapper cannot."""


class Elsewhere(torch.Tensor):
    """A tensor of the device, whose data are ``here``."""

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Elsewhere:
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device(NAME, 0),
        )
        out.here = here
        return out

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in COMPOSED:
            return run(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, Elsewhere):
            raise AssertionError("data are set to a tensor on another device")
        torch.Tensor.data.__set__(self, value)
        self.here = value.here

    def tolist(self) -> Any:
        return self.here.tolist()

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        if id(self) not in memo:
            copied = Elsewhere(self.here.clone())
            parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if parameter else copied
        return memo[id(self)]

    def __repr__(self) -> str:
        return f"Elsewhere({self.here})"


def _each(fn: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with ``fn`` of everything in its lists, tuples and dicts."""
    if isinstance(value, (list, tuple)):
        return type(value)([_each(fn, v) for v in value])
    if isinstance(value, dict):
        return {k: _each(fn, v) for k, v in value.items()}
    return fn(value)


def run(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``func`` on the data of its arguments. Raises: AssertionError for tensors on two devices."""
    remote: dict[int, Elsewhere] = {}
    local: list[torch.Tensor] = []

    def inner(value: Any) -> Any:
        if isinstance(value, Elsewhere):
            remote[id(value.here)] = value
            return value.here
        if isinstance(value, torch.Tensor):
            local.append(value)
        return value

    given, named = _each(inner, args), _each(inner, kwargs)
    to = named.get("device")
    there = bool(remote) if to is None else torch.device(to).type == NAME
    if func is aten.copy_.default:
        there = isinstance(args[0], Elsewhere)
    elif remote and to is None:
        _refuse_mixtures(func, args, local)
        if torch.Tag.inplace_view in getattr(func, "tags", ()):
            raise NotImplementedError(f"{func} of a wrapper")
    if to is not None:
        named["device"] = torch.device("cpu")
    crossing = there != bool(remote)

    def outer(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if crossing and any(value is t for t in (*local, *(t.here for t in remote.values()))):
            value = value.clone()  # there is no other device's memory to share
        if not there:
            return value
        return remote[id(value)] if id(value) in remote else Elsewhere(value)

    out = func(*given, **named)
    return args[0] if func is aten.copy_.default else _each(outer, out)


def _refuse_mixtures(func: Callable, args: tuple, local: list[torch.Tensor]) -> None:
    ours = getattr(func, "namespace", "aten") != "aten"
    foreign = [t for t in local if t.dim() or func in WHOLE or ours]
    if func in INDEXING and isinstance(args[0], Elsewhere):
        values = args[2] if len(args) > 2 else None
        foreign = [t for t in foreign if t is values]
    if foreign:
        raise AssertionError(f"{func} of tensors on two devices, one of shape {tuple(foreign[0].shape)} on the CPU")


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register() -> None:
    """Makes ``NAME`` a device of this process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Inside, tensors may be made on and moved to ``NAME``."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=NAME) is seen to move what it made
    try:
        with torch.autograd.set_multithreading_enabled(False), _Mode():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
