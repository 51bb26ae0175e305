"""Simulated attention: integer q·kᵀ, the focusing softmax quantizer with a learnable interval, integer P·V."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from vitq_kernels.formats import AttentionState, FocusSpec, TokenBits
from vitq_kernels.nn import Window, WindowMap
from vitq_kernels.nn.token_bits import RowBits, decide, received
from vitq_kernels.ops import float_stages, learning
from vitq_kernels.ops.qattention.ref import scattered

from . import functional as fq
from .activation import ActivationQuantizer
from .linear import SimLinear
from .simulated import SimulationOnly

# Smallest learnable width of the focusing interval.
MIN_WIDTH = 1e-3


class FocusQuantizer(nn.Module):
    """Learnable form of a FocusSpec: b1 and b2 are float64 scalars (the kernels' arguments are doubles).

    Attributes: bits, power, anchor, below, renormalize, grid as in FocusSpec; b1, b2 Parameters.
    drop: as in ActivationQuantizer, of affine specs.
    """

    def __init__(self, spec: FocusSpec) -> None:
        super().__init__()
        self.bits, self.power, self.grid, self.renormalize = spec.bits, spec.power, spec.grid, spec.renormalize
        self.anchor: Literal["absolute", "row"] = spec.anchor
        self.below: Literal["floor", "zero"] = spec.below
        # Scalars that are read on the CPU in every forward; operators of any device take them.
        self.b1 = nn.Parameter(torch.tensor(spec.b1, dtype=torch.float64, device="cpu"))
        self.b2 = nn.Parameter(torch.tensor(spec.b2, dtype=torch.float64, device="cpu"))
        self.drop: fq.Drop | None = None

    @property
    def spec(self) -> FocusSpec:
        b1, b2 = self.b1.item(), self.b2.item()
        return FocusSpec(self.bits, b1, b2, self.power, self.anchor, self.below, self.renormalize, self.grid)

    @torch.no_grad()
    def project(self) -> None:
        """Back into 0 ≤ b1 < b2 ≤ 1 after an optimizer step."""
        self.b1.clamp_(0.0, 1.0 - MIN_WIDTH)
        self.b2.clamp_(max=1.0).clamp_(min=float(self.b1) + MIN_WIDTH)

    def position(self, u: Tensor) -> Tensor:
        """Where u in [0, 1] lies among the codes, before rounding."""
        return fq.focus_position(u, self.b1, self.b2, self.power, self.spec.n)

    def forward(self, position: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Integer levels of what lies at ``position``, their step and offset: P ≈ level·step + offset."""
        spec, code = self.spec, position.round()
        if not spec.affine:
            code = fq.look_up(spec.decode()[0].to(code), code)
        return code, *self._step_offset(spec)

    def values(self, scores: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float, Tensor]:
        """The same of softmax(scores), differentiable, and the sums of exponentials [B, H, N, 1]."""
        spec = self.spec
        dropping = self.drop is not None and spec.affine and torch.is_grad_enabled()
        dropped = self.drop() if dropping else None
        level, total = learning.focused_softmax(scores, self.b1, self.b2, spec, dropped)
        return level, *self._step_offset(spec), total.unsqueeze(-1)

    def _step_offset(self, spec: FocusSpec) -> tuple[Tensor, Tensor | float]:
        return ((self.b2 - self.b1) / spec.n, self.b1) if spec.affine else (self.b2 / self.grid, 0.0)


EXCLUDED = -100.0


class SimAttention(nn.Module):
    """Multi-head self-attention in the arithmetic of ``vitq_kernels.qattention``; a drop-in for timm's.

    Attributes:
        qkv, proj: SimLinear.
        stage: float module over the fused [3, H, d] output of qkv, nothing in most models.
        operands: ActivationQuantizer of what the stage makes of it; no spec leaves Q, K, V float.
        focus: FocusQuantizer, or None for float probabilities.
        simulated: a quantizer of the probabilities that has no integer kernel, in place of ``focus``, or None.
        norm: float module between the product with V and proj (timm's scale_norm), nothing in most models.
        bias: [H, N, N] additive scores, or None.
        token_bits: TokenBits, or None where this attention decides nothing.
        window: the windows whose tokens the rows are, or None; mlp: (fc1, fc2) behind this attention, or None.
        entering, decided: RowBits of the block before, which ``SimBlocks`` hands over, and of this one's last call.
    """

    def __init__(
        self,
        qkv: SimLinear,
        proj: SimLinear,
        heads: int,
        softmax_scale: float,
        bias: Tensor | None = None,
        norm: nn.Module | None = None,
        window: Window | None = None,
        stage: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads, self.softmax_scale = qkv, proj, heads, float(softmax_scale)
        self.norm = nn.Identity() if norm is None else norm
        self.stage = nn.Identity() if stage is None else stage
        self.operands = ActivationQuantizer(3 * heads)
        self.focus: FocusQuantizer | None = None
        self.simulated: SimulationOnly | None = None
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.token_bits: TokenBits | None = None
        self.window, self.mlp = window, None
        self.entering: RowBits | None = None
        self.decided: RowBits | None = None
        slots = None if window is None else WindowMap(window).token_of_slot
        self.register_buffer("token_of_slot", slots, persistent=False)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, N, C] to [B, N, C']; mask ([G, N, N] or None) is added to the scores, image b uses mask[b mod G].

        Within windows of its own, keys whose mask is −100 or less (what Swin's masks hold) are excluded, as in the
        integer model's windows.
        ``attn_mask`` and ``is_causal`` are the arguments of timm's ViT attention, which image models leave unused.

        Raises: ValueError if they are used.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask or is_causal is given, the integer attention takes neither")
        if mask is not None and self.window is not None:
            mask = mask.masked_fill(mask <= EXCLUDED, -torch.inf)
        if self.entering is not None:
            bits = self._rows(self.entering)
            high = bits.high.reshape(-1, 1, 1).expand(-1, 3, self.operands.groups // 3).clone()
            high[:, 2] = True
            self.qkv.act.bits, self.operands.bits = bits, replace(bits, high=high)
        return self.proj(self.norm(self.attend(self.stage(self.qkv(x)), mask)))

    def _rows(self, bits: RowBits) -> RowBits:
        """Bits in token order as bits of this attention's rows."""
        return bits if self.token_of_slot is None else bits.in_windows(self.token_of_slot)

    @torch.no_grad()
    def _decide(self, q: Tensor, k: Tensor, qs: Tensor, ks: Tensor, mask: Tensor | None) -> None:
        """Decide the bits of what follows in this block, and leave them in ``decided``."""
        spec, (b, h, n, _) = self.token_bits, q.shape
        qs, ks = (s.expand(b, h, n) for s in (qs, ks))
        scores = received(q, k, qs, ks, self.softmax_scale, self.bias, mask, spec.class_token)
        if self.window is not None:
            height, width = self.window.resolution
            scores = scattered(scores.unsqueeze(-1), self.token_of_slot, height * width).squeeze(-1)
        self.decided = decide(spec, scores)
        self.proj.act.bits = self._rows(self.decided)
        if self.mlp is not None and all(layer.quant.spec is not None for layer in self.mlp):
            for layer in self.mlp:
                layer.act.bits = self.decided

    def product(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, N, N] q·kᵀ, of codes exactly."""
        if self.operands.spec is None:
            return q @ k.transpose(-1, -2)
        return fq.integer_product(q, k, self.operands.limit, self.operands.limit)

    def scores(self, product: Tensor, qs: Tensor, ks: Tensor, mask: Tensor | None) -> Tensor:
        """[B, H, N, N] softmax inputs."""
        return self._shifted(product * (qs * self.softmax_scale).unsqueeze(-1) * ks.unsqueeze(-2), mask)

    def _shifted(self, s: Tensor, mask: Tensor | None) -> Tensor:
        if self.bias is not None:
            s = s + self.bias
        if mask is not None:
            b, h, n, _ = s.shape
            g = mask.shape[0]
            s = (s.reshape(b // g, g, h, n, n) + mask.unsqueeze(1)).reshape(b, h, n, n)
        return s

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, 3·H·d] to codes [3, B, H, N, d] and scales [3, B or 1, H or 1, N or 1]."""
        return self._split(qkv, self.operands)

    def _split(self, qkv: Tensor, quantizer: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        b, n, c = qkv.shape
        h = self.heads
        if self.operands.spec is None:
            found, scale = qkv, qkv.new_ones(1, 1, 3, 1)
        else:
            found, scale = quantizer(qkv.reshape(b * n, c))
            groups = self.operands.groups // 3
            scale = scale.reshape(b, n, 3, groups) if scale.shape[0] != 1 else scale.reshape(1, 1, 3, groups)
        return found.reshape(b, n, 3, h, c // (3 * h)).permute(2, 0, 3, 1, 4), scale.permute(2, 0, 3, 1)

    def probabilities(self, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, H, N, N] before their own quantizer, of fused outputs [B, N, 3·H·d]."""
        (q, k, _), (qs, ks, _) = self.split(qkv)
        return self.scores(self.product(q, k), qs, ks, mask).softmax(-1)

    def attend(self, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
        """The attention between the two linear layers: [B, N, 3·H·d] to [B, N, H·d]."""
        if torch.is_grad_enabled():
            return self._learned(qkv, mask)
        (q, k, v), (qs, ks, vs) = self.split(qkv)
        v_top = vs.amax(-1, keepdim=True)
        if vs.shape[-1] > 1:
            v = (v * (vs / v_top).unsqueeze(-1)).round_()
        v_top = v_top.unsqueeze(-1)
        product = self.product(q, k)
        if self.token_bits is not None:
            self._decide(q, k, qs, ks, mask)
        if self.simulated is not None or self.focus is None:
            p = self.scores(product, qs, ks, mask).softmax(-1)
            return _joined((p if self.simulated is None else self.simulated(p)) @ v * v_top)
        position, total = self._position(product, qs, ks, mask)
        valid = None if mask is None else self._valid(mask, len(q))
        if valid is not None:  # the position of an excluded key is undefined
            position = torch.where(valid > 0, position, torch.zeros_like(position))
        return _joined(self._focused(*self.focus(position), total, v, v_top, valid))

    def _learned(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """:meth:`attend` of values, to float32's rounding: scales are in the operands."""
        if self.token_bits is not None:
            bits = self.operands.bits
            with torch.no_grad():
                (q, k, _), (qs, ks, _) = self.split(qkv)
                self._decide(q, k, qs, ks, mask)
            self.operands.bits = bits
        (q, k, v), (_, _, vs) = self._split(qkv, self.operands.values)
        if vs.shape[-1] > 1:
            v_top = vs.amax(-1, keepdim=True).unsqueeze(-1)
            v = fq.round_ste(v / v_top) * v_top
        s = self._shifted((q * self.softmax_scale) @ k.transpose(-1, -2), mask)
        if self.simulated is not None or self.focus is None:
            p = s.softmax(-1)
            return _joined((p if self.simulated is None else self.simulated(p)) @ v)
        valid = None if mask is None else self._valid(mask, len(q))
        return _joined(self._focused(*self.focus.values(s), v, None, valid))

    def _position(self, product: Tensor, qs: Tensor, ks: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Where the probabilities lie among the codes, and the sums of exponentials [B, H, N, 1]."""
        focus = self.focus
        if self.operands.spec is None:
            s = self.scores(product, qs, ks, mask)
            e = torch.exp(s - s.amax(-1, keepdim=True))
            total = e.sum(-1, keepdim=True)
            return focus.position(e if focus.anchor == "row" else e / total), total
        b, h, n, _ = product.shape
        per_token = self.operands.spec.dynamic
        qs, ks = (s.expand(b, h, n).contiguous() if per_token else s.flatten() for s in (qs, ks))
        position, total = float_stages.focus_position(
            product.to(torch.int32),
            qs,
            ks,
            focus=focus.spec,
            softmax_scale=self.softmax_scale,
            bias=self.bias,
            mask=mask,
        )
        return position, total.unsqueeze(-1)

    def _valid(self, mask: Tensor, b: int) -> Tensor:
        """[B, H, N, N]: 1 for keys that are not excluded, else 0."""
        valid = (mask != -torch.inf).to(mask.dtype)
        return valid.repeat(b // mask.shape[0], 1, 1).unsqueeze(1).expand(-1, self.heads, -1, -1)

    def _focused(
        self,
        level: Tensor,
        step: Tensor,
        offset: Tensor | float,
        total: Tensor,
        v: Tensor,
        v_top: Tensor | None,
        valid: Tensor | None,
    ) -> Tensor:
        """P·V of integer levels with codes of V and their scale v_top, or with values (no v_top)."""
        if valid is not None:
            level = level * valid
        if v_top is None or self.operands.spec is None:
            out = level @ v * step
        else:
            out = fq.integer_product(level, v.transpose(-1, -2), 255.0, self.operands.limit) * step
        if isinstance(offset, Tensor):
            offset = offset.to(out.dtype)
            out = out + (v.sum(-2, keepdim=True) if valid is None else valid @ v) * offset
        factor = 1.0 if v_top is None else v_top
        if self.focus.renormalize:
            keys = float(level.shape[-1]) if valid is None else valid.sum(-1, keepdim=True)
            denom = level.sum(-1, keepdim=True) * step + offset * keys
            empty = denom == 0
            return torch.where(empty, torch.zeros_like(out), out * (factor / torch.where(empty, denom + 1, denom)))
        return out * (factor / total if self.focus.anchor == "row" else factor)

    @torch.no_grad()
    def export(self) -> AttentionState:
        """The finished attention.

        Raises: ValueError if an operand or the softmax is still float, or has a quantizer of the simulation only.
        """
        if self.simulated is not None:
            self.simulated.refuse("an attention's softmax")
        if self.operands.spec is None or self.focus is None:
            raise ValueError("attention operands or probabilities are not quantized, expected QuantSpec and FocusSpec")
        scale = self.operands.scale
        return AttentionState(
            qkv=self.qkv.export(),
            proj=self.proj.export(),
            heads=self.heads,
            softmax_scale=self.softmax_scale,
            operands=self.operands.spec,
            operand_scale=None if scale is None else scale.detach().clone(),
            focus=self.focus.spec,
            bias=self.bias,
            token_bits=self.token_bits,
        )


def _joined(heads: Tensor) -> Tensor:
    """[B, H, N, d] to [B, N, H·d]."""
    return heads.transpose(1, 2).flatten(2)


class SimBlocks(nn.Sequential):
    """Blocks one after another, of which each hands the token-wise bits that it decides to the next.

    Attributes:
        attentions: the SimAttention of each block, or None. A block that is run by itself gets no bits.
    """

    def __init__(self, blocks: nn.Sequential, attentions: list[SimAttention | None]) -> None:
        super().__init__(OrderedDict(blocks.named_children()))
        # Not submodules: they have their places in the blocks.
        self.__dict__["attentions"] = attentions

    def forward(self, x: Tensor) -> Tensor:
        bits = None
        for block, attention in zip(self, self.attentions, strict=True):
            if attention is None:
                x, bits = block(x), None
                continue
            attention.entering = bits
            try:
                x = block(x)
            finally:
                bits, attention.entering, attention.decided = attention.decided, None, None
        return x
