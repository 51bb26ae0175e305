"""Token-wise activation bits: which tokens an attention leaves their bits, and what that makes of a quantizer.

Codes stay int8 in memory, so that the integer products need nothing new: a token of fewer bits has a coarser scale of
its own, and takes as long. Hardware with int4 products would gain by groups: rows gathered by ``RowBits.high``, which
is known before they are quantized, run as two products of one width each, and their results scattered back as windows
are (``gather`` and ``scatter`` of the ops); share and resolution fix how many rows are in each group.

Source: PMQ (arXiv 2305.06559), reconstructed from its abstract; what is decided is exactly what an integer and a
simulated model share, so both call the functions here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..formats import ActQuant, TokenBits
from ..ops.qattention import ref


@dataclass(frozen=True)
class RowBits:
    """The bits of every row that a quantizer sees.

    Args:
        high: bool, any shape of M elements: rows that keep the quantizer's own bits.
        low: bits of the others.
    """

    high: Tensor
    low: int

    def qmax(self, own: int) -> Tensor:
        """[M] int32: the symmetric code range of each row under a quantizer whose own is ``own``."""
        low = min(own, (1 << (self.low - 1)) - 1)
        return torch.where(self.high.flatten(), own, low).to(torch.int32)

    def quant(self, quant: ActQuant) -> ActQuant:
        """``quant`` at these bits. Raises: ValueError unless its scales are dynamic and its codes uniform."""
        if quant.scale is not None or quant.lut is not None:
            found = "a level table" if quant.lut is not None else "static scales"
            raise ValueError(f"quant has {found}, expected dynamic scales and uniform codes for token-wise bits")
        return replace(quant, row_qmax=self.qmax(quant.qmax))

    def in_windows(self, token_of_slot: Tensor) -> RowBits:
        """High [B, T] in token order as [B, nW·N] in window slots, of which those that hold no token are low."""
        high = self.high.index_select(1, token_of_slot.clamp(min=0)) & (token_of_slot >= 0)
        return replace(self, high=high)


def received(
    q: Tensor,
    k: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    softmax_scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    class_token: bool = False,
) -> Tensor:
    """[B, N] float32: the attention that each key receives, mean over heads, of the first query or of all queries.

    Args: q, k ([B, H, N, d]): codes; the rest as :func:`vitq_kernels.qattention`. The probabilities are not quantized.
    """
    b, h, n, _ = q.shape
    if class_token:
        q, n = q[:, :, :1], 1
        q_scale = q_scale[..., :1] if q_scale.dim() == 3 else q_scale
        bias, mask = (None if x is None else x[:, :1] for x in (bias, mask))
    product = q.float() @ k.float().transpose(-1, -2)
    scores = ref.scores(product, q_scale, k_scale, softmax_scale, bias, mask)
    return scores.softmax(-1).reshape(b, h * n, -1).mean(1)


def decide(spec: TokenBits, scores: Tensor) -> RowBits:
    """The bits of B images' tokens by their scores [B, N]."""
    patches = scores[:, spec.prefix :]
    if spec.rank_by == "random":
        patches = _hashed(patches, spec.seed)
    order = patches.argsort(dim=1, descending=spec.rank_by != "inverted", stable=True)
    high = torch.zeros_like(patches, dtype=torch.bool).scatter(1, order[:, : spec.kept(patches.shape[1])], True)
    # Sizes by shape: len() would make a constant of the batch in a traced program.
    return RowBits(torch.cat([high.new_ones(high.shape[0], spec.prefix), high], 1), spec.low)


def _hashed(scores: Tensor, seed: int) -> Tensor:
    """Pseudo-random int64 in [0, 2^32) of the bit patterns of float32 ``scores``: each image has its own order."""
    word = (1 << 32) - 1
    bits = scores.contiguous().view(torch.int32).to(torch.int64) + (seed * 0x85EBCA6B & word)
    bits = (bits * 0x9E3779B1) & word
    return ((bits ^ (bits >> 15)) * 0xC2B2AE35) & word
