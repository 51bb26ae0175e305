"""Integer linear layers as modules: ``QLinear`` and, over patches, ``QPatchEmbed``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..formats import ActQuant, LinearState, PackedWeight, QTensor
from ..ops._schema import Epilogue
from ..ops.layer_norm_quantize import run_layer_norm_quantize
from ..ops.qlinear import PreparedLinear
from ..ops.quantize import run_quantize
from ..packing import pack_weight, unpack_weight
from .base import Coded, QModule, Quantizer, choose_layout
from .token_bits import RowBits


def _affine(norm: nn.LayerNorm) -> tuple[Tensor | None, Tensor | None]:
    """γ and β, which a norm may replace at any time: where they are plain parameters, past nn.Module's slow look-up."""
    own = norm._parameters
    return (own["weight"], own["bias"]) if len(own) == 2 else (norm.weight, norm.bias)


class QLinear(Coded):
    """y = γ·act(Linear(norm(x))) + residual in integers: a drop-in for ``nn.Linear``, and more where a block can fuse.

    Notation: N out features, K in features, R rank.
    Build with :meth:`from_state`. Floats in are quantized by the layer itself (in one pass with the absorbed LayerNorm,
    if any); a QTensor in (from the layer before) is used as it is.

    Attributes:
        input: Quantizer of the input, or None for a weight-only layer.
        norm: absorbed LayerNorm in front, or None. It only ever sees floats.
        layout: run-time layout of ``weight``, chosen for the device and back end, as is the dtype of the branch.
    """

    def __init__(self, state: LinearState, norm: nn.LayerNorm | None, layer_scale: Tensor | None, backend: str | None):
        super().__init__()
        self.backend = backend
        self.out_features, self.in_features = state.codes.shape
        self.weight_spec, self.act_spec, self.lora = state.weight, state.act, state.lora
        self.norm = norm
        self.input = None if state.act is None else Quantizer(state.act_quant).to(state.codes.device)
        self.register_buffer("weight_scale", state.weight_scale)
        self.register_buffer("bias", state.bias)
        # An integer layer finds its directions in the quantizer; a weight-only one has none.
        self.register_buffer("lora_down", state.lora_down if self.input is None else None)
        self.register_buffer("lora_up", state.lora_up)
        self.register_buffer("layer_scale", layer_scale)
        for name in ("weight", "col_sum", "weight_lut"):
            self.register_buffer(name, None)
        self._pack(state.codes)

    @classmethod
    def from_state(
        cls,
        state: LinearState,
        *,
        norm: nn.LayerNorm | None = None,
        layer_scale: Tensor | None = None,
        backend: str | None = None,
    ) -> QLinear:
        """The layer of ``state``, on its device; ``norm`` and ``layer_scale`` ([N]) are absorbed.

        Raises: ValueError if ``backend`` (or the one pinned around the call) does not serve the device.
        """
        return cls(state, norm, layer_scale, backend)

    def state(self) -> LinearState:
        """Inverse of :meth:`from_state`, exact."""
        quant = self.input
        return LinearState(
            codes=unpack_weight(self.packed),
            weight_scale=self.weight_scale,
            weight=self.weight_spec,
            bias=self.bias,
            act=self.act_spec,
            act_scale=None if quant is None else quant.scale,
            act_zero_point=0 if quant is None else quant.zero_point,
            lora=self.lora,
            lora_down=_half(self.lora_down if quant is None else quant.lora_down),
            lora_up=_half(self.lora_up),
        )

    @property
    def packed(self) -> PackedWeight:
        """The weight as ops take it."""
        return PackedWeight(
            self.weight,
            self.layout,
            self.weight_spec.bits,
            self.out_features,
            self.in_features,
            self.col_sum,
            self.weight_spec.table,
            self.weight_lut,
        )

    def meaning(self) -> dict[str, Any]:
        return {"layout": self.layout, "weight": self.weight_spec, "act": self.act_spec, "lora": self.lora}

    def prepare(self) -> tuple[nn.LayerNorm | None, Quantizer | None, PreparedLinear]:
        layer = PreparedLinear(self.packed, self.weight_scale, self.bias, self.lora_up, self.layer_scale)
        return self.norm, self.input, layer

    @property
    def gathers(self) -> bool:
        """True if :meth:`encode` reads its rows through a map: LayerNorm and quantization are one pass here."""
        norm, quantizer, _ = self.prepared()
        return norm is not None and quantizer is not None

    @property
    def takes(self) -> Quantizer | None:
        """What the layer before may quantize its result with; None where this one takes floats."""
        norm, quantizer, _ = self.prepared()
        return quantizer if norm is None else None

    def _pack(self, codes: Tensor) -> None:
        op = "qlinear" if self.input is not None else "qlinear_weight_only"
        serving = backends.resolve(op, codes.device.type, pin=self.backend)
        layouts = backends.layouts(op, codes.device, *codes.shape, self.backend)
        self.layout = choose_layout(layouts, self.weight_spec, self.act_spec)
        packed = pack_weight(codes, self.weight_spec.bits, self.layout, self.weight_spec.table)
        self.weight, self.col_sum, self.weight_lut = packed.data, packed.col_sum, packed.lut
        self.packed_for = codes.device.type
        if self.lora_up is not None:
            self.lora_up = self.lora_up.to(serving.branch).contiguous()
            holder = self if self.input is None else self.input
            holder.lora_down = holder.lora_down.to(serving.branch).contiguous()

    def repack(self) -> None:
        self._pack(unpack_weight(self.packed))

    def _apply(self, fn, recurse: bool = True):
        was_meta = self.weight.device.type == "meta"
        super()._apply(fn, recurse)
        if self.weight.device.type not in (self.packed_for, "meta"):
            if was_meta:  # to_empty: there are no codes yet, what is to hold them must have the device's layout
                table = self.weight_spec.table
                code = 0 if table is None else int(table.lut()[0])
                shape = self.out_features, self.in_features
                self._pack(torch.full(shape, code, dtype=torch.int8, device=self.weight.device))
            else:
                self.repack()
        return self

    def encode(
        self, x: Tensor | QTensor, gather: Tensor | None = None, bits: RowBits | None = None
    ) -> Tensor | QTensor:
        """What the product consumes: norm(x) quantized, or float for a weight-only layer; a QTensor as it is.

        Args: gather: as :func:`vitq_kernels.layer_norm_quantize`, for floats where the layer :attr:`gathers`.
              bits: of the rows of the result; None for the layer's own.
        """
        return self._encode(x, self.prepared(), gather, bits)

    def _encode(
        self, x: Tensor | QTensor, prepared: tuple, gather: Tensor | None = None, bits: RowBits | None = None
    ) -> Tensor | QTensor:
        norm, quantizer, _ = prepared
        if isinstance(x, QTensor):
            return x
        if quantizer is None:
            return x if norm is None else norm(x)
        if norm is None:
            return run_quantize(x, quantizer.at(bits), self.backend)
        return run_layer_norm_quantize(x, *_affine(norm), norm.eps, quantizer.at(bits), gather, self.backend)

    def forward(
        self,
        x: Tensor | QTensor,
        *,
        activation: str = "none",
        residual: Tensor | None = None,
        out: ActQuant | Quantizer | None = None,
        out_dtype: torch.dtype | None = None,
        then: QLinear | None = None,
        bits: RowBits | None = None,
    ) -> Tensor | QTensor | tuple[Tensor, Tensor | QTensor]:
        """Floats or a QTensor of [..., K] to [..., N] floats, or to a QTensor under the next layer's epilogue ``out``.

        Args:     activation: "none", "gelu_erf" or "gelu_tanh"; residual ([..., N]), added last.
                  out: an ActQuant, or the next layer's ``input``.
                  out_dtype: default that of residual, else of x, else float32 (for a QTensor).
                  then: the layer that takes the float result behind its LayerNorm; without activation and ``out``.
                  bits: of the rows of everything that this call quantizes, x and the result; None for the layers' own.
        Returns:  y, or with ``then`` (y, what ``then`` takes): ``then.encode(y)`` out of the same op where both layers
                  take integers and ``then`` has absorbed a LayerNorm, else y itself.
        Raises:   as :func:`vitq_kernels.qlinear`.
        """
        if out_dtype is None:
            out_dtype = residual.dtype if residual is not None else torch.float32 if isinstance(x, QTensor) else x.dtype
        prepared = self.prepared()
        coded, layer = self._encode(x, prepared, None, bits), prepared[2]
        if then is not None:
            if activation != "none" or out is not None:
                raise ValueError(f"then is given with activation {activation!r} and out {out}, expected none of both")
            norm, quantizer, _ = then.prepared()
            if (
                norm is not None
                and quantizer is not None
                and isinstance(coded, QTensor)
                and self.backend == then.backend
            ):
                own, quant = (*_affine(norm), norm.eps), quantizer.at(bits)
                return layer.qlinear_norm_quantize(coded, *own, quant, residual, out_dtype, self.backend)
        y = self._multiply(coded, layer, activation, residual, out, out_dtype, bits)
        return y if then is None else (y, y)

    def multiply(self, x: Tensor | QTensor, out: ActQuant | Quantizer | None = None) -> Tensor | QTensor:
        """:meth:`forward` behind :meth:`encode`, without options; float32 where there is no ``out``."""
        return self._multiply(x, self.prepared()[2], "none", None, out, torch.float32)

    def _multiply(
        self,
        x: Tensor | QTensor,
        layer: PreparedLinear,
        activation: str,
        residual: Tensor | None,
        out: ActQuant | Quantizer | None,
        out_dtype: torch.dtype,
        bits: RowBits | None = None,
    ) -> Tensor | QTensor:
        backend = self.backend
        if out is not None:
            out = out.at(bits) if isinstance(out, Quantizer) else Epilogue(out if bits is None else bits.quant(out))
        if isinstance(x, QTensor):
            if out is not None:
                return layer.qlinear_quantize(x, out, activation, residual, backend)
            return layer.qlinear(x, activation, residual, out_dtype, backend)
        down = self.lora_down
        t = None if down is None else x.reshape(-1, self.in_features).float() @ down.float().T
        if out is None:
            return layer.qlinear_weight_only(x, t, activation, residual, out_dtype, backend)
        return run_quantize(layer.qlinear_weight_only(x, t, activation, residual, torch.float32, backend), out, backend)

    def extra_repr(self) -> str:
        bits = f"W{self.weight_spec.bits}A{16 if self.act_spec is None else self.act_spec.bits}"
        parts = [f"{self.in_features}, {self.out_features}", bits, f"layout={self.layout}"]
        if self.act_spec is not None:
            parts.append(f"{'dynamic' if self.act_spec.dynamic else 'static'} {self.act_spec.granularity}")
        if self.lora.rank:
            parts.append(f"rank={self.lora.rank} {self.lora.kind}")
        parts += [f"bias={self.bias is not None}"] + (["layer_scale"] if self.layer_scale is not None else [])
        return ", ".join(parts)


def _half(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.half()


class QPatchEmbed(QModule):
    """A convolution over patches that do not overlap, [B, C, H, W] to [B, N, H//h, W//w]: a drop-in for ``nn.Conv2d``.

    Attributes:
        linear: QLinear with K = C·h·w.
        patch: (h, w).
    """

    def __init__(self, linear: QLinear, patch: tuple[int, int]) -> None:
        super().__init__()
        if linear.in_features % (patch[0] * patch[1]):
            raise ValueError(f"patch is {patch}, expected to divide the layer's {linear.in_features} in features")
        self.linear, self.patch = linear, tuple(patch)

    @classmethod
    def from_state(cls, state: LinearState, patch: tuple[int, int], *, backend: str | None = None) -> QPatchEmbed:
        """The patch embedding of ``state``, whose K is (C, h, w) flattened."""
        return cls(QLinear.from_state(state, backend=backend), patch)

    def _rows(self, x: Tensor) -> Tensor:
        (b, c, height, width), (h, w) = x.shape, self.patch
        x = x[:, :, : height // h * h, : width // w * w].reshape(b, c, height // h, h, width // w, w)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(b, height // h, width // w, c * h * w)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] float to [B, N, H//h, W//w], channels last in memory."""
        linear, quant = self.linear, self.linear.input
        if quant is not None and quant.scale is not None and quant.lora_down is None:
            # One scale for all and nothing to project: patches are cut out of bytes, not of floats.
            coded = linear.encode(x)
            rows = replace(coded, q=self._rows(coded.q))
        else:
            rows = self._rows(x)
        return linear(rows, out_dtype=x.dtype).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"patch={self.patch}"
