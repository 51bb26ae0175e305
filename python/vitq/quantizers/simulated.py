"""Quantizers that papers propose and no integer kernel computes: exact in simulation, refused at export.

Their codes have no affine decode and no common scale, so that neither an integer product nor a level table on the int8
grid is what they mean. Each says so in ``reason``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import functional as fq

_kinds: dict[str, type[SimulationOnly]] = {}


class SimulationOnly(nn.Module):
    """Floats to the floats that codes would decode to.

    Args: bits: of a code; values: what else the quantizer is, plain numbers.
    Attributes: reason: why no integer kernel computes it.
    """

    reason: ClassVar[str]

    def __init__(self, bits: int, **values: float) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"bits is {bits}, expected 2 to 8")
        self.bits, self.values = bits, values

    def __init_subclass__(cls) -> None:
        _kinds[cls.__name__] = cls

    def levels(self) -> Tensor:
        """[2^bits] float64, ascending: what the codes decode to."""
        raise NotImplementedError

    def at(self, bits: int) -> SimulationOnly:
        """The quantizer over the same range at other bits. Raises: ValueError for a kind that cannot tell how."""
        raise ValueError(f"bits of {type(self).__name__} is {self.bits} once and for all, expected a uniform format")

    def refuse(self, where: str) -> None:
        """Raises: ValueError saying why ``where`` cannot be exported."""
        raise ValueError(f"{where} has no integer form: {self.reason}")

    def plain(self) -> dict[str, Any]:
        """The quantizer as plain JSON values; :func:`from_plain` takes them back."""
        return {"kind": type(self).__name__, "bits": self.bits, **self.values}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.plain().items() if k != "kind")


def from_plain(plain: dict[str, Any]) -> SimulationOnly:
    """Inverse of :meth:`SimulationOnly.plain`."""
    return _kinds[plain["kind"]](**{k: v for k, v in plain.items() if k != "kind"})


class LogLevels(SimulationOnly):
    """scale·base^−q − shift, q = rne(−log_base((x + shift)/scale)) in 0..2^bits − 2; the last code is zero, −shift.

    Base 2 as in FQ-ViT (Lin et al. 2022), √2 as in RepQ-ViT (Li et al. 2023), any base and a shift for post-GELU values
    as in AdaLog (Wu et al. 2024). [R] Their public codes decode 2^bits powers and zero besides, one value more than
    there are codes; here zero takes the place of the smallest power.

    Args: base > 1; scale > 0: the value of code 0; shift: added before the logarithm.
    """

    reason = "its levels are powers of one base: neither uniform nor on the int8 grid (log, AdaLog)"

    def __init__(self, bits: int, base: float, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__(bits, base=base, scale=scale, shift=shift)
        if base <= 1.0 or scale <= 0.0:
            raise ValueError(f"base and scale are {base} and {scale}, expected base > 1 and scale > 0")

    def forward(self, x: Tensor) -> Tensor:
        base, scale, shift = self.values["base"], self.values["scale"], self.values["shift"]
        ratio = ((x + shift) / scale).clamp_min(torch.finfo(x.dtype).tiny)
        code = fq.round_ste((-ratio.log() / math.log(base)).clamp_min(0.0))
        value = scale * torch.exp(-code * math.log(base))
        return torch.where(code < 2**self.bits - 1, value, torch.zeros_like(value)) - shift

    def levels(self) -> Tensor:
        code = torch.arange(2**self.bits - 1, dtype=torch.float64, device="cpu")
        powers = self.values["scale"] * self.values["base"] ** -code
        return torch.cat([powers.new_zeros(1), powers.flip(0)]) - self.values["shift"]


class ShiftedLog(SimulationOnly):
    """2^(low + q·step) − eta, q = rne((log2(x + eta) − low)/step) in 0..2^bits − 1.

    The shift-uniform-log2 quantizer of I&S-ViT (Zhong et al. 2023): uniform steps of log2(x + η) over its whole range,
    log2(η) at x = 0 included, so that small values get levels of their own and 0 stays 0.

    Args: eta > 0; high: the largest x to represent.
    """

    reason = "its levels are uniform in log2(x + η): not on the int8 grid (I&S-ViT)"

    def __init__(self, bits: int, eta: float, high: float = 1.0) -> None:
        super().__init__(bits, eta=eta, high=high)
        if eta <= 0.0 or high <= 0.0:
            raise ValueError(f"eta and high are {eta} and {high}, expected positive numbers")

    def forward(self, x: Tensor) -> Tensor:
        eta, n = self.values["eta"], 2**self.bits - 1
        low = math.log2(eta)
        step = (math.log2(self.values["high"] + eta) - low) / n
        code = fq.round_ste((((x.clamp_min(0.0) + eta).log2() - low) / step).clamp(0.0, n))
        return torch.exp2(low + code * step) - eta

    def levels(self) -> Tensor:
        eta, n = self.values["eta"], 2**self.bits - 1
        low, high = math.log2(eta), math.log2(self.values["high"] + eta)
        return torch.exp2(torch.linspace(low, high, n + 1, dtype=torch.float64, device="cpu")) - eta


class TwinUniform(SimulationOnly):
    """Two uniform ranges of 2^(bits−1) codes each, told apart by one bit of the code (PTQ4ViT, Yuan et al. 2022).

    Post-softmax (``signed`` 0): below 2^(bits−1)·fine in steps of ``fine``, above in steps of ``coarse``.
    Post-GELU (``signed`` 1): −1..−2^(bits−1) steps of ``fine`` below 0, 0..2^(bits−1) − 1 steps of ``coarse`` above.
    """

    reason = "a bit of each code chooses between two scales: the integer product has one (twin uniform)"

    def __init__(self, bits: int, fine: float, coarse: float, signed: int = 0) -> None:
        super().__init__(bits, fine=fine, coarse=coarse, signed=signed)
        if fine <= 0.0 or coarse <= 0.0:
            raise ValueError(f"fine and coarse are {fine} and {coarse}, expected positive steps")

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse, count = self.values["fine"], self.values["coarse"], 2 ** (self.bits - 1)
        if self.values["signed"]:
            # 0 is the other range's.
            small = fq.round_ste((x / fine).clamp(-count, -1.0)) * fine
            in_small = x < -0.5 * fine
        else:
            small = fq.round_ste((x / fine).clamp(0.0, count - 1)) * fine
            in_small = x < count * fine
        large = fq.round_ste((x / coarse).clamp(0.0, count - 1)) * coarse
        return torch.where(in_small, small, large)

    def at(self, bits: int) -> TwinUniform:
        shift = 2.0 ** (self.bits - bits)
        return TwinUniform(bits, self.values["fine"] * shift, self.values["coarse"] * shift, self.values["signed"])

    def levels(self) -> Tensor:
        count = 2 ** (self.bits - 1)
        code = torch.arange(count, dtype=torch.float64, device="cpu")
        small = -self.values["fine"] * (code + 1) if self.values["signed"] else self.values["fine"] * code
        return torch.cat([small, self.values["coarse"] * code]).sort().values
