"""A model with the same function and the inter-channel spread that large transformers have."""

import copy
from collections.abc import Iterator, Sequence

import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn


@torch.no_grad()
def outlier_variant(
    model: nn.Module, channels: int = 6, factors: Sequence[float] = (8.0, 16.0, 32.0, 64.0), seed: int = 0
) -> nn.Module:
    """Scale some channels of every block's LayerNorms up and the next layer's columns down.

    LN(x)·W^T = (s ⊙ LN(x))·(W / s)^T: γ and β of a chosen channel are multiplied by s, the columns of every
    linear layer that reads it divided by s. With powers of two both are exact in floating point, short of
    overflow, so the logits stay what they were; a per-tensor activation range widens by the largest s.

    Args:
        model: timm VisionTransformer (DeiT too) or SwinTransformer; left untouched.
        channels: how many channels per LayerNorm, drawn anew for each.
        factors: positive; the chosen channels take them in turn.
        seed: chooses the channels.
    Returns:
        A deep copy with outlier channels in norm1 -> attn.qkv and norm2 -> mlp.fc1 of every block.
    Raises:
        TypeError: `model` is not of a known family.
        ValueError: a block or layer of another form than expected (the message names it), `channels` outside
            1..width, or a factor that is not positive.
    """
    if not isinstance(model, VisionTransformer | SwinTransformer):
        raise TypeError(f"model must be a timm VisionTransformer or SwinTransformer, got {type(model).__name__}")
    if not factors or min(factors) <= 0:
        raise ValueError(f"factors must be positive and at least one, got {tuple(factors)}")
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for norm, linears in _norms_and_readers(model):
        width = norm.weight.numel()
        if not 1 <= channels <= width:
            raise ValueError(f"channels must be between 1 and {width}, the model's width; got {channels}")
        chosen = torch.randperm(width, generator=generator)[:channels]
        scale = torch.ones_like(norm.weight)
        scale[chosen] = scale.new_tensor([factors[i % len(factors)] for i in range(channels)])
        norm.weight *= scale
        norm.bias *= scale
        for linear in linears:
            linear.weight /= scale
    return model


def _norms_and_readers(model: nn.Module) -> Iterator[tuple[nn.LayerNorm, list[nn.Linear]]]:
    """Every block's LayerNorms with all the linear layers that read them."""
    stages = [model] if isinstance(model, VisionTransformer) else model.layers
    for index, block in enumerate(block for stage in stages for block in stage.blocks):
        where = f"block {index}"
        # Exact types: a subclass may read a norm twice or place it behind the layer.
        if type(block) not in (Block, SwinTransformerBlock):
            raise ValueError(f"{where} is a {type(block).__name__}, known are Block and SwinTransformerBlock")
        if type(block.attn) not in (Attention, WindowAttention):
            raise ValueError(f"{where}.attn is a {type(block.attn).__name__}, known are Attention, WindowAttention")
        gate = getattr(block.attn, "gate", None)
        yield _checked(f"{where}.norm1", block.norm1, [block.attn.qkv] + ([gate] if gate is not None else []))
        yield _checked(f"{where}.norm2", block.norm2, [getattr(block.mlp, "fc1", None)])


def _checked(where: str, norm: nn.Module, linears: list) -> tuple[nn.LayerNorm, list[nn.Linear]]:
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        raise ValueError(f"{where} must be a LayerNorm with weight and bias, got {norm}")
    for linear in linears:
        if not isinstance(linear, nn.Linear) or linear.in_features != norm.weight.numel():
            raise ValueError(f"{where} must feed Linear layers of its width, got {linear}")
    return norm, linears
