"""The calibration stages. A method is one module here: an ``Options`` model and a function under :func:`method`.

``transform -> initialise -> allocate -> compensate -> reconstruct -> refine``, then export; observation happens when a
method first asks for it. Each stage of a recipe is a list of steps; a step names a method and its options. Methods see
nothing of each other: what they share is the :class:`~vitq.stages.base.Calibration` they are called with.
"""

from . import compensate, evolution, initialise, packs, pareto, patchwise, rank_search, reconstruct, reparameterize
from .base import STAGES, Calibration, Method, Options, find, method

__all__ = [
    "STAGES",
    "Calibration",
    "Method",
    "Options",
    "compensate",
    "evolution",
    "find",
    "initialise",
    "method",
    "packs",
    "pareto",
    "patchwise",
    "rank_search",
    "reconstruct",
    "reparameterize",
]
