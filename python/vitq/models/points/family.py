"""Adapters of the point-cloud models: what becomes integer, and what stays float and why."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..sites import BlockSite, LinearSite
from ..timm_family import TimmViT
from .point_transformer import TransitionDown, VectorAttention

# What reads coordinates and what writes logits: the first and the last layers.
_FIRST = ("encoder.first_conv.0", "pos_embed.0", "enc1.0.linear")
_LAST = ("cls_head_finetune.8", "convs3", "cls.3")


class PointFamily(TimmViT):
    """What the point-cloud models share: linear layers of modules that merely call them."""

    def _rewritten(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        yield from ()

    def input_shape(self) -> tuple[int | None, ...]:
        return None, self.model.vitq_data["input_size"][-1]

    def _linears(self, *paths: str) -> Iterator[LinearSite]:
        for path in paths:
            for name, module in self.model.get_submodule(path).named_modules(prefix=path):
                if isinstance(module, nn.Linear):
                    first = name in _FIRST or name.endswith("linear_p.0")
                    yield self._linear(name, "patch_embed" if first else "head" if name in _LAST else "other")


class PointMAEFamily(PointFamily):
    """Point-MAE: blocks as a ViT's, attention in integers; every other linear layer by itself.

    First layers (boundary bits) are the two that read coordinates, last the one that writes logits.
    """

    def _enumerate(self) -> Iterator[LinearSite | BlockSite]:
        self._refuse("group_divider", "farthest-point sampling and neighbours are computed in float")
        self._refuse("encoder", "its linear layers are integer; BatchNorm, ReLU and the groups' maxima are float")
        self._refuse("pos_embed", "its linear layers are integer; the GELU between them is float")
        yield from self._linears("encoder", "pos_embed")
        for index in range(len(self.model.blocks.blocks)):
            yield self._block(f"blocks.blocks.{index}")
        heads = [name for name, _ in self.model.named_children() if name not in ("encoder", "pos_embed", "blocks")]
        yield from self._linears(*heads)


class PointTransformerFamily(PointFamily):
    """Point Transformer: every linear layer in integers, the arithmetic of vector attention between them in float.

    First layers (boundary bits) are those that read coordinates alone, last the one that writes logits. Its blocks take
    points beside features, so methods that learn block by block leave them to the closed forms.
    """

    def _enumerate(self) -> Iterator[LinearSite | BlockSite]:
        for name, module in self.model.named_modules():
            if isinstance(module, VectorAttention):
                self._refuse(name, "its linear layers are integer; differences, softmax and the weighted sum are float")
            elif isinstance(module, TransitionDown) and module.stride != 1:
                self._refuse(name, "its linear layer is integer; sampling, neighbours and their maximum are float")
        yield from self._linears(*(name for name, _ in self.model.named_children()))
