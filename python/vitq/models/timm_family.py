"""timm's ViT, EVA, BEiT, CaiT and Swin families: the only place that knows timm's attribute names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from timm.layers import PatchEmbed, attention, attention_pool
from timm.models import beit, cait, eva
from timm.models import swin_transformer as swin
from timm.models import swin_transformer_v2 as swin2
from timm.models import vision_transformer as vit
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor, nn

from vitq.data import data_config
from vitq_kernels.nn.window import Window

from . import modules
from .block_family import LAYER_NORMS, BlockFamily, gated_mlp
from .sites import AttentionSite, BlockSite, BranchSite, LinearSite

#: Attention whose queries, keys and values meet in q·kᵀ and P·V alone.
_PLAIN = (
    vit.Attention,
    attention.AttentionRope,
    eva.EvaAttention,
    beit.Attention,
    relpos.RelPosAttention,
    swin2.WindowAttention,
)
#: Arguments of blocks whose values are constants of the image size, inside the rewritten attention.
_FOLDED = ("rope", "shared_rel_pos_bias", "shared_rel_pos")


def state_data(model: nn.Module) -> dict[str, Any]:
    """``ModelState.data`` of a timm model: input size, normalization, crop, and class names where timm knows them.

    A model of our own that takes no images says so itself, in ``vitq_data``.
    """
    if hasattr(model, "vitq_data"):
        return dict(model.vitq_data)
    config = data_config(model)
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    data = {key: config[key] for key in keys} | {"num_classes": model.num_classes}
    names = model.pretrained_cfg.get("label_names")
    if names and len(names) == model.num_classes:
        data["class_names"] = list(names)
    return data


def _attention(module: nn.Module, rope: Tensor | None = None, shared: Tensor | None = None) -> modules.Attention | None:
    """The form of a timm attention, or None where it has none (see :meth:`TimmFamily._reason`).

    Args: rope: rotations of the tokens; shared: [H, N, N] scores that all blocks add.
    """
    if _obstacle(module) is not None:
        return None
    if module.qkv is None:
        qkv = modules.fused((module.q_proj, module.k_proj, module.v_proj))
    elif getattr(module, "q_bias", None) is not None:
        qkv = modules.fused((module.qkv,), (module.q_bias, module.k_bias, module.v_bias))
    else:
        qkv = module.qkv
    cosine = getattr(module, "logit_scale", None)
    norms = {name: _present(getattr(module, name, None)) for name in ("q_norm", "k_norm")}
    stage = None
    if rope is not None or cosine is not None or any(norms.values()):
        prefix, half = getattr(module, "num_prefix_tokens", 0), getattr(module, "rotate_half", False)
        stage = modules.QueryKeyStage(
            module.num_heads, **norms, rope=rope, prefix=prefix, half=half, logit_scale=cosine
        )
    bias = _relative_position(module)
    if shared is not None:
        bias = shared if bias is None else bias + shared
    scale = 1.0 if cosine is not None else module.scale
    norm = _present(getattr(module, "norm", None))
    return modules.Attention(qkv, module.proj, module.num_heads, scale, stage=stage, bias=bias, norm=norm)


def _present(module: nn.Module | None) -> nn.Module | None:
    return None if isinstance(module, nn.Identity) else module


def _is_plain(module: nn.Module) -> bool:
    return type(module) is vit.Attention and _present(module.q_norm) is None and _present(module.k_norm) is None


def _obstacle(module: nn.Module) -> str | None:
    """Why a timm attention is no ``modules.Attention``."""
    if type(module) not in _PLAIN:
        return f"is a {type(module).__name__}, which the integer attention does not compute"
    if getattr(module, "gate", None) is not None:
        return "gates its output, which the integer attention does not"
    if getattr(module, "num_kv_groups", 1) > 1:
        return "shares keys and values among heads, which the integer attention does not"
    return None


@torch.no_grad()
def _relative_position(module: nn.Module) -> Tensor | None:
    """[H, N, N] scores of an attention's own position bias, or None."""
    if isinstance(module, swin2.WindowAttention):
        table = module.cpb_mlp(module.relative_coords_table).view(-1, module.num_heads)
        bias = table[module.relative_position_index.flatten()].view(*module.relative_position_index.shape, -1)
        return 16 * bias.permute(2, 0, 1).sigmoid()
    if getattr(module, "relative_position_bias_table", None) is not None:
        return module._get_rel_pos_bias()[0]
    if getattr(module, "rel_pos", None) is not None:
        return module.rel_pos.get_bias()[0]
    return None


def _gamma(block: nn.Module, index: int) -> nn.Parameter | None:
    scale = getattr(block, f"gamma_{index}", None)
    return getattr(getattr(block, f"ls{index}", None), "gamma", None) if scale is None else scale


@torch.no_grad()
def _constants(model: nn.Module) -> list[tuple[Tensor | None, Tensor | None]]:
    """(rotations, shared scores) of each block at the model's own image size."""
    depth = len(model.blocks)
    rope, shared, ropes = getattr(model, "rope", None), None, [None] * depth
    if rope is not None:
        sized = getattr(rope, "feat_shape", None) is not None
        embed = rope.get_embed() if sized else rope.get_embed(shape=model.patch_embed.grid_size)
        ropes = list(embed) if getattr(model, "rope_mixed", False) else [embed] * depth
    if getattr(model, "rel_pos_bias", None) is not None:
        shared = model.rel_pos_bias()
    elif getattr(model, "shared_rel_pos", None) is not None:
        shared = model.shared_rel_pos.get_bias()[0]
    return [(rope, shared) for rope in ropes]


class TimmFamily(BlockFamily):
    """What timm's models share."""

    holders = (
        *BlockFamily.holders,
        vit.Attention,
        attention.AttentionRope,
        relpos.RelPosAttention,
        swin.WindowAttention,
        attention_pool.AttentionPoolLatent,
        cait.ClassAttn,
    )

    def _patch_embed(self, path: str) -> Iterator[LinearSite]:
        embed = self.model.get_submodule(path)
        size, patch = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
        if isinstance(embed, PatchEmbed) and size and any(s % p for s, p in zip(size, patch)):
            reads, step = "x".join(map(str, size)), "x".join(map(str, patch))
            self._refuse(path, f"reads {reads} pixels, no multiple of its patches of {step}: stays float")
        elif isinstance(embed, PatchEmbed):
            yield from self._patches(f"{path}.proj")
        else:
            self._refuse(path, f"is a {type(embed).__name__}, expected a PatchEmbed: stays float")

    def input_shape(self) -> tuple[int | None, ...] | None:
        embed = getattr(self.model, "patch_embed", None)
        if not isinstance(embed, PatchEmbed):
            return None
        fixed = embed.img_size is not None and embed.strict_img_size
        return embed.proj.in_channels, *(embed.img_size if fixed else (None, None))

    def _heads(self, *paths: str) -> Iterator[LinearSite]:
        for path in paths:
            parent, _, name = path.rpartition(".")
            owner = self.model.get_submodule(parent)
            if getattr(owner, name, None) is not None and (site := self._linear(path, "head")) is not None:
                yield site

    def _reason(self, attention: nn.Module) -> str:
        return _obstacle(attention) or super()._reason(attention)

    def _tokens(self) -> dict[str, int | bool]:
        prefix = getattr(self.model, "num_prefix_tokens", 0)
        return {"prefix": prefix, "class_token": prefix > 0 and getattr(self.model, "cls_token", None) is not None}


class TimmViT(TimmFamily):
    """Models of a patch embedding, ``blocks``, pooling and a head: VisionTransformer, Eva, Beit, relative positions.

    Any pooling, class, distillation and register tokens, LayerScale, pre- and final norms; norms of queries and keys,
    rotations and relative positions of the model's own image size.
    """

    _summed = (vit.Block, eva.EvaBlock, beit.Block, relpos.RelPosBlock)
    _post_norm = (vit.ResPostBlock, eva.EvaBlockPostNorm, relpos.ResPostRelPosBlock)

    def _rewritten(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for index, (block, constants) in enumerate(zip(model.blocks, _constants(model))):
            if type(block) in (*self._summed, *self._post_norm):
                yield from self._rewritten_block(f"blocks.{index}", block, *constants)

    def _rewritten_block(
        self, path: str, block: nn.Module, rope: Tensor | None, shared: Tensor | None
    ) -> Iterator[tuple[str, nn.Module]]:
        mlp = gated_mlp(block.mlp)
        native, summed = type(block) is vit.Block, self._sums(block)
        # timm's own attention stays where a kernel computes it as it is.
        form = None if native and summed and _is_plain(block.attn) else _attention(block.attn, rope, shared)
        if form is not None and summed and not native:
            gammas = (_gamma(block, 1), _gamma(block, 2))
            inner = modules.Block(block.norm1, form, block.norm2, mlp or block.mlp, *gammas)
            yield path, modules.Shell(inner, _FOLDED)
            return
        if form is not None:
            yield f"{path}.attn", modules.Shell(form, _FOLDED)
        if mlp is not None:
            yield f"{path}.mlp", mlp

    def _sums(self, block: nn.Module) -> bool:
        """Whether the block is a sum of branches behind LayerNorms, of which a kernel takes the first along."""
        return type(block) in self._summed and type(block.norm1) in LAYER_NORMS

    def _enumerate(self) -> Iterator[LinearSite | BlockSite]:
        yield from self._patch_embed("patch_embed")
        for index, block in enumerate(self.model.blocks):
            path = f"blocks.{index}"
            if isinstance(block, modules.Shell):
                yield self._block(f"{path}.inner")
            elif type(block) in (*self._summed, *self._post_norm):
                attn = "attn.inner" if isinstance(block.attn, modules.Shell) else "attn"
                yield self._block(path, attn=attn, summed=self._sums(block))
            else:
                yield self._unknown_block(path, "pre-norm Block")
        if getattr(self.model, "attn_pool", None) is not None:
            kind = type(self.model.attn_pool).__name__
            self._refuse("attn_pool", f"is a {kind}: its attention runs in float")
            yield from self._others("attn_pool")
        yield from self._heads("head", "head_dist")

    def _attention(self, block: str, branch: BranchSite) -> AttentionSite | None:
        path = branch.module
        module = self.model.get_submodule(path)
        if type(module) is not vit.Attention or _obstacle(module) is not None:
            return super()._attention(block, branch)
        norm1, inner = self._norm(branch.norm), self._norm(f"{path}.norm")
        if norm1 is None or (inner is None and not isinstance(module.norm, nn.Identity)):
            self._refuse_attention(path, "is surrounded by norms that are no LayerNorm")
            return None
        qkv = self._linear(f"{path}.qkv", "qkv", norm1)
        proj = self._linear(f"{path}.proj", "proj", inner)
        heads, head_dim = module.num_heads, module.head_dim
        return AttentionSite(path, qkv, proj, heads, head_dim, module.scale, branch.layer_scale, **self._tokens())


class TimmCait(TimmFamily):
    """Cait: talking heads and class attention in float, every linear layer that reads tokens integer."""

    holders = (*TimmFamily.holders, cait.TalkingHeadAttn)

    def _enumerate(self) -> Iterator[LinearSite | BlockSite]:
        yield from self._patch_embed("patch_embed")
        for index in range(len(self.model.blocks)):
            yield self._block(f"blocks.{index}")
        for index in range(len(self.model.blocks_token_only)):
            path = f"blocks_token_only.{index}"
            # Called with two arguments: no unit of its own.
            self._refuse_attention(f"{path}.attn", "is a ClassAttn, whose queries are those of one token")
            yield from self._others(path)
        yield from self._heads("head")

    def _others(self, path: str, covered: Iterable[str] = ()) -> Iterator[LinearSite]:
        for site in super()._others(path, covered):
            if site.path.endswith((".proj_l", ".proj_w")):
                self._refuse(site.path, "mixes heads between q·kᵀ and P·V: stays float")
            else:
                yield site

    def _reason(self, attention: nn.Module) -> str:
        return "mixes heads before and behind the softmax (talking heads), which the integer attention does not"


class TimmSwin(TimmFamily):
    """SwinTransformer and SwinTransformerV2: shifted windows, relative position bias, patch merging.

    A block of V2 normalizes behind its branches: the float block partitions windows and sums up.
    """

    def _rewritten(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for depth, stage in enumerate(model.layers):
            for index, block in enumerate(stage.blocks):
                if isinstance(block, swin2.SwinTransformerV2Block) and (form := _attention(block.attn)) is not None:
                    yield f"layers.{depth}.blocks.{index}.attn", form

    def _enumerate(self) -> Iterator[LinearSite | BlockSite]:
        yield from self._patch_embed("patch_embed")
        for depth, stage in enumerate(self.model.layers):
            path = f"layers.{depth}.downsample"
            if isinstance(stage.downsample, swin.PatchMerging):
                yield self._linear(f"{path}.reduction", "reduction", self._norm(f"{path}.norm"))
            elif isinstance(stage.downsample, swin2.PatchMerging):
                yield self._linear(f"{path}.reduction", "reduction")
            for index, block in enumerate(stage.blocks):
                path = f"layers.{depth}.blocks.{index}"
                if type(block) is swin2.SwinTransformerV2Block:
                    yield self._block(path, summed=False)
                elif type(block) is swin.SwinTransformerBlock:
                    yield self._block(path)
                else:
                    yield self._unknown_block(path, "SwinTransformerBlock")
        yield from self._heads("head.fc")

    def attention_bias(self, site: AttentionSite) -> Tensor | None:
        module = self.model.get_submodule(site.path)
        if isinstance(module, modules.Attention):
            return super().attention_bias(site)
        return module._get_rel_pos_bias()[0].detach().float()

    def _attention(self, block: str, branch: BranchSite) -> AttentionSite | None:
        path, module = branch.module, self.model.get_submodule(block)
        attn = module.attn
        if isinstance(attn, modules.Attention):
            return super()._attention(block, branch)
        if type(attn) is not swin.WindowAttention:
            reason = f"is a {type(attn).__name__}, expected timm's WindowAttention"
        else:
            norm1 = self._norm(branch.norm)
            if norm1 is not None:
                qkv = self._linear(f"{path}.qkv", "qkv", norm1)
                proj = self._linear(f"{path}.proj", "proj")
                sizes = (module.window_size, module.shift_size, module.input_resolution)
                window = Window(*sizes, dynamic=getattr(module, "dynamic_mask", False))
                head_dim = qkv.out_features // (3 * attn.num_heads)
                table = f"{path}.relative_position_bias_table"
                return AttentionSite(path, qkv, proj, attn.num_heads, head_dim, attn.scale, None, table, window)
            reason = "has a norm in front that is no LayerNorm"
        self._refuse_attention(path, reason)
        return None


#: Classes of timm's models -> adapters.
FAMILIES = {
    vit.VisionTransformer: TimmViT,
    eva.Eva: TimmViT,
    beit.Beit: TimmViT,
    relpos.VisionTransformerRelPos: TimmViT,
    cait.Cait: TimmCait,
    swin.SwinTransformer: TimmSwin,
    swin2.SwinTransformerV2: TimmSwin,
}
