"""allocate.relevance: bits by how much of the logit a layer carries (LRP-QViT), and by what they cost it (Mix-QViT).

LRP-QViT (arXiv 2401.11243) scores a layer by layer-wise relevance propagation, Mix-QViT (arXiv 2501.06357) by that and
by the measured effect of quantizing the layer alone, in an integer quadratic program over the bits [P]. Their exact
scores and objectives could not be read, so these are reconstructed [R]:

- contribution Ω_l: share of the relevance of the winning logit, see ``allocation.relevance``.
- ``model``: min Σ_l Ω_l·4^(−b_l): the noise power of b bits, weighted by what the layer carries.
- ``measured``: min Σ_l Ω_l·Λ_l(b_l), Λ the error of the logits with only layer l at b bits. With one-hot x_l over the
  candidates this is the quadratic program Σ_l (Ω_l·x_l)ᵀ·diag(Λ_l)·x_l. It has no terms between layers, hence the
  frontier is its exact solution.

Components are the linear layers of the blocks; attention operands and probabilities keep the recipe's bits [R].
"""

from __future__ import annotations

from typing import Literal

from ..allocation.relevance import Products, layer_relevance
from .base import Calibration, method
from .bits import Allocation, ProbeOptions, noted, sensitivities


class RelevanceOptions(ProbeOptions):
    """
    Args:
        products: rule for the products of attention, see ``allocation.relevance``.
        sensitivity: what a layer's bits cost it, see the module. ``metric`` is of ``measured`` alone; ``images`` also
            of the relevance.
    """

    products: Products = "uniform"
    sensitivity: Literal["model", "measured"] = "model"


@method("allocate", "relevance")
def relevance(calibration: Calibration, options: RelevanceOptions) -> None:
    """Leaves the bits in the layers' formats, with the contributions as ``metrics["allocation"]``."""
    allocation = Allocation(calibration, options)
    paths, images = list(allocation.layers), calibration.images[: options.images]
    share = noted(
        calibration,
        "relevance",
        lambda: layer_relevance(calibration.reference, paths, images, calibration.batch, options.products),
    )
    if options.sensitivity == "measured":
        cost = sensitivities(allocation, calibration.reference.twin())
    else:
        # The noise of the weights and that of the activations.
        cost = {path: [4.0**-c.weights + 4.0**-c.activations for c in allocation.choices] for path in paths}
    errors = {path: [share[path] * c for c in cost[path]] for path in paths}
    frontier, picked = allocation.best(allocation.components(errors))
    chosen = dict(zip(paths, frontier.chosen[picked].tolist()))
    allocation.give(chosen)
    allocation.note(chosen, relevance=share)
