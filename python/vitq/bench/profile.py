"""Where the time of a model goes: per operator and per layer, beside what the machine needs at least."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vitq_kernels.packing import LAYOUTS

from .host import Host
from .latency import Timing, threads

FLOAT = "float32"


def _linear(a: dict[str, Any]) -> dict[str, float]:
    """Multiplications and additions of the integer product, and of the branches before and behind it."""
    m, n, k = a["x"].numel() // max(a["k"], 1), a["n"], a["k"]
    # Nibbles with a table are looked up and multiplied as bytes.
    operand = "int4" if LAYOUTS[a["layout"]].startswith("int4") and a["w_lut"] is None else "int8"
    up, down = a.get("lora_up"), a.get("lora_down")
    branch = 2 * m * n * (0 if up is None else up.shape[1])
    return {operand: 2 * m * n * k, FLOAT: branch + _project(m, n, down, a.get("subspace"))}


def _project(m: int, k: int, down: Tensor | None, subspace: bool | None) -> int:
    return 0 if down is None else 2 * m * k * down.shape[0] * (2 if subspace else 1)


def _rows(a: dict[str, Any]) -> dict[str, float]:
    k = a["x"].shape[-1]
    return {FLOAT: _project(a["x"].numel() // max(k, 1), k, a["lora_down"], a["subspace"])}


def _attention(a: dict[str, Any]) -> dict[str, float]:
    b, h, n, d = a["q"].shape
    return {"int8": 4 * b * h * n * a["k"].shape[2] * d}


def _weight_only(a: dict[str, Any]) -> dict[str, float]:
    counts = _linear(a)
    return {FLOAT: sum(counts.values())}


#: Operations of ours by their arguments; those of torch are in its own registry, where they multiply.
OPERATIONS: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {
    "qlinear": _linear,
    "qlinear_quantize": _linear,
    "qlinear_weight_only": _weight_only,
    "quantize": _rows,
    "layer_norm_quantize": _rows,
    "qattention": _attention,
    "qattention_quantize": _attention,
}


@dataclass
class Call:
    """One operator of one forward pass.

    Attributes: layer: path of the module whose parameters it reads, else of the one that called it. shape: of its first
    tensor. bytes: of tensors read and written, once each. operations: by operand. samples: milliseconds, one per pass.
    """

    op: str
    layer: str
    shape: tuple[int, ...]
    bytes: int
    operations: dict[str, float]
    samples: list[float] = field(default_factory=list)


class _Recorder(TorchDispatchMode):
    """Times every operator; views cost nothing and are left out."""

    def __init__(self, owners: dict[int, str], module: list[str]) -> None:
        super().__init__()
        self.owners, self.module = owners, module
        self.calls: list[tuple[Call, float]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        start = time.perf_counter()
        out = func(*args, **kwargs)
        milliseconds = (time.perf_counter() - start) * 1e3
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {x.untyped_storage().data_ptr() for x in inputs}
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.numel()]
        fresh = [x for x in written if x.untyped_storage().data_ptr() not in known]
        if fresh or func._schema.is_mutable:
            self.calls.append((self._call(func, args, kwargs, out, inputs, fresh or written), milliseconds))
        return out

    def _call(self, func, args, kwargs, out, inputs: list[Tensor], written: list[Tensor]) -> Call:
        name = func._schema.name.rpartition("::")[2]
        named = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
        if func.namespace.startswith("vitq"):
            operations = OPERATIONS[name](named) if name in OPERATIONS else {}
        else:
            count = flop_registry.get(func._overloadpacket)
            operations = {} if count is None else {FLOAT: count(*args, **kwargs, out_val=out)}
        # Its own weight says whose it is; what a fused quantizer reads may be the next layer's.
        candidates = [named["weight"]] if isinstance(named.get("weight"), Tensor) else inputs
        owned = [self.owners[x.data_ptr()] for x in candidates if x.data_ptr() in self.owners]
        layer = owned[0].removesuffix(".input") if owned else self.module[-1]
        distinct = {x.data_ptr(): x.numel() * x.element_size() for x in (*inputs, *written)}
        shape = tuple(inputs[0].shape) if inputs else ()
        return Call(name, layer, shape, sum(distinct.values()), {k: v for k, v in operations.items() if v})


@contextmanager
def _entered(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keeps the path of the module that runs on top of ``stack``."""
    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: stack.append(path)))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def calls_of(model: nn.Module, images: Tensor, n_threads: int, passes: int = 5) -> tuple[list[Call], Timing]:
    """The operators of a forward pass in order with a sample per pass, and the whole pass timed without them.

    Args: model: in eval mode; images [B, C, H, W].
    Raises: RuntimeError for a model whose passes differ in their operators.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    owners = {tensor.data_ptr(): name.rpartition(".")[0] for name, tensor in tensors if tensor.numel()}
    calls: list[Call] = []
    whole = []
    with torch.no_grad(), threads(n_threads):  # inference mode would hide what linear and attention consist of
        model(images)
        for _ in range(passes):
            start = time.perf_counter()
            model(images)
            whole.append((time.perf_counter() - start) * 1e3)
            stack = [""]
            with _entered(model, stack), _Recorder(owners, stack) as recorder:
                model(images)
            seen = [(call.op, call.layer, call.shape) for call, _ in recorder.calls]
            if calls and seen != [(call.op, call.layer, call.shape) for call in calls]:
                raise RuntimeError("two passes of the model consist of different operators, expected the same ones")
            calls = calls or [call for call, _ in recorder.calls]
            for call, (_, milliseconds) in zip(calls, recorder.calls):
                call.samples.append(milliseconds)
    return calls, Timing.of(whole)


def summary(calls: Iterable[Call], by: Callable[[Call], str], host: Host | None) -> list[dict[str, Any]]:
    """A row per group of calls: calls, ms (medians, summed), share, MB, Gop, GB/s, Gop/s.

    With a host also floor_ms (the larger of moving the bytes and computing, summed over the calls), of_floor (that over
    the time) and bound (which of the two the floor mostly is).
    """
    groups: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        groups[by(call)].append(call)
    times = {name: sum(statistics.median(c.samples) for c in group) for name, group in groups.items()}
    total = math.fsum(times.values())
    rows = []
    for name, group in groups.items():
        ms, moved = times[name], sum(c.bytes for c in group)
        operations = sum(sum(c.operations.values()) for c in group)
        row = {
            "name": name, "calls": len(group), "ms": ms, "share": ms / total, "mb": moved / 1e6,
            "gop": operations / 1e9, "gb_s": moved / ms * 1e-6, "gop_s": operations / ms * 1e-6,
        }  # fmt: skip
        if host is not None:
            floors = [host.times(c.bytes, c.operations) for c in group]
            units = {unit: sum(f[unit] for f in floors if f[unit] == max(f.values())) for unit in floors[0]}
            floor = sum(units.values()) * 1e3
            row |= {"floor_ms": floor, "of_floor": floor / ms, "bound": max(units, key=units.get)}
        rows.append(row)
    return rows


def profile(model: nn.Module, images: Tensor, n_threads: int, host: Host | None, passes: int = 5) -> dict[str, Any]:
    """Time per layer and per operator of ``model`` on ``images``, as plain JSON values.

    Returns: batch, threads, ms (the whole pass, nothing recorded), recorded_ms (the sum of the operators; the rest is
             Python between them), ops and layers (rows of :func:`summary`, the longest first), host (its ceilings, or
             None).
    """
    calls, whole = calls_of(model, images, n_threads, passes)
    ops, layers = (summary(calls, by, host) for by in (lambda c: c.op, lambda c: c.layer or "(model)"))
    return {
        "batch": images.shape[0],
        "threads": n_threads,
        "ms": whole.median,
        "p20": whole.p20,
        "p80": whole.p80,
        "recorded_ms": math.fsum(row["ms"] for row in ops),
        "ops": sorted(ops, key=lambda row: -row["ms"]),
        "layers": sorted(layers, key=lambda row: -row["ms"]),
        "host": None if host is None else host.record(),
    }
