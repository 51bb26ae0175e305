"""Figures of merit, the same for every model: top-1, agreement, and the signal-to-noise ratio of the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


def sqnr_db(reference: Tensor, actual: Tensor) -> float:
    """10·log10(Σ reference² / Σ (reference − actual)²) over all elements; inf where they are equal."""
    noise = (reference.double() - actual.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


def top1(logits: Tensor, labels: Tensor) -> float:
    """Percent of rows of [N, C] whose largest logit is the label [N]."""
    return 100.0 * float((logits.argmax(1) == labels).double().mean())


def agreement(a: Tensor, b: Tensor) -> float:
    """Fraction of rows of two [N, C] whose largest logits are of the same class."""
    return float((a.argmax(1) == b.argmax(1)).double().mean())


@torch.inference_mode()
def predict(
    model: nn.Module, data: Dataset, batch_size: int = 64, advance: Callable[[int], None] = lambda n: None
) -> tuple[Tensor, Tensor]:
    """Logits [N, C] and labels [N] of ``model`` over ``data``; ``advance(n)`` is called after every n images.

    Raises: ValueError for a data set without images.
    """
    if len(data) == 0:
        raise ValueError("data has no images, expected at least one")
    logits, labels = [], []
    for images, targets in DataLoader(data, batch_size=batch_size):
        logits.append(model(images).float())
        labels.append(targets)
        advance(len(targets))
    return torch.cat(logits), torch.cat(labels)


@dataclass(frozen=True)
class Comparison:
    """A quantized model beside the float one on the same images.

    Attributes:
        top1_float, top1_simulated, top1_integer: percent.
        agreement_simulated_integer, agreement_float_integer: fraction of images of the same top-1 class.
        logit_sqnr_db: of the integer logits against the float ones.
        logit_difference_simulated_integer: the largest between any two logits; 0 where they are the same bits.
    """

    top1_float: float
    top1_simulated: float
    top1_integer: float
    agreement_simulated_integer: float
    agreement_float_integer: float
    logit_sqnr_db: float
    logit_difference_simulated_integer: float

    @classmethod
    def of(cls, labels: Tensor, floating: Tensor, simulated: Tensor, integer: Tensor) -> Comparison:
        """From labels [N] and the three models' logits [N, C]."""
        return cls(
            top1(floating, labels),
            top1(simulated, labels),
            top1(integer, labels),
            agreement(simulated, integer),
            agreement(floating, integer),
            sqnr_db(floating, integer),
            float((simulated - integer).abs().max()),
        )
