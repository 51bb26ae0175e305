"""Gradients of the model's own log-likelihood at its layers: where an error costs most, without labels.

With y drawn from the float model's prediction p(y | x), E[g·gᵀ] of g = ∂(−log p_y)/∂z is the Fisher information of p at
z, and that is the Hessian of KL(p ‖ p_q) at p_q = p, to which the model's own error adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .simulate import SimModel, recording


def sampled_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """[B] −log p_y of logits [B, C], y drawn from p by ``generator`` (of the CPU)."""
    log_p = logits.log_softmax(-1)
    y = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(logits.device)
    return -log_p.gather(1, y).squeeze(1)


def combined_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """[B] losses of logits [B, C] whose gradients v have the second moment of :func:`sampled_loss`'s, e_y − p.

    v = √p⊙ε − p·Σ√p⊙ε with independent signs ε: E vvᵀ = diag(p) − ppᵀ. Every draw weighs all labels, where nearly all
    labels that a confident model draws are the same.
    """
    p = logits.detach().softmax(-1)
    signs = torch.randint(0, 2, p.shape, generator=generator, device="cpu").to(p) * 2 - 1
    root = p.sqrt() * signs
    return (logits * (root - p * root.sum(-1, keepdim=True))).sum(-1)


def output_gradients(
    model: SimModel,
    batches: Iterable[Tensor],
    paths: Iterable[str],
    generator: torch.Generator,
    loss: Callable[[Tensor, torch.Generator], Tensor] = sampled_loss,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Linear path -> rows [T, K] that enter it and gradients [T, N] at its output, of one image's loss each.

    Args: model: float; batches: of images; generator: of what ``loss`` draws for logits.
    """
    linears = {path: model.linears[path] for path in paths}
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {path: ([], []) for path in linears}
    outputs: dict[str, Tensor] = {}

    def record(path: str, inputs: tuple, output: Tensor) -> None:
        seen[path][0].append(linears[path].rows(inputs[0]).detach())
        # An output needs a gradient for its own sake where nothing before it is learnable.
        outputs[path] = output if output.requires_grad else output.requires_grad_()

    with torch.enable_grad(), recording(linears, record):
        for images in batches:
            total = loss(model(images), generator).sum()
            found = torch.autograd.grad(total, [outputs[path] for path in linears])
            for path, gradient in zip(linears, found):
                n = linears[path].shape[0]
                # Patches come as [B, N, h, w], everything else has its features last.
                rows = gradient if gradient.shape[-1] == n else gradient.flatten(2).transpose(1, 2)
                seen[path][1].append(rows.reshape(-1, n))
    return {path: (torch.cat(x), torch.cat(g)) for path, (x, g) in seen.items()}


def fisher_traces(
    model: SimModel, batches: Iterable[Tensor], paths: list[str], draws: int, generator: torch.Generator
) -> dict[str, float]:
    """tr(F) of the weight of every layer, F = E_x E_y g·gᵀ with g = ∂(−log p_y)/∂W; ``draws`` per image estimate E_y.

    Args: model: float; batches: of images.
    """
    traces, count = dict.fromkeys(paths, 0.0), 0
    for images in batches:
        count += len(images)
        for _ in range(draws):
            for path, rows in output_gradients(model, [images], paths, generator, combined_loss).items():
                x, g = (of_images.unflatten(0, (len(images), -1)) for of_images in rows)
                traces[path] += float(torch.bmm(g.mT, x).square().sum()) / draws
    return {path: value / count for path, value in traces.items()}
