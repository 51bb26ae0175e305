"""What the integer modules share: exact buffers, prepared op calls, run-time layouts."""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..formats import ActQuant, QTensor, QuantSpec
from ..ops._schema import Epilogue
from ..ops.quantize import run_quantize
from .token_bits import RowBits

_WATCHED = ("_buffers", "_modules")
_QUANT_TENSORS = ("scale", "lut", "lora_down")


class _Watched(dict):
    """The buffers or the children of a module: whoever replaces one drops what the module has prepared.

    Some write here without an assignment to the module, ``torch.func.functional_call`` for one. Comparing the objects
    in every call instead would touch each of them, and cost a tenth of a small model's time in cache misses.
    """

    __slots__ = ("_module",)

    def __init__(self, entries: dict, module: QModule) -> None:
        super().__init__(entries)
        self._module = weakref.ref(module)

    def __reduce__(self):
        return dict, (dict(self),)  # the owner of a copy watches it anew

    def _dropping(method):
        @functools.wraps(method)
        def changed(self, *args, **kwargs):
            result = method(self, *args, **kwargs)
            module = self._module()
            if module is not None:
                module._drop_prepared()
            return result

        return changed

    __setitem__, __delitem__ = _dropping(dict.__setitem__), _dropping(dict.__delitem__)
    __ior__, update, setdefault = _dropping(dict.__ior__), _dropping(dict.update), _dropping(dict.setdefault)
    clear, pop, popitem = _dropping(dict.clear), _dropping(dict.pop), _dropping(dict.popitem)


class QModule(nn.Module):
    """A module whose own buffers are codes and scales: they follow ``.to(device)`` but never change their dtype.

    Attributes:
        backend: back end that every call of this module is pinned to (wins over an outer pin), or None.
    """

    backend: str | None = None
    _prepared: Any = None

    def __init__(self) -> None:
        super().__init__()
        self._watch()

    def _apply(self, fn, recurse: bool = True):
        def exact(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(exact, recurse=False)
        return self

    def prepare(self) -> Any:
        """What the forward needs and what does not change between calls: children, checked op arguments."""
        raise NotImplementedError

    def prepared(self) -> Any:
        """:meth:`prepare`, kept until an attribute, a buffer or a child of this module is replaced.

        Tracers (compile, export) always see the buffers themselves. Threads may call this at once: at worst, each
        prepares.
        """
        if is_compiling():
            return self.prepare()
        value = self._prepared
        if value is None:
            value = self.__dict__["_prepared"] = self.prepare()  # not through __setattr__, which drops it
        return value

    def _drop_prepared(self) -> None:
        self.__dict__.pop("_prepared", None)

    def _watch(self) -> None:
        for name in _WATCHED:
            self.__dict__[name] = _Watched(self.__dict__[name], self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _WATCHED:
            self._watch()
        self._drop_prepared()

    def __getstate__(self) -> dict:
        return {k: v for k, v in super().__getstate__().items() if k != "_prepared"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._watch()

    def repack(self) -> None:
        """Bring packed buffers into the layout of this module's device and back end."""


class Coded(QModule):
    """A module whose buffers are codes and scales of parameters that are no tensors: zero points, layouts, intervals.

    A ``state_dict`` says which it belongs to (``_extra_state``, text as uint8: safetensors can hold it), and one of
    others is refused, as tensors of other shapes are; :func:`vitq.save` and :func:`vitq.load` carry them along.
    """

    def meaning(self) -> dict[str, Any]:
        """What the buffers mean something under, by name."""
        raise NotImplementedError

    def _described(self) -> str:
        return "\n".join(f"{name}={value}" for name, value in self.meaning().items())

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(self._described().encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: it is this module's own, or the whole of the state is refused."""

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        own = theirs = self._described()
        if (given := state_dict.get(f"{prefix}_extra_state")) is not None:
            theirs = bytes(given.tolist()).decode()
        if theirs != own:
            pairs = itertools.zip_longest(theirs.splitlines(), own.splitlines())
            differing = ", ".join(f"{a}, expected {b}" for a, b in pairs if a != b)
            whose = prefix.removesuffix(".") or "this module"
            errors.append(f"the state of {whose} has {differing}; vitq.save and vitq.load keep models whole")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class Quantizer(Coded):
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
        return self.prepared().quant

    def prepare(self) -> Epilogue:
        quant = ActQuant(
            qmin=self.qmin,
            qmax=self.qmax,
            scale=self.scale,
            zero_point=self.zero_point,
            groups=self.groups,
            lut=self.lut,
            lora_down=self.lora_down,
            subspace=self.subspace,
        )
        return Epilogue(quant)

    def meaning(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("qmin", "qmax", "zero_point", "groups", "subspace")}

    def at(self, bits: RowBits | None) -> Epilogue:
        """The prepared epilogue, with token-wise ``bits`` one of this call."""
        return self.prepared() if bits is None else Epilogue(bits.quant(self.quant))

    def forward(self, x: Tensor) -> QTensor:
        return run_quantize(x, self.prepared(), self.backend)


def prepack(model: nn.Module, backend: str | None = None) -> nn.Module:
    """Repack every integer module inside ``model`` for its device and ``backend`` (None: the device's best), in place.

    Lossless and repeatable. Raises: ValueError if the back end does not serve a module's device.
    """
    for module in model.modules():
        if isinstance(module, QModule):
            module.backend = backend
            module.repack()
    return model


def choose_layout(layouts: tuple[str, ...], weight: QuantSpec, act: QuantSpec | None) -> str:
    """The first of a back end's weight layouts that fits codes of ``weight`` under activations of ``act``."""
    both = [spec is not None and spec.bits <= 4 and spec.table is None for spec in (weight, act)]
    fitting = [x for x in layouts if x.startswith("int4") and (all(both) or not x.endswith("_s4"))]
    return (fitting if weight.bits <= 4 and fitting else [x for x in layouts if x.startswith("int8")])[0]
