"""The calibration stages. A method is one module here: an ``Options`` model and a function under :func:`method`.

``transform -> initialise -> allocate -> compensate -> reconstruct -> refine``, then export; observation happens when a
method first asks for it. Each stage of a recipe is a list of steps; a step names a method and its options. Methods see
nothing of each other: what they share is the :class:`~vitq.stages.base.Calibration` they are called with. A module in
this folder is found by being there.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import STAGES, Calibration, Method, Options, find, method

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["STAGES", "Calibration", "Method", "Options", "find", "method"]
