"""Traces of the Fisher information of layers, without labels: from gradients of the model's own predictions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..simulate import SimModel, recording


def fisher_traces(
    model: SimModel, paths: list[str], images: Tensor, batch: int, draws: int, generator: torch.Generator
) -> dict[str, float]:
    """tr(F) of each layer's weight, F = E_x E_{y ~ p(·|x)} ∇log p(y|x)·∇log p(y|x)ᵀ, p the softmax of the logits.

    The expectation over y is estimated from ``draws`` random combinations of classes per image: label draws of a
    confident model would nearly always be the same class.

    Args: model: a float SimModel. paths: linear layers. images: [B, C, H, W].
    """
    total = dict.fromkeys(paths, 0.0)
    for part in images.split(batch):
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        record = partial(_keep, inputs, outputs)
        with torch.enable_grad(), recording({path: model.linears[path] for path in paths}, record):
            logits = model(part.clone().requires_grad_())
        p = logits.detach().softmax(-1)
        for _ in range(draws):
            signs = torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1
            for path, of_images in _squares(logits, scores(p, signs), inputs, outputs).items():
                total[path] += float(of_images.sum()) / draws
    return {path: value / len(images) for path, value in total.items()}


def _keep(inputs: dict[str, Tensor], outputs: dict[str, Tensor], path: str, given: tuple, output: Tensor) -> None:
    inputs[path], outputs[path] = given[0].detach(), output


def scores(p: Tensor, signs: Tensor) -> Tensor:
    """[B, C] combinations v of the gradients e_y − p of log p(y) with E vvᵀ = diag(p) − ppᵀ = E_y (e_y−p)(e_y−p)ᵀ.

    Args: p: probabilities; signs: independent ±1 of equal chance.
    """
    root = p.sqrt() * signs
    return root - p * root.sum(-1, keepdim=True)


def _squares(logits: Tensor, v: Tensor, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """[B] squared norms of the gradients of each image's v·logits by each layer's weight."""
    gradients = torch.autograd.grad((logits * v).sum(), list(outputs.values()), retain_graph=True)
    out = {}
    for path, g in zip(outputs, gradients):
        x, g = (t.reshape(len(logits), -1, t.shape[-1]) for t in (inputs[path], g))
        out[path] = torch.bmm(g.mT, x).square().sum((1, 2))
    return out
