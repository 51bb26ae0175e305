"""What the integer modules share: exact buffers, the choice of a back end, run-time layouts."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from .. import backends
from ..formats import ActQuant, QTensor
from ..ops import quantize

_QUANT_TENSORS = ("scale", "lut", "lora_down")


class QModule(nn.Module):
    """A module whose own buffers are codes and scales: they follow ``.to(device)`` but never change their dtype.

    Attributes:
        backend: back end that every call of this module is pinned to (wins over an outer pin), or None.
    """

    backend: str | None = None

    def _apply(self, fn, recurse: bool = True):
        def exact(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(exact, recurse=False)
        self.forget()
        return self

    def forget(self) -> None:
        """Drop what :meth:`remember` holds: a buffer was replaced."""
        self.__dict__.pop("_remembered", None)

    def remember(self, build):
        """``build()``, kept until a buffer is replaced: collecting buffers in every call costs as much as a kernel.

        Tracers (compile, export) always see the buffers themselves.
        """
        if torch.compiler.is_compiling():
            return build()
        kept = self.__dict__.get("_remembered")
        if kept is None:
            kept = self.__dict__["_remembered"] = build()
        return kept

    def __getstate__(self) -> dict:
        return {k: v for k, v in super().__getstate__().items() if k != "_remembered"}

    def repack(self) -> None:
        """Bring packed buffers into the layout of this module's device and back end."""

    def pinned(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.backend is None else backends.backend(self.backend)


class Quantizer(QModule):
    """A quantizing epilogue as a module: ``ActQuant`` with its tensors as buffers.

    Args: quant: the parameters; ``row_qmax`` belongs to a call, not to a module, and must be None.
    """

    def __init__(self, quant: ActQuant) -> None:
        super().__init__()
        if quant.row_qmax is not None:
            raise ValueError("row_qmax is given, expected None (token-wise bit-widths belong to a call)")
        for name in _QUANT_TENSORS:
            self.register_buffer(name, getattr(quant, name))
        self.qmin, self.qmax, self.zero_point = quant.qmin, quant.qmax, quant.zero_point
        self.groups, self.subspace = quant.groups, quant.subspace
        #: the code of 0.0 (under a scale of 1 where scales are dynamic): what a padded token consists of
        self.zero_code = quant.zero_point if quant.lut is None else int(quant.lut[quant.zero_point + 128])

    @property
    def quant(self) -> ActQuant:
        """The epilogue as ops take it."""
        return self.remember(self._quant)

    def _quant(self) -> ActQuant:
        return ActQuant(
            qmin=self.qmin,
            qmax=self.qmax,
            scale=self.scale,
            zero_point=self.zero_point,
            groups=self.groups,
            lut=self.lut,
            lora_down=self.lora_down,
            subspace=self.subspace,
        )

    def forward(self, x: Tensor) -> QTensor:
        with self.pinned():
            return quantize(x, self.quant)


def prepack(model: nn.Module, backend: str | None = None) -> nn.Module:
    """Repack every integer module inside ``model`` for its device and ``backend`` (None: the device's best), in place.

    Lossless and repeatable. Raises: ValueError if the back end does not serve a module's device.
    """
    for module in model.modules():
        if isinstance(module, QModule):
            module.backend = backend
            module.repack()
    return model


def choose_layout(op: str, device: str, bits: int) -> str:
    """The weight layout that the back end serving ``op`` on ``device`` reads best for ``bits``-bit codes."""
    layouts = backends.resolve(op, device).layouts
    fitting = [x for x in layouts if x.startswith("int4")] if bits <= 4 else []
    return (fitting or [x for x in layouts if x.startswith("int8")])[0]
