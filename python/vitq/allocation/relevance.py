"""Layer-wise relevance propagation through the float transformer: how much of the winning logit each layer carries.

The rules are those of AttnLRP (Achtibat et al. 2024) and, for ``values``, of conservative propagation (Ali et al.
2022), in the form relevance = value ⊙ gradient of a model whose outputs are the same and whose derivatives are the
rules:

- linear layers, means, residual sums: the ε-rule with ε -> 0. A bias takes its share, b ⊙ gradient.
- activation: f(x) = x·(f(x)/x) with the factor held fixed; all relevance passes.
- LayerNorm: its standard deviation is held fixed, so that it is linear; β is a bias.
- products, ``uniform``: each factor of Q·Kᵀ and of P·V takes half. The softmax p of s between them is expanded to
  first order, R_s = s ⊙ (R_p − p·ΣR_p); what the expansion point absorbs is not passed on.
- products, ``values``: the probabilities are held fixed, so V takes all and attention is linear. Then the relevance of
  the image and of everything that is added to it on the way (biases, position embedding, class token) sums to the
  logit exactly.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..models.sites import Family
from ..quantizers import SimAttention
from ..quantizers.floats import SimLayerNorm
from ..simulate import SimModel, recording

Products = Literal["uniform", "values"]


def layer_relevance(
    model: SimModel, paths: list[str], images: Tensor, batch: int, products: Products = "uniform"
) -> dict[str, float]:
    """Share of each layer in the relevance of the largest logit, Σ_l = 1.

    Of one image: Σ|R| over the layer's outputs, divided by that of all layers; then the mean over images. Absolute
    values, because signed sums are conserved: two layers in a row would get the same [R].

    Args: model: a float SimModel, left as it is. paths: linear layers. images: [B, C, H, W].
    """
    model = model.twin()
    apply_rules(model, products)
    total = torch.zeros(len(paths), dtype=torch.float64, device="cpu")
    for part in images.split(batch):
        outputs: dict[str, Tensor] = {}
        with torch.enable_grad(), recording({path: model.linears[path] for path in paths}, partial(_keep, outputs)):
            logits = model(part.clone().requires_grad_())
            gradients = torch.autograd.grad(logits.amax(1).sum(), [outputs[path] for path in paths])
        # Windows of one image lie side by side in the batch.
        shares = torch.stack(
            [(outputs[p].detach() * g).double().reshape(len(part), -1).abs().sum(1) for p, g in zip(paths, gradients)]
        )
        total += (shares / shares.sum(0)).sum(1).cpu()
    return dict(zip(paths, (total / len(images)).tolist()))


def _keep(outputs: dict[str, Tensor], path: str, inputs: tuple, output: Tensor) -> None:
    outputs[path] = output


def apply_rules(model: SimModel, products: Products) -> None:
    """Make ``model``'s derivatives the rules of relevance, in place; its outputs stay, to rounding.

    Attention that the family's adapter does not know keeps its plain derivatives.
    """
    for module in model.model.modules():
        if isinstance(module, SimLayerNorm | nn.LayerNorm):
            module.register_forward_hook(_norm)
    for path in _activations(model.family):
        model.model.get_submodule(path).register_forward_hook(_activation)
    for attention in model.attentions.values():
        attention.attend = partial(_attend, attention, products)


def _activations(family: Family) -> list[str]:
    return [block.mlp.act_path for block in family.blocks() if block.mlp is not None]


def _norm(module: SimLayerNorm | nn.LayerNorm, inputs: tuple, output: Tensor) -> Tensor:
    (x,) = inputs
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + module.eps).sqrt().detach()
    if module.weight is not None:
        y = y * module.weight
    return y if module.bias is None else y + module.bias


def _activation(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """For activations with f(0) = 0."""
    (x,) = inputs
    return x * torch.where(x == 0, 0.0, output / x).detach()


def _attend(attention: SimAttention, products: Products, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
    (q, k, v), (qs, ks, _) = attention.split(qkv)
    if products == "uniform":
        q, k, v = _half(q), _half(k), _half(v)
    p = attention.scores(attention.product(q, k), qs, ks, mask).softmax(-1)
    p = _half(p) if products == "uniform" else p.detach()
    b, n, _ = qkv.shape
    return (p @ v).transpose(1, 2).reshape(b, n, -1)


def _half(x: Tensor) -> Tensor:
    """x with half its derivative."""
    return x.detach() + (x - x.detach()) / 2
