"""The operator library ``vitq`` and what every op shares: checks, and the flat arguments of a quantizing epilogue.

An op runs in two steps. What belongs to a layer (weights, scales, formats) is *prepared*: checked and put into schema
order once. A run checks what belongs to the call, unless its tensors are of the dtypes, shapes and devices of the call
before. The public functions take both steps, modules keep the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _cuda, _native, backends
from ..formats import ActQuant, QTensor
from ..packing import LAYOUTS
from ..triton import host

library = torch.library.Library("vitq", "DEF")

QUANT_ARGS = (
    "Tensor? scale, int zero_point, int qmin, int qmax, int groups, "
    "Tensor? row_qmax, Tensor? lut, Tensor? lora_down, bool subspace"
)


_defined: dict[str, tuple[str, Callable]] = {}  # op -> its schema and its fake


def define(
    name: str,
    args: str,
    returns: str,
    ref: Callable,
    fake: Callable,
    layouts: tuple[str, ...] = (),
    composition: Callable | None = None,
) -> None:
    """Define ``vitq::name``, its fake, its plain-torch default, and the two CPU-side rows of the back-end table.

    The default kernel serves any device, so that the op exists (for export, opcheck, ``ref`` installs) without native
    code; a compiled kernel takes precedence for its own dispatch key. An op without one is a ``composition`` of ops
    that have one: its default, and called past the dispatcher for the CPU.
    """
    _defined[name] = f"{name}({args}) -> {returns}", fake
    library.define(_defined[name][0], tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, composition or ref, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vitq::{name}", fake, lib=library)
    cpu = composition or getattr(torch.ops.vitq, name).default
    cpu_layouts = tuple(f"{x}_n16k4" for x in layouts)
    backends.register(name, backends.Implementation("cpu", cpu, _native.unavailable, cpu_layouts))
    backends.register(name, backends.Implementation("ref", ref, lambda device: None, _ref_layouts(layouts)))


def define_triton(
    name: str, module: str, layouts: tuple[str, ...] = (), slow: Callable[..., tuple[str, ...]] = lambda device: ()
) -> None:
    """Add the Triton row of ``vitq::name``, whose function of that name is in ``ops/<module>/triton.py``.

    On the GPU it is the op itself, as tracers want it; the interpreter is called past the dispatcher's CPU kernels.
    """
    kernel = host.implementation(name, module)
    if host.INSTALLED:
        library.impl(name, kernel, "CUDA")
    op = getattr(torch.ops.vitq, name).default
    fn = kernel if host.INTERPRETED else op
    backends.register(name, backends.Implementation("triton", fn, host.unavailable, layouts, slow))


def define_cuda(name: str, layouts: tuple[str, ...] = ()) -> None:
    """Add the row of the C++ GPU kernels: an op of their own, ``vitq_cuda::name``, of the same schema."""
    schema, fake = _defined[name]
    _cuda.library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"vitq_cuda::{name}", fake, lib=_cuda.library)
    op = getattr(torch.ops.vitq_cuda, name).default
    backends.register(name, backends.Implementation("cuda", op, _cuda.unavailable, layouts, _cuda.slow_layouts))


def _ref_layouts(layouts: tuple[str, ...]) -> tuple[str, ...]:
    return LAYOUTS if layouts else ()


def flatten(quant: ActQuant) -> tuple:
    """``quant`` in the order of ``QUANT_ARGS``."""
    return (
        quant.scale,
        quant.zero_point,
        quant.qmin,
        quant.qmax,
        quant.groups,
        quant.row_qmax,
        quant.lut,
        quant.lora_down,
        quant.subspace,
    )


def expect(name: str, tensor: Tensor, *, dtype=None, shape=None, device=None) -> None:
    """TypeError/ValueError naming ``name`` unless dtype, shape (None matches any size) and device fit."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}, expected a torch.Tensor")
    # Called several times per op: the common case is three comparisons.
    if dtype is not None and tensor.dtype is not dtype and not (type(dtype) is tuple and tensor.dtype in dtype):
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if shape is not None and tensor.shape != shape:
        sizes = tensor.shape
        if len(sizes) != len(shape) or any(w is not None and w != s for s, w in zip(sizes, shape)):
            want = ", ".join("any" if w is None else str(w) for w in shape)
            raise ValueError(f"{name} has shape {tuple(sizes)}, expected ({want})")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def metadata(tensor: Tensor | None) -> tuple | type:
    """What checks look at, to be compared: a run whose metadata passed before need not check again."""
    return (tensor.dtype, tensor.shape, tensor.device) if isinstance(tensor, Tensor) else type(tensor)


def rows(x: Tensor) -> int:
    """M: the product of the leading dimensions (well defined for K = 0, too)."""
    return math.prod(x.shape[:-1])


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: Products of int8 codes with an offset, |q_x − z| ≤ 255 and |q_w| ≤ 128, that an int32 holds the sum of.
MAX_TERMS = (2**31 - 1) // (255 * 128)


def expect_float(name: str, dtype: torch.dtype) -> None:
    """Raises: TypeError naming ``name`` unless ``dtype`` is one that float results may have."""
    if dtype not in FLOATS:
        raise TypeError(f"{name} is {dtype}, expected {' or '.join(map(str, FLOATS))}")


class Epilogue:
    """A prepared :class:`ActQuant`.

    Attributes:
        quant, args: the parameters, and the same flat in the order of ``QUANT_ARGS``.
        passed: what ``quantize`` or ``layer_norm_quantize`` keeps of the last call that it checked.
    """

    __slots__ = ("_fitting", "_per_row", "args", "passed", "quant")

    def __init__(self, quant: ActQuant) -> None:
        self.quant, self.args = quant, flatten(quant)
        self._per_row = quant.row_qmax is not None or (quant.scale is not None and quant.scale.dim() == 2)
        self._fitting = self.passed = None

    def fit(self, m: int, k: int, device: torch.device) -> tuple:
        """``args``, checked against the [M, K] values that they will quantize.

        Raises: TypeError, ValueError: a tensor of the epilogue whose dtype, shape or device does not fit.
        """
        case = (m if self._per_row else None, k, device)
        if case != self._fitting:
            self._check(m, k, device)
            self._fitting = case
        return self.args

    def _check(self, m: int, k: int, device: torch.device) -> None:
        quant = self.quant
        if k % quant.groups:
            raise ValueError(f"groups is {quant.groups}, expected a divisor of the {k} columns")
        if quant.scale is not None:
            shape = (m, quant.groups) if quant.scale.dim() == 2 else (quant.groups,)
            expect("quant.scale", quant.scale, dtype=torch.float32, shape=shape, device=device)
        if quant.row_qmax is not None:
            expect("quant.row_qmax", quant.row_qmax, dtype=torch.int32, shape=(m,), device=device)
        if quant.lut is not None:
            expect("quant.lut", quant.lut, dtype=torch.int8, shape=(256,), device=device)
        if quant.lora_down is not None:
            expect("quant.lora_down", quant.lora_down, dtype=FLOATS, shape=(None, k), device=device)

    def wrap(self, out: tuple[Tensor, Tensor, Tensor]) -> QTensor:
        """The op's three results (absent ones are empty) as a QTensor."""
        q, scale, t = out
        quant = self.quant
        return QTensor(
            q, scale if quant.scale is None else quant.scale, quant.zero_point, None if quant.lora_down is None else t
        )


def fake_quant_outputs(x: Tensor, shape, q_scale, groups: int, lora_down) -> tuple[Tensor, Tensor, Tensor]:
    """Fake results of a quantizing epilogue over values of ``shape``: codes, dynamic scales, t."""
    m = math.prod(shape[:-1])
    f32 = torch.float32
    q = x.new_empty(shape, dtype=torch.int8)
    scale = x.new_empty((m, groups) if q_scale is None else (0,), dtype=f32)
    t = x.new_empty((m, lora_down.shape[0]) if lora_down is not None else (0,), dtype=f32)
    return q, scale, t
