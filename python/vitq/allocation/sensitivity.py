"""What quantizing one component alone does to the output: forward passes only, no labels, prefixes run once.

PMQ's global metric, reconstructed from its abstract [R] (arXiv 2305.06559):
Ω_i(b) = mean over images of ‖z − z(only component i at b bits)‖² / ‖z‖², z the logits; KL as an alternative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from ..models.sites import BlockSite
from ..quantizers import SimLinear
from ..simulate import SimModel, inputs_of

Metric = Literal["l2", "kl"]
Setting = Callable[[SimLinear], None]


def distance(reference: Tensor, logits: Tensor, metric: Metric) -> float:
    """Mean over rows of two [B, C] of ‖z − z'‖²/‖z‖² (``l2``) or of KL(softmax z ‖ softmax z') in nats (``kl``)."""
    z, other = reference.double(), logits.double()
    if metric == "l2":
        return float(((z - other).square().sum(1) / z.square().sum(1)).mean())
    p, q = z.log_softmax(1), other.log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


@torch.no_grad()
def block_sensitivities(
    model: SimModel,
    block: BlockSite,
    images: Tensor,
    logits: Tensor,
    settings: dict[str, Sequence[Setting]],
    metric: Metric = "l2",
    batch: int = 32,
    restore: dict[str, Setting] | None = None,
) -> dict[str, list[float]]:
    """Ω of every component of one block under every setting.

    The prefix runs once per block; each setting runs the block and what follows.

    Args:
        model: as it was afterwards; float, or quantized with ``restore``.
        logits: [B, C] of ``images`` [B, C, H, W], that Ω is measured against.
        settings: path of a linear layer of the block -> what to do to it, one per choice: each gives the layer its
            quantizers.
        restore: path -> what makes the layer what it was; None takes its quantizers away.
    """
    entering = inputs_of(model.model, block.path, images, batch)
    module = model.model.get_submodule(block.path)
    out: dict[str, list[float]] = {path: [] for path in settings}
    for path, choices in settings.items():
        linear = model.linears[path]
        for setting in choices:
            setting(linear)
            parts = []
            for x, part in zip(entering.split(batch), images.split(batch)):
                with _given(model, block, module(x)):
                    parts.append(model(part))
            (make_float if restore is None else restore[path])(linear)
            out[path].append(distance(logits, torch.cat(parts), metric))
    return out


def make_float(linear: SimLinear) -> None:
    """Take quantizers and branch away again."""
    linear.act.set(None)
    linear.simulated = None
    linear.quant.set(None)
    linear.set_low_rank("error")


@contextmanager
def _given(model: SimModel, block: BlockSite, output: Tensor) -> Iterator[None]:
    """``block`` returns ``output`` at once; so the blocks before it do nothing: nobody sees what they return."""
    sites = model.family.blocks()
    replaced: list[nn.Module] = []
    try:
        for site in sites[: sites.index(block) + 1]:
            module = model.model.get_submodule(site.path)
            known = site == block
            module.forward = lambda x, *_, known=known, **__: output if known else x
            replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward
