"""Integer MLPs and transformer blocks as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..formats import LinearState, QTensor
from .attention import QAttention
from .base import QModule
from .linear import QLinear
from .token_bits import RowBits


class QMlp(QModule):
    """y = γ·fc2(act(fc1(norm(x)))) + residual: the hidden activations exist as codes only.

    Attributes:
        fc1, fc2: QLinear; fc1 holds the absorbed LayerNorm, fc2 γ and, if there is one, a LayerNorm after the
            activation.
        activation: "gelu_erf" or "gelu_tanh" (fused), or a float module that runs between the two layers (which may
            have another width behind it: gates).
    """

    def __init__(self, fc1: QLinear, fc2: QLinear, activation: str | nn.Module) -> None:
        super().__init__()
        if isinstance(activation, str) and fc1.out_features != fc2.in_features:
            raise ValueError(f"fc2 has {fc2.in_features} in features, expected fc1's {fc1.out_features}")
        self.fc1, self.fc2 = fc1, fc2
        self.activation = activation

    @classmethod
    def from_states(
        cls,
        fc1: LinearState,
        fc2: LinearState,
        activation: str | nn.Module = "gelu_erf",
        *,
        norm: nn.LayerNorm | None = None,
        inner_norm: nn.LayerNorm | None = None,
        layer_scale: Tensor | None = None,
        backend: str | None = None,
    ) -> QMlp:
        """The MLP of two layers' states; ``norm``, ``inner_norm`` (after the activation) and γ are absorbed."""
        first = QLinear.from_state(fc1, norm=norm, backend=backend)
        second = QLinear.from_state(fc2, norm=inner_norm, layer_scale=layer_scale, backend=backend)
        return cls(first, second, activation)

    def prepare(self) -> tuple[QLinear, QLinear, str | nn.Module]:
        return self.fc1, self.fc2, self.activation

    def forward(self, x: Tensor | QTensor, residual: Tensor | None = None, bits: RowBits | None = None) -> Tensor:
        """[..., C] float, or what fc1 makes of it, to [..., C']; ``residual`` is added last, in the epilogue of fc2.

        The result has the dtype of x, or, where that is a QTensor, of ``residual`` (float32 without one).
        ``bits``: of the rows as both layers see them; None for the layers' own.
        """
        fc1, fc2, activation = self.prepared()
        if isinstance(x, QTensor):
            dtype = torch.float32 if residual is None else residual.dtype
        else:
            dtype = x.dtype
        if not isinstance(activation, str):
            hidden = activation(fc1(x, out_dtype=dtype, bits=bits))
        else:
            hidden = fc1(x, activation=activation, out=fc2.takes, out_dtype=dtype, bits=bits)
        return fc2(hidden, residual=residual, out_dtype=dtype, bits=bits)

    def extra_repr(self) -> str:
        return f"activation={self.activation}" if isinstance(self.activation, str) else ""


class FloatBranch(nn.Module):
    """residual + γ·module(norm(x)): a branch that stays float inside an integer block."""

    def __init__(self, norm: nn.Module, module: nn.Module, layer_scale: Tensor | None) -> None:
        super().__init__()
        self.norm, self.module = norm, module
        self.register_buffer("layer_scale", layer_scale)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.module(self.norm(x))
        return residual + (y if self.layer_scale is None else y * self.layer_scale)


class QBlock(nn.Module):
    """A pre-norm transformer block: x += attn(x), x += mlp(x), each branch's residual sum in its last epilogue.

    Attributes:
        attn: QAttention with LayerNorm, LayerScale and, for Swin, windows absorbed.
        mlp: QMlp likewise, or a FloatBranch.
    """

    def __init__(self, attn: QAttention, mlp: QMlp | FloatBranch) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] (or [B, H, W, C]) to the same shape.

        Args:   attn_mask: bool (True: attend) or additive float, [N, N] or [B, 1, 1 or N, N]; is_causal: must be False.
        Raises: ValueError for a causal mask or one that differs among heads.
        """
        if is_causal:
            raise ValueError("is_causal is True, expected False: pass the mask as attn_mask")
        return self.step(x, None, None if attn_mask is None else _additive(attn_mask))[0]

    def step(self, x: Tensor, bits: RowBits | None, mask: Tensor | None = None) -> tuple[Tensor, RowBits | None]:
        """:meth:`forward` with the bits that the block before decided; returns also those that this one decides."""
        mlp = self.mlp
        if not isinstance(mlp, QMlp):
            x, decided = self.attn(x, residual=x, mask=mask, bits=bits, decides=True)
            return mlp(x, residual=x), decided
        (x, taken), decided = self.attn(x, residual=x, mask=mask, then=mlp.prepared()[0], bits=bits, decides=True)
        return mlp(taken, residual=x, bits=decided), decided


class QBlocks(nn.Sequential):
    """Blocks one after another, of which each hands the token-wise bits that it decides to the next.

    Blocks that a caller runs one by one decide for themselves only: their qkv, Q and K keep the layers' own bits.
    """

    def forward(self, x: Tensor) -> Tensor:
        bits = None
        for block in self:
            x, bits = block.step(x, bits) if isinstance(block, QBlock) else (block(x), None)
        return x


def _additive(mask: Tensor) -> Tensor:
    """An ``attn_mask`` of ``scaled_dot_product_attention`` as the additive [G, 1 or N, N] of ``qattention``."""
    if mask.dim() not in (2, 4) or (mask.dim() == 4 and mask.shape[1] != 1):
        raise ValueError(f"attn_mask has shape {tuple(mask.shape)}, expected [N, N] or [B, 1, 1 or N, N]")
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    return mask.reshape(-1, *mask.shape[-2:])
