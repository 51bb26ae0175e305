"""Simulated linear layer: the integer layer's arithmetic in differentiable float32."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq_kernels.formats import LinearState, LowRankSpec
from vitq_kernels.ops import float_stages

from . import functional as fq
from .activation import ActivationQuantizer
from .simulated import SimulationOnly
from .weight import WeightQuantizer


class SimLinear(nn.Module):
    """y = s_x·s_w·Σ (q_x − z)·q_w + t·Uᵀ + bias, exactly as ``vitq_kernels.qlinear`` computes it.

    Operands without a spec stay float, so that a fresh SimLinear is the float layer.

    Attributes:
        weight: [N, K], the *latent* weight: rounding it gives the codes. Compensation may move it away from the float
            model's weight.
        bias: [N] or None.
        act, quant: quantizers of the input and the weight.
        simulated: a quantizer of the input that has no integer kernel, in place of ``act``, or None.
        held: codes and values of the weight while what they come from is not learned, see :meth:`hold`.
        lora: LowRankSpec; lora_down [R, K], lora_up [N, R] Parameters, or None. A side branch is computed with, and
            exported as, their float16 values.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone(), requires_grad=False)
        self.act = ActivationQuantizer()
        self.simulated: SimulationOnly | None = None
        self.quant = WeightQuantizer()
        self.held: tuple[Tensor, Tensor] | None = None
        self.lora = LowRankSpec()
        self.register_parameter("lora_down", None)
        self.register_parameter("lora_up", None)

    @classmethod
    def of(cls, linear: nn.Linear) -> SimLinear:
        return cls(linear.weight, linear.bias)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return tuple(self.weight.shape)

    def set_low_rank(
        self,
        kind: Literal["merged", "error", "subspace"],
        lora_down: Tensor | None = None,
        lora_up: Tensor | None = None,
    ) -> None:
        """Take a branch of lora_down [R, K] and lora_up [N, R], or none."""
        rank = 0 if lora_down is None else lora_down.shape[0]
        self.lora = LowRankSpec(rank, kind)
        self.lora_down = nn.Parameter(lora_down.detach().float().clone()) if rank else None
        self.lora_up = nn.Parameter(lora_up.detach().float().clone()) if rank else None

    @property
    def integer(self) -> bool:
        """Both operands of the product are integer codes."""
        return self.simulated is None and self.act.spec is not None and self.quant.spec is not None

    def decoded(self, x: Tensor) -> Tensor:
        """What rows x [M, K] are to the product once quantized."""
        if self.simulated is not None:
            return self.simulated(x)
        return x if self.act.spec is None else self.act.values(x)[0]

    def effective_weight(self) -> Tensor:
        """What is rounded: the latent weight, with a merged branch added."""
        if self.lora.rank and self.lora.kind == "merged":
            return self.weight + self.lora_up @ self.lora_down
        return self.weight

    def side_branch(self) -> tuple[Tensor, Tensor] | None:
        """lora_down and lora_up as they will be stored, or None without a side branch."""
        if not self.lora.rank or self.lora.kind == "merged":
            return None
        return fq.half_ste(self.lora_down), fq.half_ste(self.lora_up)

    def codes(self) -> Tensor:
        """[N, K] integer-valued floats."""
        return self.quant(self.effective_weight()) if self.held is None else self.held[0]

    def values(self) -> Tensor:
        """The weight [N, K] that the codes stand for, or the float one; differentiable."""
        if self.held is not None:
            return self.held[1]
        weight = self.effective_weight()
        return weight if self.quant.spec is None else self.quant.values(weight)

    def hold(self) -> None:
        """Compute codes and values once, until ``held`` is None again, if nothing that makes them is to be learned."""
        sources = [self.quant.scale, self.quant.alpha, self.weight]
        if self.lora.kind == "merged":
            sources += [self.lora_down, self.lora_up]
        if self.quant.spec is not None and not any(p is not None and p.requires_grad for p in sources):
            with torch.no_grad():
                self.held = self.codes(), self.values()

    def rows(self, x: Tensor) -> Tensor:
        """The layer's input as the rows [M, K] that it multiplies."""
        return x.reshape(-1, x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self.rows(x)).reshape(*x.shape[:-1], -1)

    def compute(self, x: Tensor) -> Tensor:
        """[M, K] to [M, N]: as the integer layer does it or, where gradients are recorded, to float32's rounding."""
        if torch.is_grad_enabled():
            return self._learned(x)
        weight = self.effective_weight() if self.quant.spec is None else self.codes()
        side = self.side_branch()
        t = None if side is None else float_stages.project(x, side[0])
        if t is not None and self.lora.kind == "subspace":
            x = x - float_stages.expand(t, side[0])
        if self.integer:
            q, scale = self.act(x)
            y = fq.integer_product(q, weight, self.act.limit, self.quant.limit).mul_(scale * self.quant.scale)
        else:
            y = self.decoded(x) @ weight.T
            if self.quant.spec is not None:
                y.mul_(self.quant.scale)
        if t is not None:
            y.add_(float_stages.expand(t, side[1].T))
        return y if self.bias is None else y.add_(self.bias)

    def _learned(self, x: Tensor) -> Tensor:
        """Of values: scales and bias are in the product, none of which passes over the outputs once more."""
        side = self.side_branch()
        t = None if side is None else x @ side[0].T
        if t is not None and self.lora.kind == "subspace":
            x = x - t @ side[0]
        y = F.linear(self.decoded(x), self.values(), self.bias)
        return y if t is None else y + t @ side[1].T

    @torch.no_grad()
    def export(self) -> LinearState:
        """The finished layer.

        Raises: ValueError if the weight has no QuantSpec, the input a quantizer of the simulation only, or the branch
            does not fit float16.
        """
        if self.simulated is not None:
            self.simulated.refuse(f"the input of a {self.shape} layer")
        if self.quant.spec is None:
            raise ValueError(f"the weight of a {self.shape} layer is not quantized, expected a QuantSpec")
        down, up = self.side_branch() or (None, None)
        if up is not None and not (down.isfinite().all() and up.isfinite().all()):
            raise ValueError(
                f"the low-rank branch of a {self.shape} layer exceeds float16, expected values below 65504"
            )
        static = self.act.scale is not None
        return LinearState(
            codes=self.codes().to(torch.int8),
            weight_scale=self.quant.scale.detach().clone(),
            weight=self.quant.spec,
            bias=None if self.bias is None else self.bias.detach().clone(),
            act=self.act.spec,
            act_scale=self.act.scale.detach().clone() if static else None,
            act_zero_point=self.act.integer_zero_point,
            lora=self.lora,
            lora_down=None if down is None else down.half(),
            lora_up=None if up is None else up.half(),
        )


class SimPatchConv(SimLinear):
    """A convolution whose stride is its kernel, as a linear layer over flattened patches [C·p·p]."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv.weight.flatten(1), conv.bias)
        self.kernel = tuple(conv.kernel_size)

    def rows(self, x: Tensor) -> Tensor:
        (b, c, h, w), (p, q) = x.shape, self.kernel
        return x.reshape(b, c, h // p, p, w // q, q).permute(0, 2, 4, 1, 3, 5).reshape(-1, c * p * q)

    def forward(self, x: Tensor) -> Tensor:
        (b, _, h, w), (p, q) = x.shape, self.kernel
        return self.compute(self.rows(x)).reshape(b, h // p, w // q, -1).permute(0, 3, 1, 2)
