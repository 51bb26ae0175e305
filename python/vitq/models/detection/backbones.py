"""Feature pyramids of timm's Swin and ViT."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import timm
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool


class Backbone(nn.Module):
    """Feature maps of an image at several strides.

    Attributes:
        body: timm model; fpn: what makes the maps of its features; out_channels: of every map.
        divisor: what height and width of a batch of images are padded to a multiple of.
    """

    divisor = 32

    def __init__(self, body: nn.Module, fpn: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.body, self.fpn, self.out_channels = body, fpn, out_channels


class SwinFeatures(Backbone):
    """All stages of Swin, a LayerNorm behind each (as Swin's own detectors have it), through a feature pyramid network.

    Args: image_size: (H, W) that windows are laid out for; others build theirs per call. extra: a coarser map by
          pooling, for anchors. batch_norm: behind the pyramid's convolutions. body: arguments of the timm model.
    """

    def __init__(
        self, name: str, image_size: tuple[int, int], out_channels: int, extra: bool, batch_norm: bool, **body
    ) -> None:
        swin = timm.create_model(name, img_size=image_size, num_classes=0, strict_img_size=False, **body)
        channels = [info["num_chs"] for info in swin.feature_info]
        # Of its own, which reads the last stage only.
        swin.norm = nn.Identity()
        pool = LastLevelMaxPool() if extra else None
        norm = nn.BatchNorm2d if batch_norm else None
        super().__init__(swin, FeaturePyramidNetwork(channels, out_channels, pool, norm), out_channels)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] to maps [B, out_channels, H/4, W/4] and coarser ones."""
        x = self.body.patch_embed(x)
        maps = OrderedDict()
        for index, (stage, norm) in enumerate(zip(self.body.layers, self.norms)):
            x = stage(x)
            maps[str(index)] = norm(x).permute(0, 3, 1, 2)
        return self.fpn(maps)


class ViTFeatures(Backbone):
    """The last map of a ViT through a simple feature pyramid: strides p/4, p/2, p and 2p of patches of p.

    All blocks attend globally; positions are interpolated to an image's size; the pyramid has LayerNorms of its own.

    Source: ViTDet (arXiv 2203.16527), without its window attention.
    """

    def __init__(
        self, name: str, image_size: tuple[int, int], out_channels: int, extra: bool, batch_norm: bool, **body
    ) -> None:
        if batch_norm:
            raise ValueError("batch_norm is True, expected False: a ViT's pyramid has LayerNorms")
        vit = timm.create_model(name, img_size=image_size, num_classes=0, dynamic_img_size=True, **body)
        super().__init__(vit, SimplePyramid(vit.embed_dim, out_channels, extra), out_channels)
        self.divisor = 2 * max(vit.patch_embed.patch_size)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] to maps [B, out_channels, 4H/p, 4W/p] and coarser ones."""
        vit = self.body
        tokens = vit.patch_embed(x)
        grid = tokens.shape[1:3]
        tokens = vit.norm(vit.blocks(vit.norm_pre(vit._pos_embed(tokens))))[:, vit.num_prefix_tokens :]
        return self.fpn(tokens.transpose(1, 2).unflatten(2, grid))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimplePyramid(nn.Module):
    """Four maps of one, each by itself (ViTDet's simple feature pyramid)."""

    def __init__(self, width: int, out_channels: int, extra: bool) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        finer = [nn.ConvTranspose2d(width, half, 2, 2), ChannelNorm(half), nn.GELU()]
        scales = (
            ([*finer, nn.ConvTranspose2d(half, quarter, 2, 2)], quarter),
            ([nn.ConvTranspose2d(width, half, 2, 2)], half),
            ([], width),
            ([nn.MaxPool2d(2)], width),
        )
        self.levels = nn.ModuleList(nn.Sequential(*layers, *_refined(c, out_channels)) for layers, c in scales)
        self.extra = LastLevelMaxPool() if extra else None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = [level(x) for level in self.levels]
        names = [str(i) for i in range(len(maps))]
        if self.extra is not None:
            maps, names = self.extra(maps, maps, names)
        return OrderedDict(zip(names, maps))


def _refined(channels: int, out: int) -> Iterable[nn.Module]:
    yield from (nn.Conv2d(channels, out, 1, bias=False), ChannelNorm(out))
    yield from (nn.Conv2d(out, out, 3, padding=1, bias=False), ChannelNorm(out))
