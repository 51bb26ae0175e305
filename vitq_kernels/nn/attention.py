"""Integer multi-head self-attention as a module."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ..formats import AttentionState, QTensor
from ..ops.qattention import PreparedAttention, focus_levels
from .base import QModule, Quantizer
from .linear import QLinear
from .window import Window, WindowMap


class QAttention(QModule):
    """y = γ·proj(focus(softmax(q·kᵀ·s + bias))·v) + residual with q, k, v = qkv(norm(x)), in integers.

    Notation: B images (or windows), H heads, N tokens, d head_dim.
    Build with :meth:`from_state`. The codes of q, k and v are views of one fused result; the float attention output is
    never written where proj takes integers. Shifted windows are index maps: rows enter them as LayerNorm is quantized
    (int8 codes are gathered where qkv has no LayerNorm in integers) and leave them as attention writes its result.

    Attributes:
        qkv, proj: QLinear; qkv holds the absorbed LayerNorm, proj γ.
        operands: Quantizer of q, k and v.
        window: WindowMap, or None for attention among all tokens.
    """

    def __init__(self, qkv: QLinear, proj: QLinear, state: AttentionState, window: Window | None, backend: str | None):
        super().__init__()
        self.backend = backend
        self.qkv, self.proj = qkv, proj
        self.heads, self.softmax_scale = state.heads, float(state.softmax_scale)
        self.operand_spec, self.focus = state.operands, state.focus
        self.operands = Quantizer(state.operand_quant).to(qkv.weight.device)
        self.operands.backend = backend
        self.register_buffer("bias", state.bias)
        self.register_buffer("levels", focus_levels(state.focus, qkv.weight.device))
        self.window = None if window is None else WindowMap(window).to(qkv.weight.device)

    @classmethod
    def from_state(
        cls,
        state: AttentionState,
        *,
        norm: nn.LayerNorm | None = None,
        proj_norm: nn.LayerNorm | None = None,
        layer_scale: Tensor | None = None,
        window: Window | None = None,
        backend: str | None = None,
    ) -> QAttention:
        """The attention of ``state``.

        Args:   norm, proj_norm: absorbed LayerNorms in front of qkv and proj; layer_scale: γ [C], absorbed into proj;
                window: shifted windows over a token grid; x then is [B, H, W, C].
        Raises: ValueError if ``backend`` (or the one pinned around the call) does not serve the device.
        """
        qkv = QLinear.from_state(state.qkv, norm=norm, backend=backend)
        proj = QLinear.from_state(state.proj, norm=proj_norm, layer_scale=layer_scale, backend=backend)
        return cls(qkv, proj, state, window, backend)

    def state(self) -> AttentionState:
        """Inverse of :meth:`from_state`, exact."""
        return AttentionState(
            self.qkv.state(),
            self.proj.state(),
            self.heads,
            self.softmax_scale,
            self.operand_spec,
            self.operands.scale,
            self.focus,
            self.bias,
        )

    def prepare(self) -> tuple[PreparedAttention, QLinear, Quantizer, WindowMap | None, QLinear]:
        layer = PreparedAttention(self.focus, self.softmax_scale, self.bias, self.levels, self.levels.device)
        return layer, self.qkv, self.operands, self.window, self.proj

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        then: QLinear | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | QTensor]:
        """[B, N, C] float (windows: [B, H, W, C]) to the same shape.

        Args:    residual: added last, in the epilogue of proj. mask ([G, 1 or N, N]): additive scores, image b uses
                 mask[b mod G]; None with windows, which bring their own.
                 then: the layer that follows, whose LayerNorm and quantization the epilogue of proj takes along.
        Returns: y, or with ``then`` (y, what ``then`` takes of it): see :meth:`QLinear.forward`.
        """
        layer, qkv, operands, window, proj = self.prepared()
        options = {"mask": mask, "backend": self.backend}
        if window is None:
            codes = qkv.encode(x)
        else:
            if mask is not None:
                raise ValueError("mask is given to attention within windows, expected None")
            codes = _in_windows(x, qkv, window)
            options |= {"mask": window.mask, "scatter": window.token_of_slot, "tokens": x.shape[1] * x.shape[2]}
        coded = qkv.multiply(codes, out=operands)
        b, n, width = coded.q.shape
        heads = coded.q.reshape(b, n, 3, self.heads, width // (3 * self.heads)).permute(2, 0, 3, 1, 4).unbind(0)
        scales = self._scales(coded.scale, b, n)
        out = proj.takes
        if out is None:
            y = layer.qattention(*heads, *scales, out_dtype=x.dtype, **options)
        else:
            y = layer.qattention_quantize(*heads, *scales, out=out.prepared(), **options)
        if window is not None:
            y = _shaped(y, *x.shape[:-1], width // 3)
        return proj(y, residual=residual, out_dtype=x.dtype, then=then)

    def _scales(self, scale: Tensor, b: int, n: int) -> tuple[Tensor, ...]:
        """Scales of q, k, v: [1] or [H] static, [B, H, N] dynamic."""
        if scale.dim() == 1:
            return scale.chunk(3)
        return scale.reshape(b, n, 3, scale.shape[1] // 3).permute(2, 0, 3, 1).expand(3, b, self.heads, n).unbind(0)

    def extra_repr(self) -> str:
        spec, focus = self.operand_spec, self.focus
        when = "dynamic" if spec.dynamic else "static"
        return (
            f"heads={self.heads}, operands={spec.bits} bits {when} {spec.granularity}, "
            f"softmax={focus.bits} bits {focus.anchor} power {focus.power:g}"
        )


def _in_windows(x: Tensor, qkv: QLinear, window: WindowMap) -> Tensor | QTensor:
    """What ``qkv`` multiplies: [B, H, W, C] floats as [B·nW, N, C]."""
    if not qkv.gathers:
        zero_code = 0 if qkv.input is None else qkv.input.zero_code
        return window.partition(qkv.encode(x), zero_code)
    window.check(x)
    codes = qkv.encode(x, window.token_of_slot)
    return _shaped(codes, x.shape[0] * window.window.count, window.window.tokens, x.shape[-1])


def _shaped(x: Tensor | QTensor, *shape: int) -> Tensor | QTensor:
    return replace(x, q=x.q.view(shape)) if isinstance(x, QTensor) else x.view(shape)
