"""Figures of merit, the same for every model: top-1, agreement, and the signal-to-noise ratio of the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


def sqnr_db(reference: Tensor, actual: Tensor) -> float:
    """10·log10(Σ reference² / Σ (reference − actual)²) over all elements; inf where they are equal."""
    noise = (reference.double() - actual.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))


def top1(logits: Tensor, labels: Tensor) -> float:
    """Percent of rows of [N, C] whose largest logit is the label [N]; of points, [B, N, C] and [B, N]."""
    return 100.0 * float((logits.argmax(-1) == labels).double().mean())


def agreement(a: Tensor, b: Tensor) -> float:
    """Fraction of rows of two [..., C] whose largest logits are of the same class."""
    return float((a.argmax(-1) == b.argmax(-1)).double().mean())


@torch.inference_mode()
def predict(
    model: nn.Module, data: Dataset, batch_size: int = 64, advance: Callable[[int], None] = lambda n: None
) -> tuple[Tensor, Tensor]:
    """Logits [N, C] and labels [N] on the CPU, of ``model`` where it is; ``advance(n)`` is called after every n images.

    Raises: ValueError for a data set without images.
    """
    if len(data) == 0:
        raise ValueError("data has no images, expected at least one")
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    logits, labels = [], []
    for images, targets in DataLoader(data, batch_size=batch_size):
        logits.append(model(images.to(device)).float().cpu())
        labels.append(targets)
        advance(len(targets))
    return torch.cat(logits), torch.cat(labels)


@dataclass(frozen=True)
class Comparison:
    """A quantized model beside the float one on the same images.

    Attributes:
        top1_float, top1_simulated, top1_integer: percent.
        agreement_simulated_integer, agreement_float_quantized: fraction of images of the same top-1 class.
        logit_sqnr_db: of the quantized logits against the float ones.
        logit_difference_simulated_integer: the largest between any two logits; 0 where they are the same bits.

    What is quantized is the integer model, or the simulated one where there is no integer one; figures that need an
    integer model are None then.
    """

    top1_float: float
    top1_simulated: float
    top1_integer: float | None
    agreement_simulated_integer: float | None
    agreement_float_quantized: float
    logit_sqnr_db: float
    logit_difference_simulated_integer: float | None

    @classmethod
    def of(cls, labels: Tensor, floating: Tensor, simulated: Tensor, integer: Tensor | None) -> Comparison:
        """From labels [N] and the models' logits [N, C]."""
        quantized = simulated if integer is None else integer
        return cls(
            top1(floating, labels),
            top1(simulated, labels),
            None if integer is None else top1(integer, labels),
            None if integer is None else agreement(simulated, integer),
            agreement(floating, quantized),
            sqnr_db(floating, quantized),
            None if integer is None else float((simulated - integer).abs().max()),
        )
