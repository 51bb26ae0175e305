"""What the fused kernels compute in floating point before they round, each stage by itself.

Sums and transcendental functions round differently in every implementation, and a value beside a rounding boundary
then takes another code. A simulation that takes these stages from the back end that it is compared with meets the same
values at every boundary: its codes are the integer model's, all of them. Within one back end a fused op equals the
composition of its stages bit for bit; tests hold it to that. float32 only (float64 for the ``ref`` oracles).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from ...formats import FocusSpec
from .. import _schema
from ..qattention import check_mask, check_scale
from . import ref

_schema.define(
    "layer_norm",
    "Tensor x, Tensor? weight, Tensor? bias, float eps",
    "Tensor",
    ref.layer_norm,
    lambda x, weight, bias, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_schema.define(
    "project", "Tensor x, Tensor basis", "Tensor", ref.project, lambda x, d: x.new_empty(x.shape[0], d.shape[0])
)
_schema.define(
    "expand", "Tensor t, Tensor basis", "Tensor", ref.expand, lambda t, d: t.new_empty(t.shape[0], d.shape[1])
)
_schema.define(
    "gelu",
    "Tensor x, bool tanh",
    "Tensor",
    ref.gelu,
    lambda x, tanh: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_schema.define(
    "focus_position",
    "Tensor product, Tensor q_scale, Tensor k_scale, float softmax_scale, int n, float b1, float b2, float power, "
    "bool row_anchor, bool renormalize, Tensor? bias, Tensor? mask",
    "(Tensor, Tensor)",
    ref.focus_position,
    lambda product, q_scale, *rest: (
        torch.empty_like(product, dtype=q_scale.dtype, memory_format=torch.contiguous_format),
        product.new_empty(product.shape[:-1], dtype=q_scale.dtype),
    ),
)

for _op in ("layer_norm", "project", "expand", "gelu", "focus_position"):
    _schema.define_triton(_op, "float_stages")

_F32 = torch.float32


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x − mean)/√(var + eps)·γ + β over the last dimension: the stage before ``layer_norm_quantize`` rounds.

    Args:     x ([..., K] float32, K ≥ 1); weight γ, bias β ([K] float32 or None).
    Returns:  [..., K] float32, contiguous.
    Raises:   TypeError for a dtype, ValueError for a shape or device that does not fit.
    Backends: ref any | cpu | triton >= sm_80
    """
    _schema.expect("x", x, dtype=_F32)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [..., K] with K >= 1")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None:
            _schema.expect(name, p, dtype=_F32, shape=(x.shape[-1],), device=x.device)
    return backends.resolve("layer_norm", x.device.type).fn(x, weight, bias, eps)


def project(x: Tensor, lora_down: Tensor) -> Tensor:
    """t = x·Dᵀ as the quantizing ops compute it for modules.

    Args:     x ([M, K] float32), lora_down D ([R, K] float): taken in the back end's branch dtype (float16 on triton).
    Returns:  [M, R] float32.
    Raises:   TypeError for a dtype, ValueError for a shape or device that does not fit.
    Backends: ref any | cpu | triton >= sm_80
    """
    _schema.expect("x", x, dtype=_F32, shape=(None, None))
    _schema.expect("lora_down", lora_down, dtype=_schema.FLOATS, shape=(None, x.shape[1]), device=x.device)
    serving = backends.resolve("project", x.device.type)
    return serving.fn(x, lora_down.to(serving.branch))


def expand(t: Tensor, basis: Tensor) -> Tensor:
    """t·B: the low-rank term of the linear layers (B = lora_upᵀ) and what a subspace branch subtracts (B = D).

    Args:     t ([M, R] float32), basis B ([R, N] float): both are taken in the back end's branch dtype.
    Returns:  [M, N] float32.
    Raises:   TypeError for a dtype, ValueError for a shape or device that does not fit.
    Backends: ref any | cpu | triton >= sm_80
    """
    _schema.expect("t", t, dtype=_F32, shape=(None, None))
    _schema.expect("basis", basis, dtype=_schema.FLOATS, shape=(t.shape[1], None), device=t.device)
    serving = backends.resolve("expand", t.device.type)
    return serving.fn(t, basis.to(serving.branch))


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU as the linear layers' epilogue computes it.

    Args:     x (float32, any shape); approximate: "none" (erf) or "tanh".
    Returns:  float32 of x's shape, contiguous.
    Raises:   TypeError for a dtype, ValueError for another ``approximate``.
    Backends: ref any | cpu | triton >= sm_80
    """
    _schema.expect("x", x, dtype=_F32)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}, expected 'none' or 'tanh'")
    return backends.resolve("gelu", x.device.type).fn(x, approximate == "tanh")


def focus_position(
    product: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    *,
    focus: FocusSpec,
    softmax_scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Where each probability lies among the codes 0..n of ``focus``, before rounding, from the integer products.

    Math:     as :func:`vitq_kernels.qattention`: codes are rne(position).
    Args:     product ([B, H, Nq, Nk] int32): q·kᵀ; scales, softmax_scale, bias, mask as in ``qattention``.
    Returns:  position [B, H, Nq, Nk] float32 in [0, n] (undefined for excluded keys); total [B, H, Nq] float32: Σ_j e,
              meaningful where ``qattention`` divides by it (no renormalization, or the absolute anchor).
    Raises:   TypeError for a dtype, ValueError for a shape or device that does not fit.
    Backends: ref any | cpu | triton >= sm_80
    """
    _schema.expect("product", product, dtype=torch.int32, shape=(None,) * 4)
    b, h, nq, nk = product.shape
    check_scale("q_scale", q_scale, b, h, nq, product.device)
    check_scale("k_scale", k_scale, b, h, nk, product.device)
    if bias is not None:
        _schema.expect("bias", bias, dtype=_schema.FLOATS, shape=(h, nq, nk), device=product.device)
    if mask is not None:
        check_mask(mask, b, nq, nk, product.device)
    args = (focus.n, focus.b1, focus.b2, focus.power, focus.anchor == "row", focus.renormalize)
    impl = backends.resolve("focus_position", product.device.type)
    return impl.fn(product, q_scale, k_scale, float(softmax_scale), *args, bias, mask)
