"""Warm-up: every Triton kernel that a model launches, compiled before the first request, on any machine.

``record`` runs the model on tensors of a shape alone, on a GPU that need not be there, and keeps what it would launch;
``compile_launches`` builds that into Triton's cache, under the keys that the launches themselves will look up.

Kernels are chosen by the nearest tuned shape and specialized on arguments that are 1 or multiples of 16. A batch size
that was not warmed up may therefore meet kernels that were not, each compiled when it is first launched.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .. import backends
from ..tuning import slug
from . import host
from .host import Gpu

GPUS = (
    Gpu(80, "NVIDIA A100-SXM4-40GB", 108),
    Gpu(80, "NVIDIA A100-SXM4-80GB", 108),
    Gpu(80, "NVIDIA A100 80GB PCIe", 108),
    Gpu(86, "NVIDIA GeForce RTX 3090", 82),
    Gpu(89, "NVIDIA L4", 58),
    Gpu(89, "NVIDIA L40S", 142),
    Gpu(89, "NVIDIA GeForce RTX 4090", 128),
    Gpu(90, "NVIDIA H200", 132),
    Gpu(90, "NVIDIA H100 80GB HBM3", 132),
    Gpu(90, "NVIDIA H100 PCIe", 114),
    Gpu(100, "NVIDIA B200", 148),
    Gpu(120, "NVIDIA GeForce RTX 5090", 170),
)
"""What drivers report. The first of a compute capability stands for all others of it."""


def find_gpu(name: str) -> Gpu:
    """The GPU that ``name`` means: "sm_90", or a name ("NVIDIA H200") or a part of one ("h200").

    Raises: ValueError for a name that fits none or several of ``GPUS``.
    """
    wanted = slug(name)
    if wanted.startswith("sm_"):
        # No name: the table of the capability serves, not one that was measured on some GPU of it.
        found = [Gpu(g.capability, "", g.processors) for g in GPUS if wanted == f"sm_{g.capability}"][:1]
    else:
        exact = [g for g in GPUS if wanted in (slug(g.name), slug(g.name).removeprefix("nvidia_"))]
        found = exact or [g for g in GPUS if wanted and wanted in slug(g.name)]
    if len(found) == 1:
        return found[0]
    known = [f"sm_{c}" for c in sorted({g.capability for g in GPUS})] + [g.name for g in GPUS]
    what = "that fits several GPUs, expected one" if found else "expected one"
    raise ValueError(f"gpu is {name!r}, {what} of {', '.join(g.name for g in found) or ', '.join(known)}")


def present() -> Gpu | None:
    """The current CUDA device, or None if there is none."""
    return host.gpu(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else None


@contextlib.contextmanager
def without_device(gpu: Gpu) -> Iterator[None]:
    """CUDA tensors inside have a shape, a dtype and a device, but no memory and no values; ``gpu`` serves them.

    What a model that is moved there runs, traces or exports is what it would on ``gpu``. For one thread at a time.
    Raises: ValueError where Triton kernels cannot serve ``gpu``.
    """
    if host.INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set, expected it unset: interpreted kernels are not compiled")
    with host.assuming(gpu):
        if reason := host.unavailable("cuda"):
            raise ValueError(f"gpu is {gpu.name or f'sm_{gpu.capability}'!r}, which triton cannot serve: {reason}")
        backends.forget()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                yield
        finally:
            backends.forget()


class _Kernels(TorchDispatchMode):
    """Ops run their Triton function, which records its launches, where tensors without values have it run the fake.
    What such a function computes on the CPU to choose by keeps its values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kernel, kwargs = host.kernels.get(func._schema.name), kwargs or {}
        if kernel is not None:
            with self:
                return kernel(*args)
        if any(_on_gpu(value) for value in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _on_gpu(value: object) -> bool:
    return isinstance(value, FakeTensor) or (isinstance(value, torch.device) and value.type == "cuda")


def record(model: nn.Module, shapes: Iterable[Sequence[int]], gpu: Gpu, dtype: torch.dtype) -> list[host.Launch]:
    """What ``model`` launches on ``gpu`` for inputs of ``shapes`` and activations of ``dtype``, in order.

    Args:   model: the integer model on the CPU, in eval mode; it is left as it is.
    Raises: ValueError where Triton kernels cannot serve ``gpu``.
    """
    model = copy.deepcopy(model)
    with without_device(gpu), torch.no_grad():
        placed = model.to("cuda", dtype)
        with host.recorded(run=False) as launches, _Kernels():
            for shape in shapes:
                placed(torch.empty(tuple(shape), device="cuda", dtype=dtype))
    return launches


@contextlib.contextmanager
def _parsing_in_turns() -> Iterator[None]:
    """Threads parse kernels one at a time: Python 3.11 counts the depth of all threads' syntax trees as one, and
    raises "AST constructor recursion depth mismatch" where a thread stops another in the middle."""
    from triton import JITFunction

    turn, parse = threading.Lock(), JITFunction.parse

    def in_turn(kernel: JITFunction) -> ast.Module:
        with turn:
            return parse(kernel)

    JITFunction.parse = in_turn
    try:
        yield
    finally:
        JITFunction.parse = parse


def compile_launches(
    launches: Sequence[host.Launch], gpu: Gpu, progress: Callable[[int, int], None] | None = None
) -> set[str]:
    """Compiles all ``launches`` into Triton's cache (``TRITON_CACHE_DIR``), in as many threads as there are cores.

    Args:    progress: called with (launches done, launches in all).
    Returns: the cache keys of the kernels: fewer than launches, which share them.
    """
    import triton  # an import of seconds

    from . import aot

    keys, here = set(), gpu == present()
    with (
        _parsing_in_turns(),
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        triton.AsyncCompileMode(pool),
    ):
        kernels = [aot.build(launch, gpu.capability) for launch in launches]
        for done, kernel in enumerate(kernels, 1):
            if isinstance(kernel, triton.FutureKernel):
                kernel = kernel.result()
            keys.add(kernel.hash)
            if here:
                kernel._init_handles()  # loads it; triton 3.6 then also compiles its launcher, in C
            if progress is not None:
                progress(done, len(launches))
    return keys


def cache_folder() -> str:
    """Where Triton keeps compiled kernels."""
    import triton

    return triton.knobs.cache.dir
