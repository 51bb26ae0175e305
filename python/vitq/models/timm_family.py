"""timm's ViT (DeiT, distilled DeiT, DeiT-III) and Swin: the only place that knows timm's attribute names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from timm.layers import DropPath, PatchDropout, PatchEmbed, attention_pool, mlp, norm
from timm.layers import activations as act
from timm.models import swin_transformer as swin
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from vitq.data import data_config
from vitq_kernels.nn.window import Window

from .sites import AttentionSite, BlockSite, BranchSite, Family, LinearSite, MlpSite, NormSite, Role

_LAYER_NORMS = (nn.LayerNorm, norm.LayerNorm, norm.LayerNormFp32)
_FUSED = {act.GELU: "gelu_erf", act.GELUTanh: "gelu_tanh"}
#: Adapters of models that are not timm's, by the model's class.
ADAPTERS: dict[type[nn.Module], type[Family]] = {}
# Modules that only ever *call* their linear layers, so that these can be swapped one by one.
_HOLDERS = (vit.Attention, swin.WindowAttention, attention_pool.AttentionPoolLatent, mlp.Mlp, mlp.GluMlp, mlp.SwiGLU)


def adapter_for(model: nn.Module) -> Family:
    """The adapter of ``model``'s family.

    Raises: TypeError for a model of no known family.
    """
    if isinstance(model, vit.VisionTransformer):
        return TimmViT(model)
    if isinstance(model, swin.SwinTransformer):
        return TimmSwin(model)
    for kind, family in ADAPTERS.items():
        if isinstance(model, kind):
            return family(model)
    known = "".join(f", {kind.__name__}" for kind in ADAPTERS)
    raise TypeError(
        f"model is {type(model).__name__}, expected a timm VisionTransformer (DeiT too) or SwinTransformer{known}"
    )


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


class _TimmFamily(Family):
    training_only = (nn.Dropout, DropPath, PatchDropout)

    def attention_bias(self, site: AttentionSite) -> Tensor | None:
        if site.bias_table is None:
            return None
        return self.model.get_submodule(site.path)._get_rel_pos_bias()[0].detach().float()

    def _refuse(self, path: str, reason: str) -> None:
        self.refused.append((path, reason))

    def _linear(self, path: str, role: Role, norm: NormSite | None = None) -> LinearSite | None:
        module = self.model.get_submodule(path)
        if isinstance(module, nn.Identity):
            return None
        if type(module) is not nn.Linear:
            self._refuse(path, f"is a {type(module).__name__}, expected a Linear")
            return None
        return LinearSite(path, role, module.out_features, module.in_features, module.bias is not None, norm)

    def _norm(self, path: str) -> NormSite | None:
        module = self.model.get_submodule(path)
        if isinstance(module, nn.Identity):
            return None
        if type(module) not in _LAYER_NORMS or len(module.normalized_shape) != 1:
            self._refuse(path, f"is a {type(module).__name__}, no LayerNorm: stays a float module")
            return None
        names = [f"{path}.{p}" if getattr(module, p) is not None else None for p in ("weight", "bias")]
        return NormSite(path, module.normalized_shape[0], module.eps, *names)

    def _patch_embed(self, path: str) -> Iterator[LinearSite]:
        embed = self.model.get_submodule(path)
        if not isinstance(embed, PatchEmbed):
            self._refuse(path, f"is a {type(embed).__name__}, expected a PatchEmbed: stays float")
            return
        conv = embed.proj
        plain = conv.stride == conv.kernel_size and conv.padding == (0, 0) and conv.dilation == (1, 1)
        if type(conv) is not nn.Conv2d or not plain or conv.groups != 1:
            self._refuse(f"{path}.proj", f"is {conv}, expected a Conv2d of patches that do not overlap: stays float")
            return
        k = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
        bias = conv.bias is not None
        yield LinearSite(f"{path}.proj", "patch_embed", conv.out_channels, k, bias, None, tuple(conv.kernel_size))

    def _others(self, path: str, covered: set[str]) -> Iterator[LinearSite]:
        """Linear layers below ``path`` outside ``covered``, of modules that merely call them."""
        for name, module in self.model.get_submodule(path).named_modules(prefix=path):
            for child, linear in module.named_children():
                where = f"{name}.{child}"
                if not isinstance(linear, nn.Linear) or where in covered:
                    continue
                if type(module) in _HOLDERS and type(linear) is nn.Linear:
                    yield self._linear(where, "other")
                else:
                    self._refuse(
                        where, f"belongs to a {type(module).__name__}, whose use of it is not known: stays float"
                    )

    def _layer_scale(self, path: str) -> str | None:
        """γ's name if there is a LayerScale at ``path`` (Swin's blocks have none)."""
        block, _, name = path.rpartition(".")
        return (
            f"{path}.gamma"
            if isinstance(getattr(self.model.get_submodule(block), name, None), vit.LayerScale)
            else None
        )

    def _mlp(self, branch: BranchSite) -> MlpSite | None:
        path = branch.module
        module = self.model.get_submodule(path)
        if type(module) is not mlp.Mlp or type(module.fc1) is not nn.Linear:
            self._refuse(path, f"is a {type(module).__name__}, expected an Mlp: its layers are not fused")
            return None
        inner = self._norm(f"{path}.norm")
        if inner is None and not isinstance(module.norm, nn.Identity):
            return None
        fc1 = self._linear(f"{path}.fc1", "fc1", self._norm(branch.norm))
        fc2 = self._linear(f"{path}.fc2", "fc2", inner)
        kind = type(module.act)
        name = _FUSED.get(kind, "module")
        if kind is nn.GELU:
            name = "gelu_tanh" if module.act.approximate == "tanh" else "gelu_erf"
        if name == "module":
            self._refuse(f"{path}.act", f"is a {kind.__name__}, no GELU: runs in float between fc1 and fc2")
        return MlpSite(path, fc1, fc2, name, f"{path}.act", branch.layer_scale)

    def _block(self, path: str) -> BlockSite:
        """The block at ``path``: attention first, both branches behind a norm."""
        branches = (
            BranchSite(f"{path}.norm1", f"{path}.attn", self._layer_scale(f"{path}.ls1")),
            BranchSite(f"{path}.norm2", f"{path}.mlp", self._layer_scale(f"{path}.ls2")),
        )
        attention, mlp = self._attention(path, branches[0]), self._mlp(branches[1])
        front = () if attention is None else (attention.qkv, attention.proj)
        back = () if mlp is None else (mlp.fc1, mlp.fc2)
        others = tuple(self._others(path, {site.path for site in front + back}))
        front += tuple(site for site in others if site.path.startswith(f"{branches[0].module}."))
        back += tuple(site for site in others if site not in front)
        return BlockSite(path, attention, mlp, front + back, branches)

    def _unknown_block(self, path: str, expected: str) -> BlockSite:
        kind = type(self.model.get_submodule(path)).__name__
        self._refuse(path, f"is a {kind}, expected a {expected}: its layers are not fused")
        return BlockSite(path, None, None, tuple(self._others(path, set())))

    @abstractmethod
    def _attention(self, block: str, branch: BranchSite) -> AttentionSite | None:
        """The attention of a known block, or None with a reason in ``refused``."""


class TimmViT(_TimmFamily):
    """VisionTransformer: any pooling, class, distillation and register tokens, LayerScale, pre- and final norms."""

    def _enumerate(self) -> Iterator[LinearSite | BlockSite]:
        yield from self._patch_embed("patch_embed")
        for index, block in enumerate(self.model.blocks):
            path = f"blocks.{index}"
            known = type(block) is vit.Block
            yield self._block(path) if known else self._unknown_block(path, "pre-norm Block")
        if self.model.attn_pool is not None:
            kind = type(self.model.attn_pool).__name__
            self._refuse("attn_pool", f"is a {kind}: its attention runs in float")
            yield from self._others("attn_pool", set())
        for head in ("head", "head_dist"):
            if hasattr(self.model, head) and (site := self._linear(head, "head")):
                yield site

    def _attention(self, block: str, branch: BranchSite) -> AttentionSite | None:
        path = branch.module
        module = self.model.get_submodule(path)
        if type(module) is not vit.Attention:
            reason = f"is a {type(module).__name__}, expected timm's Attention"
        elif not isinstance(module.q_norm, nn.Identity) or not isinstance(module.k_norm, nn.Identity):
            reason = "normalizes queries and keys, which the integer attention does not"
        elif getattr(module, "gate", None) is not None:
            reason = "gates its output, which the integer attention does not"
        else:
            norm1, inner = self._norm(branch.norm), self._norm(f"{path}.norm")
            plain = inner is not None or isinstance(module.norm, nn.Identity)
            if norm1 is not None and plain:
                qkv = self._linear(f"{path}.qkv", "qkv", norm1)
                proj = self._linear(f"{path}.proj", "proj", inner)
                heads, head_dim = module.num_heads, module.head_dim
                tokens = {"prefix": self.model.num_prefix_tokens, "class_token": self.model.has_class_token}
                return AttentionSite(path, qkv, proj, heads, head_dim, module.scale, branch.layer_scale, **tokens)
            reason = "is surrounded by norms that are no LayerNorm"
        self._refuse(path, f"{reason}: it runs in float, its linear layers can be integer")
        return None


class TimmSwin(_TimmFamily):
    """SwinTransformer: shifted windows, relative position bias, patch merging."""

    def _enumerate(self) -> Iterator[LinearSite | BlockSite]:
        yield from self._patch_embed("patch_embed")
        for depth, stage in enumerate(self.model.layers):
            if isinstance(stage.downsample, swin.PatchMerging):
                path = f"layers.{depth}.downsample"
                yield self._linear(f"{path}.reduction", "reduction", self._norm(f"{path}.norm"))
            for index, block in enumerate(stage.blocks):
                path = f"layers.{depth}.blocks.{index}"
                known = type(block) is swin.SwinTransformerBlock
                yield self._block(path) if known else self._unknown_block(path, "SwinTransformerBlock")
        if (site := self._linear("head.fc", "head")) is not None:
            yield site

    def _attention(self, block: str, branch: BranchSite) -> AttentionSite | None:
        path, module = branch.module, self.model.get_submodule(block)
        attn = module.attn
        if type(attn) is not swin.WindowAttention:
            reason = f"is a {type(attn).__name__}, expected timm's WindowAttention"
        elif getattr(module, "dynamic_mask", False):
            reason = "builds its windows for each input size (strict_img_size=False)"
        else:
            norm1 = self._norm(branch.norm)
            if norm1 is not None:
                qkv = self._linear(f"{path}.qkv", "qkv", norm1)
                proj = self._linear(f"{path}.proj", "proj")
                window = Window(module.window_size, module.shift_size, module.input_resolution)
                head_dim = qkv.out_features // (3 * attn.num_heads)
                table = f"{path}.relative_position_bias_table"
                return AttentionSite(path, qkv, proj, attn.num_heads, head_dim, attn.scale, None, table, window)
            reason = "has a norm in front that is no LayerNorm"
        self._refuse(path, f"{reason}: it runs in float, its linear layers can be integer")
        return None
