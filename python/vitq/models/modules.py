"""Float modules that those of model libraries are rewritten into: one form, which the adapters describe.

A rewritten model computes what it did (to rounding) and is called as before; its state dict names these modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn import functional as F

# Swin-V2 bounds the factor on its cosines by 100.
_TOP_LOGIT_SCALE = math.log(100.0)


class QueryKeyStage(nn.Module):
    """What becomes of queries and keys between the qkv layer and q·kᵀ, in float: norms, rotation, cosine scale.

    Args:
        heads: H.
        q_norm, k_norm: modules over the last dimension, or None.
        rope: [N', 2·d] or [H, N', 2·d] sines and cosines of the tokens behind the first ``prefix``, or None.
        half: rotates the halves of a head against each other instead of neighbouring channels.
        logit_scale: [H, 1, 1] logarithm of the factor on the cosine of q and k (Swin-V2, arXiv 2111.09883), or None.
    """

    def __init__(
        self,
        heads: int,
        *,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        rope: Tensor | None = None,
        prefix: int = 0,
        half: bool = False,
        logit_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.prefix, self.half = heads, prefix, half
        self.q_norm, self.k_norm = q_norm or nn.Identity(), k_norm or nn.Identity()
        # A copy: a view of an embedding that blocks share would keep all of it.
        self.register_buffer("rope", None if rope is None else rope.detach().float().clone())
        self.register_buffer("logit_scale", None if logit_scale is None else logit_scale.detach().clone())

    def forward(self, qkv: Tensor) -> Tensor:
        """[B, N, 3·H·d] to the same shape.

        Raises: ValueError for another number of tokens than the rotation is of.
        """
        b, n, c = qkv.shape
        q, k, v = qkv.reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self._rotated(self.q_norm(q)), self._rotated(self.k_norm(k))
        if self.logit_scale is not None:
            q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=_TOP_LOGIT_SCALE).exp()
            k = F.normalize(k, dim=-1)
        return torch.stack((q, k, v)).permute(1, 3, 0, 2, 4).reshape(b, n, c)

    def _rotated(self, x: Tensor) -> Tensor:
        if self.rope is None:
            return x
        tokens = self.prefix + self.rope.shape[-2]
        if x.shape[2] != tokens:
            raise ValueError(f"x has {x.shape[2]} tokens, expected {tokens}: rotations are of one image size")
        front, back = x[:, :, : self.prefix], x[:, :, self.prefix :]
        return torch.cat((front, apply_rot_embed_cat(back, self.rope, half=self.half)), 2)


class Attention(nn.Module):
    """proj(norm(softmax(q·kᵀ·scale + bias)·v)) with q, k, v = stage(qkv(x)).

    Args:
        qkv, proj: linear layers; qkv's N is [3, H, d].
        heads: H.
        scale: factor on q·kᵀ.
        stage: QueryKeyStage, or None.
        bias: [H, N, N] additive scores, or None.
        norm: module in front of proj, or None.
    """

    def __init__(
        self,
        qkv: nn.Linear,
        proj: nn.Linear,
        heads: int,
        scale: float,
        *,
        stage: QueryKeyStage | None = None,
        bias: Tensor | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads, self.scale = qkv, proj, heads, float(scale)
        self.stage, self.norm = stage or nn.Identity(), norm or nn.Identity()
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, C] to [B, N, C']; mask ([G, N, N] or None) is added to the scores, image b uses mask[b mod G]."""
        b, n, _ = x.shape
        qkv = self.stage(self.qkv(x)).reshape(b, n, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.bias
        if mask is not None:
            mask = mask.repeat(b // mask.shape[0], 1, 1).unsqueeze(1)
            scores = mask if scores is None else scores + mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=scores, scale=self.scale)
        return self.proj(self.norm(y.transpose(1, 2).reshape(b, n, -1)))


class Gated(nn.Module):
    """act(a)·b of [..., 2·h] = (a, b), or a·act(b): the activation of SwiGLU and its like."""

    def __init__(self, act: nn.Module, last: bool = False) -> None:
        super().__init__()
        self.act, self.last = act, last

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return a * self.act(b) if self.last else self.act(a) * b


class Mlp(nn.Module):
    """fc2(norm(act(fc1(x))))."""

    def __init__(self, fc1: nn.Linear, act: nn.Module, fc2: nn.Linear, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.act, self.norm, self.fc2 = fc1, act, norm or nn.Identity(), fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.act(self.fc1(x))))


class LayerScale(nn.Module):
    """γ·x."""

    def __init__(self, gamma: nn.Parameter) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """x += ls1(attn(norm1(x))), x += ls2(mlp(norm2(x))); γ is None for no LayerScale."""

    def __init__(
        self,
        norm1: nn.Module,
        attn: nn.Module,
        norm2: nn.Module,
        mlp: nn.Module,
        gamma1: nn.Parameter | None = None,
        gamma2: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp
        self.ls1, self.ls2 = (nn.Identity() if gamma is None else LayerScale(gamma) for gamma in (gamma1, gamma2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Shell(nn.Module):
    """``inner`` behind the signature by which a library calls it.

    Args: folded: names of arguments whose values are inside ``inner`` already (rotations, relative positions).
    """

    def __init__(self, inner: nn.Module, folded: Iterable[str] = ()) -> None:
        nn.Module.__init__(self)  # not of a library's layer, which a shell may be a kind of, too
        self.inner, self.folded = inner, frozenset(folded)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, N, C] to [B, N, C']. Raises: ValueError for an argument that would change the result."""
        others = {f"positional argument {i}": value for i, value in enumerate(args, 1)} | kwargs
        for name, value in others.items():
            if name not in self.folded and value is not None and value is not False:
                raise ValueError(f"{name} is {type(value).__name__}, expected None: quantization gives it up")
        return self.inner(x)


def fused(linears: Iterable[nn.Linear], biases: Iterable[Tensor | None] | None = None) -> nn.Linear:
    """One linear layer of several with the same input: their outputs one after another.

    Args: biases: instead of the layers' own; a missing one is zero where another is there.
    """
    linears = list(linears)
    weight = torch.cat([linear.weight for linear in linears]).detach()
    biases = [linear.bias for linear in linears] if biases is None else list(biases)
    out = nn.Linear(weight.shape[1], weight.shape[0], bias=any(b is not None for b in biases), device="meta")
    out.weight = nn.Parameter(weight, requires_grad=False)
    if out.bias is not None:
        size = weight.shape[0] // len(biases)
        biases = [weight.new_zeros(size) if b is None else b.detach() for b in biases]
        out.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return out
