"""Integer multi-head self-attention as a module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..formats import AttentionState, QTensor
from ..ops._schema import Epilogue
from ..ops.qattention import PreparedAttention, focus_levels
from ..ops.qattention.ref import scattered
from ..ops.quantize import run_quantize
from .base import Coded, Quantizer
from .linear import QLinear
from .token_bits import RowBits, decide, received
from .window import Window, WindowMap


class QAttention(Coded):
    """y = γ·proj(focus(softmax(q·kᵀ·s + bias))·v) + residual with q, k, v = stage(qkv(norm(x))), in integers.

    Notation: B images (or windows), H heads, N tokens, d head_dim.
    Build with :meth:`from_state`. The codes of q, k and v are views of one fused result; the float attention output is
    never written where proj takes integers. Shifted windows are index maps: rows enter them as LayerNorm is quantized
    (int8 codes are gathered where qkv has no LayerNorm in integers) and leave them as attention writes its result.

    Attributes:
        qkv, proj: QLinear; qkv holds the absorbed LayerNorm, proj γ.
        operands: Quantizer of q, k and v.
        window: WindowMap, or None for attention among all tokens.
        stage: float module over the fused [B, N, 3·H·d] (norms of q and k, rotations), whose result is quantized; None
            lets qkv's epilogue quantize.
        token_bits: TokenBits, or None where this attention decides nothing.
    """

    def __init__(
        self,
        qkv: QLinear,
        proj: QLinear,
        state: AttentionState,
        window: Window | None,
        stage: nn.Module | None,
        backend: str | None,
    ):
        super().__init__()
        self.backend = backend
        self.qkv, self.proj, self.stage = qkv, proj, stage
        self.heads, self.softmax_scale = state.heads, float(state.softmax_scale)
        self.operand_spec, self.focus, self.token_bits = state.operands, state.focus, state.token_bits
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
        stage: nn.Module | None = None,
        backend: str | None = None,
    ) -> QAttention:
        """The attention of ``state``.

        Args:   norm, proj_norm: absorbed LayerNorms in front of qkv and proj; layer_scale: γ [C], absorbed into proj;
                window: shifted windows over a token grid; x then is [B, H, W, C]; stage: see the class.
        Raises: ValueError if ``backend`` (or the one pinned around the call) does not serve the device.
        """
        qkv = QLinear.from_state(state.qkv, norm=norm, backend=backend)
        proj = QLinear.from_state(state.proj, norm=proj_norm, layer_scale=layer_scale, backend=backend)
        return cls(qkv, proj, state, window, stage, backend)

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
            self.token_bits,
        )

    def meaning(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("heads", "softmax_scale", "operand_spec", "focus", "token_bits")}

    def prepare(self) -> tuple[PreparedAttention, QLinear, Quantizer, WindowMap | None, QLinear]:
        layer = PreparedAttention(self.focus, self.softmax_scale, self.bias, self.levels, self.levels.device)
        return layer, self.qkv, self.operands, self.window, self.proj

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        then: QLinear | None = None,
        bits: RowBits | None = None,
        decides: bool = False,
    ) -> Tensor | tuple:
        """[B, N, C] float (windows: [B, H, W, C]) to the same shape.

        Args:    residual: added last, in the epilogue of proj. mask ([G, 1 or N, N]): additive scores, image b uses
                 mask[b mod G]; None with windows, which bring their own.
                 then: the layer that follows, whose LayerNorm and quantization the epilogue of proj takes along.
                 bits: of the tokens as qkv, Q and K see them ([B, T]); V keeps its bits: it meets the probabilities on
                 the scale of its coarsest token.
                 decides: return also the RowBits that this attention decides (None without ``token_bits``).
        Returns: y, or with ``then`` (y, what ``then`` takes of it): see :meth:`QLinear.forward`. With ``decides``,
                 (that, RowBits or None).
        """
        layer, qkv, operands, window, proj = self.prepared()
        options = {"mask": mask, "backend": self.backend}
        if window is None:
            codes = qkv.encode(x, bits=bits)
        else:
            if mask is not None:
                raise ValueError("mask is given to attention within windows, expected None")
            window = window.at(x)
            in_slots = None if bits is None else bits.in_windows(window.token_of_slot)
            codes = _in_windows(x, qkv, window, bits, in_slots)
            bits = in_slots
            options |= {"mask": window.mask, "scatter": window.token_of_slot, "tokens": x.shape[1] * x.shape[2]}
        stage = self.stage
        if bits is None and stage is None:
            heads, scales = self._split(qkv.multiply(codes, out=operands), 3)
        else:
            fused = qkv.multiply(codes) if stage is None else stage(qkv.multiply(codes))
            if bits is None:
                heads, scales = self._split(run_quantize(fused, operands.prepared(), self.backend), 3)
            else:
                heads, scales = self._split_at(bits, fused, operands)
        decided = None if self.token_bits is None else self._decide(heads, scales, options)
        out = proj.takes
        if out is None:
            y = layer.qattention(*heads, *scales, out_dtype=x.dtype, **options)
        else:
            y = layer.qattention_quantize(*heads, *scales, out=out.at(decided), **options)
        if window is not None:
            y = _shaped(y, *x.shape[:-1], proj.in_features)
        y = proj(y, residual=residual, out_dtype=x.dtype, then=then, bits=decided)
        return (y, decided) if decides else y

    def _split(self, coded: QTensor, parts: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Codes [B, H, N, d] and scales ([1] or [H] static, [B, H, N] dynamic) of some of q, k and v."""
        (b, n, width), scale = coded.q.shape, coded.scale
        codes = coded.q.reshape(b, n, parts, self.heads, width // (parts * self.heads)).permute(2, 0, 3, 1, 4)
        if scale.dim() == 1:
            return codes.unbind(0), scale.chunk(parts)
        scale = scale.reshape(b, n, parts, scale.shape[1] // parts).permute(2, 0, 3, 1)
        return codes.unbind(0), scale.expand(parts, b, self.heads, n).unbind(0)

    def _split_at(self, bits: RowBits, y: Tensor, operands: Quantizer) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """:meth:`_split` of floats [B, N, 3·H·d], q and k at ``bits``: two widths in a row take two passes."""
        quant, width = operands.quant, y.shape[-1] // 3
        epilogues = bits.quant(replace(quant, groups=quant.groups // 3 * 2)), replace(quant, groups=quant.groups // 3)
        parts = (y[..., : 2 * width], y[..., 2 * width :])
        coded = [run_quantize(part, Epilogue(q), self.backend) for part, q in zip(parts, epilogues)]
        (qk, qk_scales), (v, v_scales) = self._split(coded[0], 2), self._split(coded[1], 1)
        return qk + v, qk_scales + v_scales

    def _decide(self, heads: tuple[Tensor, ...], scales: tuple[Tensor, ...], options: dict) -> RowBits:
        (q, k, _), (q_scale, k_scale, _) = heads, scales
        spec, scale, mask = self.token_bits, self.softmax_scale, options["mask"]
        scores = received(q, k, q_scale, k_scale, scale, self.bias, mask, spec.class_token)
        if (scatter := options.get("scatter")) is not None:
            scores = scattered(scores.unsqueeze(-1), scatter, options["tokens"]).squeeze(-1)
        return decide(spec, scores)

    def extra_repr(self) -> str:
        spec, focus = self.operand_spec, self.focus
        when = "dynamic" if spec.dynamic else "static"
        return (
            f"heads={self.heads}, operands={spec.bits} bits {when} {spec.granularity}, "
            f"softmax={focus.bits} bits {focus.anchor} power {focus.power:g}"
        )


def _in_windows(
    x: Tensor, qkv: QLinear, window: WindowMap, bits: RowBits | None, in_slots: RowBits | None
) -> Tensor | QTensor:
    """What ``qkv`` multiplies: [B, H, W, C] floats as [B·nW, N, C]; ``bits`` of tokens, the same ``in_slots``."""
    if not qkv.gathers:
        zero_code = 0 if qkv.input is None else qkv.input.zero_code
        return window.partition(qkv.encode(x, bits=bits), zero_code)
    codes = qkv.encode(x, window.token_of_slot, in_slots)
    return _shaped(codes, x.shape[0] * window.window.count, window.window.tokens, x.shape[-1])


def _shaped(x: Tensor | QTensor, *shape: int) -> Tensor | QTensor:
    return replace(x, q=x.q.view(shape)) if isinstance(x, QTensor) else x.view(shape)
