"""Adapters of the point-cloud models: what becomes integer, and what stays float and why."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..sites import BlockSite, LinearSite
from ..timm_family import TimmViT

_FIRST = ("encoder.first_conv.0", "pos_embed.0")
_LAST = ("cls_head_finetune.8", "convs3")


class PointMAEFamily(TimmViT):
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

    def _linears(self, *paths: str) -> Iterator[LinearSite]:
        for path in paths:
            for name, module in self.model.get_submodule(path).named_modules(prefix=path):
                if isinstance(module, nn.Linear):
                    role = "patch_embed" if name in _FIRST else "head" if name in _LAST else "other"
                    yield self._linear(name, role)
