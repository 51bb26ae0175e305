"""Plain transformers on point clouds in the arrangement of Point-MAE, and the key names of its checkpoints.

Source: Point-MAE (arXiv 2203.06604). Arrangement and key names are those of its published models, read in
github.com/Pang-Yatian/Point-MAE: ``PointTransformer`` of models/Point_MAE.py (classification) and ``get_model`` of
segmentation/models/pt.py (part segmentation); its ``Conv1d`` of one tap are linear layers here.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .sampling import check_categories, check_clouds, farthest_points, interpolate, nearest, take

# Of a pretraining checkpoint: what only rebuilds masked points.
_PRETRAINING = ("MAE_decoder.", "decoder_pos_embed.", "increase_dim.", "mask_token")
_PREFIXES = ("module.", "base_model.", "MAE_encoder.")


class RowNorm(nn.BatchNorm1d):
    """BatchNorm of the last dimension, [..., C] to the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class Group(nn.Module):
    """A cloud as overlapping groups: centres by farthest-point sampling, each with its nearest points."""

    def __init__(self, groups: int, size: int) -> None:
        super().__init__()
        self.groups, self.size = groups, size

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, 3 + F] to groups [B, G, n, 3 + F], coordinates relative to the centre, and centres [B, G, 3]."""
        points = x[..., :3]
        centres = take(points, farthest_points(points, self.groups))
        members = take(x, nearest(centres, points, self.size)[1])
        offset = torch.nn.functional.pad(centres, (0, x.shape[-1] - 3))
        return members - offset.unsqueeze(2), centres


class MiniPointNet(nn.Module):
    """A token per group: two shared MLPs, each followed by the maximum over the group's points."""

    def __init__(self, in_channels: int, width: int, out: int) -> None:
        super().__init__()
        self.first_conv = _mlp(in_channels, width, 2 * width)
        self.second_conv = _mlp(4 * width, 4 * width, out)

    def forward(self, groups: Tensor) -> Tensor:
        """[B, G, n, C] to [B, G, out]."""
        x = self.first_conv(groups)
        x = torch.cat([x.amax(2, keepdim=True).expand_as(x), x], -1)
        return self.second_conv(x).amax(2)


class Blocks(nn.Module):
    """Transformer blocks, each of which reads the residual stream with the positions added once more."""

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, drop_path=drop_path * i / max(1, depth - 1), norm_layer=nn.LayerNorm)
            for i in range(depth)
        )

    def forward(self, x: Tensor, positions: Tensor) -> list[Tensor]:
        """[B, T, C] twice to the residual stream behind every block."""
        out = []
        for block in self.blocks:
            x = block(x + positions)
            out.append(x)
        return out


class PointMAE(nn.Module):
    """What classification and part segmentation share. A cloud is [B, N, C], its coordinates in the unit sphere first.

    Args:
        num_classes: classes, or parts of all categories together.
        in_channels: 3, or 6 with normals, which enter the tokens only. num_points: of a cloud as it is evaluated; any
            number from ``num_group`` and ``group_size`` up runs.
        num_group, group_size: tokens of a cloud, points of a token.
        trans_dim, depth, num_heads, mlp_ratio, drop_path_rate: of the transformer.
        encoder_width: of the token's MLP (w, 2w, 4w, 4w, trans_dim).
        class_names: of the classes or parts, for checkpoints and tables.

    Attributes:
        vitq_data: ``ModelState.data`` of the model.
    """

    num_prefix_tokens = 0
    has_class_token = False

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        num_points: int = 1024,
        num_group: int = 64,
        group_size: int = 32,
        trans_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        encoder_width: int = 128,
        drop_path_rate: float = 0.0,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_channels, self.width = num_classes, in_channels, trans_dim
        self.least = max(num_group, group_size)
        self.vitq_data = cloud_data(num_classes, num_points, in_channels, class_names)
        self.group_divider = Group(num_group, group_size)
        self.encoder = MiniPointNet(in_channels, encoder_width, trans_dim)
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, trans_dim))
        self.blocks = Blocks(trans_dim, depth, num_heads, mlp_ratio, drop_path_rate)
        self.norm = nn.LayerNorm(trans_dim)
        self.register_load_state_dict_pre_hook(_rename)

    def init_weights(self) -> None:
        """Truncated normals of std 0.02 and zero biases, as Point-MAE's, besides the convolutions' own scale."""
        for module in (self.pos_embed, self.blocks):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=0.02)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)


class PointMAEClassifier(PointMAE):
    """Logits [B, num_classes] of clouds [B, N, in_channels]: the class token and the maximum over all others.

    Args: head_width: of the two hidden layers of the head; rest: see :class:`PointMAE`.
    """

    num_prefix_tokens = 1
    has_class_token = True

    def __init__(self, num_classes: int = 40, head_width: int = 256, **rest: Any) -> None:
        super().__init__(num_classes, **rest)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, self.width))
        self.cls_head_finetune = nn.Sequential(
            *(nn.Linear(2 * self.width, head_width), RowNorm(head_width), nn.ReLU(), nn.Dropout(0.5)),
            *(nn.Linear(head_width, head_width), RowNorm(head_width), nn.ReLU(), nn.Dropout(0.5)),
            nn.Linear(head_width, num_classes),
        )
        self.init_weights()
        for token in (self.cls_token, self.cls_pos):
            nn.init.trunc_normal_(token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        check_clouds(x, self.in_channels, self.least)
        groups, centres = self.group_divider(x)
        b = x.shape[0]
        tokens = torch.cat([self.cls_token.expand(b, -1, -1), self.encoder(groups)], 1)
        positions = torch.cat([self.cls_pos.expand(b, -1, -1), self.pos_embed(centres)], 1)
        y = self.norm(self.blocks(tokens, positions)[-1])
        return self.cls_head_finetune(torch.cat([y[:, 0], y[:, 1:].amax(1)], -1))


class PointMAEPartSegmenter(PointMAE):
    """Logits [B, N, num_classes] of points [B, N, in_channels + 1] whose last channel holds their cloud's category.

    The category, 0..categories−1 and the same for all points of a cloud, is a channel because calibration, export and
    data loaders hand one tensor around. Logits are of all parts of all categories; the published model ends in their
    log-softmax, which changes no decision.

    Args:
        categories: of objects. propagation: widths of the feature propagation's two layers, default 4·trans_dim and
            1024; the head behind it has 1/2 and 1/4 of the last one.
        rest: see :class:`PointMAE`.
    """

    def __init__(
        self,
        num_classes: int = 50,
        categories: int = 16,
        propagation: tuple[int, int] | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(num_classes, **rest)
        if categories < 1:
            raise ValueError(f"categories is {categories}, expected at least 1")
        depth, wide = len(self.blocks.blocks), 3 * self.width
        if depth % 3:
            raise ValueError(f"depth is {depth}, expected a multiple of 3: the head reads three of the blocks")
        self.categories = categories
        self.read = (depth // 3 - 1, 2 * depth // 3 - 1, depth - 1)
        self.vitq_data["input_size"] = (self.vitq_data["input_size"][0], self.in_channels + 1)
        widths = [wide + 3, *(propagation or (4 * self.width, 1024))]
        last = widths[-1]
        self.label_conv = nn.Sequential(nn.Linear(categories, 64, bias=False), RowNorm(64), nn.LeakyReLU(0.2))
        self.propagation_0 = Propagation(widths)
        self.convs1 = nn.Linear(last + 2 * wide + 64, last // 2)
        self.dp1 = nn.Dropout(0.5)
        self.convs2 = nn.Linear(last // 2, last // 4)
        self.convs3 = nn.Linear(last // 4, num_classes)
        self.bns1, self.bns2 = RowNorm(last // 2), RowNorm(last // 4)
        self.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """Raises: ValueError: a shape that does not fit, values that are not finite, a category that is none."""
        check_clouds(x, self.in_channels + 1, self.least)
        x, category = x[..., :-1], check_categories(x[:, 0, -1], self.categories)
        points, n = x[..., :3], x.shape[1]
        groups, centres = self.group_divider(x)
        seen = self.blocks(self.encoder(groups), self.pos_embed(centres))
        features = torch.cat([self.norm(seen[i]) for i in self.read], -1)
        one_hot = torch.nn.functional.one_hot(category, self.categories).to(x.dtype)
        cloud = torch.cat([features.amax(1), features.mean(1), self.label_conv(one_hot)], -1)
        local = self.propagation_0(points, centres, features)
        y = torch.cat([local, cloud.unsqueeze(1).expand(-1, n, -1)], -1)
        y = self.dp1(torch.relu(self.bns1(self.convs1(y))))
        y = torch.relu(self.bns2(self.convs2(y)))
        return self.convs3(y)


class Propagation(nn.Module):
    """Features of the centres at every point, beside its coordinates, through a shared MLP of ``widths``."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.mlp_convs = nn.ModuleList(nn.Linear(k, n) for k, n in pairwise(widths))
        self.mlp_bns = nn.ModuleList(RowNorm(n) for n in widths[1:])

    def forward(self, points: Tensor, centres: Tensor, features: Tensor) -> Tensor:
        """[B, N, 3], [B, G, 3] and [B, G, F] to [B, N, widths[-1]]."""
        x = torch.cat([points, interpolate(points, centres, features)], -1)
        for layer, norm in zip(self.mlp_convs, self.mlp_bns):
            x = torch.relu(norm(layer(x)))
        return x


def cloud_data(classes: int, points: int, channels: int, class_names: list[str] | None) -> dict[str, Any]:
    """``ModelState.data`` of a point-cloud model. Raises: ValueError for arguments that do not fit each other."""
    if channels < 3:
        raise ValueError(f"in_channels is {channels}, expected at least 3")
    if class_names is not None and len(class_names) != classes:
        raise ValueError(f"class_names has {len(class_names)}, expected num_classes, {classes}")
    names = {} if class_names is None else {"class_names": list(class_names)}
    data = {"input_size": (points, channels), "mean": (), "std": (), "interpolation": "none"}
    return {**data, "num_classes": classes, **names}


def _mlp(k: int, hidden: int, n: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(k, hidden), RowNorm(hidden), nn.ReLU(), nn.Linear(hidden, n))


def _rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A public checkpoint's names and shapes as ours: wrappers' prefixes, taps of convolutions, the decoder."""
    wanted = module.state_dict()
    for key in [key for key in state if key.startswith(prefix)]:
        name, value = key.removeprefix(prefix), state.pop(key)
        for wrapper in _PREFIXES:
            name = name.removeprefix(wrapper)
        if name in wanted and value.dim() == wanted[name].dim() + 1 and value.shape[-1] == 1:
            value = value.squeeze(-1)
        if not name.startswith(_PRETRAINING):
            state[prefix + name] = value
