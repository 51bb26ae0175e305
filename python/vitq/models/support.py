"""Which architectures can be quantized, how far, and why not further: found by trying each on the meta device."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial

import timm
import torch
from torch import nn

from .adapters import adapter_for, unknown

#: Modules of timm whose architectures have attention among tokens.
_TIMM = (
    "beit", "cait", "coat", "convit", "crossvit", "davit", "deit", "efficientformer", "eva", "gcvit", "hiera",
    "hieradet_sam2", "levit", "maxxvit", "mvitv2", "naflexvit", "nest", "pit", "pvt_v2", "qwen3_vit",
    "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "tiny_vit", "tnt", "twins", "visformer",
    "vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam",
    "vitamin", "volo", "xcit",
)  # fmt: skip
#: Of these, modules whose architectures are of one ``depth``.
_UNIFORM = frozenset(
    ("beit", "cait", "deit", "eva", "vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos")
)
#: Classes of transformers, each tried with its default config.
_TRANSFORMERS = (
    "ViTForImageClassification", "DeiTForImageClassification", "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification", "SiglipVisionModel", "SiglipForImageClassification",
    "CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification", "SwinForImageClassification",
    "YolosForObjectDetection", "BeitForImageClassification", "DINOv3ViTModel", "Swinv2ForImageClassification",
    "Siglip2VisionModel", "ViTMSNForImageClassification", "CLIPModel",
)  # fmt: skip


@dataclass(frozen=True)
class Support:
    """What becomes of one architecture.

    Args:
        library, name: "timm" or "transformers", and the architecture.
        kind: class of the model.
        verdict: "integer" (all attention, every MLP), "partly", or "refused".
        attention: share of the blocks whose attention is integer; weights: share of all matrices' elements that are.
        reasons: why not more; block numbers are ``*``.
    """

    library: str
    name: str
    kind: str
    verdict: str
    attention: float
    weights: float
    reasons: tuple[str, ...]


def support(pattern: str = "*") -> Iterator[Support]:
    """Every vision transformer of timm and, where it is installed, of transformers that ``pattern`` matches."""
    modules = {name: module for module in _TIMM for name in timm.list_models(module=module)}
    for name, module in sorted(modules.items()):
        if fnmatch(name, pattern):
            yield _tried("timm", name, partial(_timm_model, name, module))
    if importlib.util.find_spec("transformers") is not None:
        import transformers

        for name in _TRANSFORMERS:
            if fnmatch(name, pattern):
                kind = getattr(transformers, name)
                yield _tried("transformers", name, lambda kind=kind: kind(kind.config_class()))


def versions() -> dict[str, str]:
    """Of the libraries that :func:`support` tries."""
    there = [name for name in ("timm", "transformers") if importlib.util.find_spec(name) is not None]
    return {name: importlib.metadata.version(name) for name in there}


def _timm_model(name: str, module: str) -> nn.Module:
    """One block deep where the architecture allows it: its blocks are alike."""
    try:
        return timm.create_model(name, **({"depth": 1} if module in _UNIFORM else {}))
    except AssertionError:  # what differs from block to block has a length of its own
        return timm.create_model(name)


def _tried(library: str, name: str, make: Callable[[], nn.Module]) -> Support:
    with torch.device("meta"):
        model = make().eval()
    kind = type(model).__name__
    try:
        family = adapter_for(model)
    except TypeError as error:
        reason = unknown(model) if library == "timm" else str(error)
        return Support(library, name, kind, "refused", 0.0, 0.0, (reason,))
    blocks = family.blocks()
    attention = len(family.attentions()) / max(1, len(blocks))
    total = sum(p.numel() for p in family.model.parameters() if p.dim() > 1)
    weights = sum(site.out_features * site.in_features for site in family.linears()) / total
    reasons = tuple(dict.fromkeys(f"{re.sub(r'[0-9]+', '*', path)} {why}" for path, why in family.refused))
    whole = attention == 1.0 and all(block.mlp is not None for block in blocks)
    return Support(library, name, kind, "integer" if whole else "partly", attention, weights, reasons)
