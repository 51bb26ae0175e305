"""What the error of a unit's output counts for: the losses of reconstruction.

e = z − z_fp is the error of a unit's output z [B, ...], g = ∂KL/∂z the gradient of what it does to the logits:
KL(softmax(logits_fp/T) ‖ softmax(logits(z)/T)) with the float model behind z. All losses are means over the elements of
one image, in units of e²: weights have mean 1, so that learning rates and regularisers are the same for all of them.

``output``: e² (QDrop, arXiv 2203.05740; AIQViT, Pack-PTQ).

``fisher_diagonal``: g²·e², g of each image where unit and prefix are quantized (BRECQ, arXiv 2102.05426) [P]; the
published code takes (|g| + 1)², and squared error by default.

``perturbation``: h·e², h = mean over images of |g(z_fp + δ) − g(z_fp − δ)|/2|δ| (APHQ-ViT, arXiv 2504.02508) [P]. There
δ is 1e-6 in every element, and h is called the Hessian's diagonal. It is |H·δ|/|δ|, and zero but for rounding: every
LayerNorm behind z takes out what all channels of a token have in common. [R] δ = ±ε at random, which makes h the size
of H's rows, with ε a thousandth of z_fp's root mean square, where float32 resolves the difference.

``fisher_low_rank``: half of it ḡ·e², half |e|ᵀGᵀ(ΔΔᵀ)⁻¹G|e| (FIMA-Q, arXiv 2506.11543) [C]: as g ≈ F·e with F the
Fisher matrix, its rows of G (means over images of |g|) and Δ (of |e|) are taken with the unit as it is being learned
behind a float prefix; one row before and one more after every steps/rank steps. ḡ is the mean of G's rows. The two
halves count alike when a row has come. [R] They do so over all images (there: one batch); directions in which the rows
of Δ agree to one part in a thousand are left out of the inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

LossName = Literal["output", "fisher_diagonal", "perturbation", "fisher_low_rank"]


def hooked(model: nn.Module, module: nn.Module, hook: Callable, images: Tensor) -> Tensor:
    """[B, C] logits with the output of ``module`` replaced by what ``hook`` returns."""
    handle = module.register_forward_hook(hook)
    try:
        return model(images)
    finally:
        handle.remove()


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Modules computed by these functions of their inputs instead of their own."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def undefined(shapes: Mapping[nn.Module, torch.Size]) -> dict[nn.Module, Callable]:
    """For :func:`standing_in`: NaN of these shapes [...] for every image, so that it shows if one is read."""
    return {m: lambda x, *_, shape=shape, **__: x.new_full((len(x), *shape), torch.nan) for m, shape in shapes.items()}


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits/T) in float64."""
    return (logits.double() / temperature).log_softmax(-1)


def kl_gradient(
    model: nn.Module,
    module: nn.Module,
    output: Tensor,
    images: Tensor,
    wanted: Tensor,
    temperature: float = 1.0,
    unread: Mapping[nn.Module, torch.Size] | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(P ‖ softmax(logits/T)) of each image [B] and its gradient at ``output``.

    Args:
        model: whose parameters are not learned; ``module`` of it returns ``output`` [B, ...] instead of its own.
        wanted: [B, C] log P, held fixed.
        unread: modules that nothing but ``module`` reads, if through others of them, and the shapes [...] of what they
            make of an image: they are not computed.
    """
    leaf = output.detach().requires_grad_()
    with torch.enable_grad(), standing_in({**undefined(unread or {}), module: lambda *_, **__: leaf}):
        # Only what follows the leaf is recorded.
        found = log_probabilities(model(images), temperature)
        loss = (wanted.exp() * (wanted - found)).sum(-1)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


class KLGradients:
    """g of all images at the output of any unit; the float model's probabilities are computed once."""

    def __init__(self, model: nn.Module, images: Tensor, batch: int, temperature: float) -> None:
        self._model, self._parts, self._temperature = model, images.split(batch), temperature
        with torch.no_grad():
            self._wanted = [log_probabilities(model(part), temperature) for part in self._parts]
        self._batch = batch

    def __call__(
        self, module: nn.Module, output: Tensor, unread: Mapping[nn.Module, torch.Size] | None = None
    ) -> Tensor:
        """g [B, ...] at z = ``output``; ``module`` is the float model's. unread: as in :func:`kl_gradient`."""
        return torch.cat(
            [
                kl_gradient(self._model, module, z, images, wanted, self._temperature, unread)[1]
                for z, images, wanted in zip(output.split(self._batch), self._parts, self._wanted)
            ]
        )


class UnitLoss:
    """Mean of w·e² over the elements of each image; w [1 or all images, ...], or None for 1."""

    def __init__(self, weights: Tensor | None = None) -> None:
        self.weights = None if weights is None else _mean_one(weights)

    def refresh(self, step: int, steps: int) -> None:
        """Called before every step."""

    def __call__(self, error: Tensor, images: Tensor) -> Tensor:
        """[b] losses of e [b, ...] of the images with indices ``images`` [b]."""
        square = error.square()
        if self.weights is not None:
            square = square * (self.weights if len(self.weights) == 1 else self.weights[images])
        return square.flatten(1).mean(1)


class LowRankLoss(UnitLoss):
    """``fisher_low_rank``.

    Args:
        target: z_fp of all images. rank: rows of G and Δ in the end.
        output: gives what the unit as it now is makes of all images behind a float prefix.
        gradient: g at such outputs.
    """

    def __init__(
        self, target: Tensor, output: Callable[[], Tensor], gradient: Callable[[Tensor], Tensor], rank: int
    ) -> None:
        super().__init__()
        self._target, self._output, self._gradient, self._rank = target, output, gradient, rank
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._add_row()

    def refresh(self, step: int, steps: int) -> None:
        if len(self._rows) < self._rank and step == len(self._rows) * steps // self._rank:
            self._add_row()

    def _add_row(self) -> None:
        z = self._output()
        error = z - self._target
        self._rows.append(tuple(t.abs().mean(0).flatten() for t in (self._gradient(z), error)))
        gradients, errors = (torch.stack(rows) for rows in zip(*self._rows))
        self.weights = _mean_one(gradients.mean(0).reshape(1, *z.shape[1:]))
        self._factor = low_rank_factor(gradients, errors).to(error)
        low_rank = float(self._low_rank(error).mean())
        diagonal = float(super().__call__(error, torch.arange(len(error), device=error.device)).mean())
        self._balance = diagonal / low_rank if low_rank > 0.0 else 0.0

    def _low_rank(self, error: Tensor) -> Tensor:
        """[b] |e|ᵀGᵀ(ΔΔᵀ)⁻¹G|e|."""
        return (error.abs().flatten(1) @ self._factor.T).square().sum(1)

    def __call__(self, error: Tensor, images: Tensor) -> Tensor:
        return 0.5 * (super().__call__(error, images) + self._balance * self._low_rank(error))


def low_rank_factor(gradients: Tensor, errors: Tensor) -> Tensor:
    """L [k, N] float64 with LᵀL = Gᵀ(ΔΔᵀ)⁻¹G, of G = ``gradients`` and Δ = ``errors`` [k, N].

    Eigenvalues of ΔΔᵀ below 1e-6 of the largest count as 0, and so does their inverse.
    """
    values, vectors = torch.linalg.eigh(errors.double() @ errors.double().T)
    keep = values > 1e-6 * values[-1]
    return (vectors[:, keep] / values[keep].sqrt()).T @ gradients.double()


def _mean_one(weights: Tensor) -> Tensor:
    mean = weights.mean()
    return weights / mean if bool(mean > 0) else torch.ones_like(weights)


def perturbation_weights(gradient: Callable[[Tensor], Tensor], output: Tensor, generator: torch.Generator) -> Tensor:
    """[1, ...] mean over images of |g(z + δ) − g(z − δ)|/2ε, z = ``output`` [B, ...], δ = ±ε at random."""
    epsilon = 1e-3 * float(output.square().mean().sqrt())
    signs = torch.randint(0, 2, output.shape, generator=generator, device="cpu").to(output) * 2 - 1
    change = gradient(output + epsilon * signs) - gradient(output - epsilon * signs)
    return change.abs().mean(0, keepdim=True) / (2 * epsilon)
