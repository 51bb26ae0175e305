"""transformers' ViT, DeiT, DINOv2, SigLIP, CLIP, Swin and YOLOS: the only place that knows its attribute names.

Layers are recognized by the names of their classes: nothing of transformers is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from timm.layers import activations as act
from timm.models import swin_transformer as swin
from torch import Tensor, nn

from . import modules
from .sites import BlockSite, LinearSite
from .timm_family import TimmSwin


@dataclass(frozen=True)
class _Names:
    """Paths within a layer."""

    norm1: str = "layer_norm1"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    proj: str = "self_attn.out_proj"
    norm2: str = "layer_norm2"
    fc1: str = "mlp.fc1"
    act: str = "mlp.activation_fn"
    fc2: str = "mlp.fc2"


_CLIP = _Names()
_DINO = _Names("norm1", "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", norm2="norm2")
_VIT = replace(_DINO, norm1="layernorm_before", norm2="layernorm_after")
_YOLOS = _Names(
    "layernorm_before",
    *(f"attention.attention.{name}" for name in ("query", "key", "value")),
    "attention.output.dense",
    "layernorm_after",
    "intermediate.dense",
    "intermediate.intermediate_act_fn",
    "output.dense",
)
#: Classes of layers -> where their parts are.
LAYERS = {
    "ViTLayer": _VIT,
    "DeiTLayer": _VIT,
    "SwinLayer": _VIT,
    "Dinov2Layer": _DINO,
    "Dinov2WithRegistersLayer": _DINO,
    "SiglipEncoderLayer": _CLIP,
    "CLIPEncoderLayer": _CLIP,
    "YolosLayer": _YOLOS,
}
_ACTIVATIONS = {"GELUActivation": act.GELU, "GELUTanh": act.GELUTanh}
# What the library itself records, whatever a layer does with the argument.
_RECORDED = ("output_hidden_states",)
# Modules that only ever call their linear layers; the first kind's results are a model's.
_HEADS = ("YolosMLPPredictionHead",)
_HOLDERS = ("ViTPooler", "DeiTPooler", "YolosPooler", "SiglipMLP")


class _Pixels(nn.Module):
    """A patch embedding whose ``weight`` the library reads the images' dtype from.

    Attributes: weight: [0], of that dtype.
    """

    def __init__(self, inner: nn.Conv2d) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("weight", torch.empty(0, dtype=inner.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class _Windows(modules.Shell):
    """Swin's layer: tokens in and out as rows, no attention weights."""

    def forward(self, x: Tensor, input_dimensions: tuple[int, int], *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        b, _, c = x.shape
        return super().forward(x.view(b, *input_dimensions, c), *args, **kwargs).flatten(1, 2), None


@cache
def _shell(layer: type[nn.Module], shell: type[modules.Shell]) -> type[modules.Shell]:
    """``shell`` as a kind of ``layer``: the library records the outputs of such modules as hidden states."""
    return type(layer.__name__, (shell, layer), {})


def is_transformers(model: nn.Module) -> bool:
    """Whether ``model`` is a PreTrainedModel."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)


class TransformersViT(TimmSwin):
    """A vision model of transformers whose layers are in ``LAYERS``, with whatever head.

    Attention weights are not there to be returned; hidden states are. Images have the size of the config.

    Raises: TypeError for a model that takes no pixels alone, or has no layer that is known.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if type(module).__name__ in LAYERS]
        if model.main_input_name != "pixel_values" or not layers:
            raise TypeError(
                f"model is {type(model).__name__}, expected a vision model of transformers with one of "
                f"{', '.join(LAYERS)} (of a model with a text tower its vision_model)"
            )
        super().__init__(model)
        if self.model is not model:
            _forget_hooks(self.model)

    def output(self, y: Any) -> Tensor:
        for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
            if (value := getattr(y, name, None)) is not None:
                return value
        return super().output(y)

    def _rewritten(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for path, module in model.named_modules():
            if path.split(".")[-2:-1] in (["embeddings"], ["patch_embeddings"]) and type(module) is nn.Conv2d:
                yield path, _Pixels(module)
            elif (names := LAYERS.get(type(module).__name__)) is None or isinstance(module, modules.Shell):
                continue
            elif type(module).__name__ != "SwinLayer":
                yield path, _shell(type(module), modules.Shell)(_block(module, names), _RECORDED)
            elif (block := _swin_block(module, names)) is not None:
                yield path, _shell(type(module), _Windows)(block, _RECORDED)

    def _enumerate(self) -> Iterator[LinearSite | BlockSite]:
        done: set[str] = set()
        for path, module in self.model.named_modules():
            kind, parent = type(module).__name__, self.model.get_submodule(path.rpartition(".")[0])
            if any(path.startswith(f"{p}.") for p in done):
                continue
            if isinstance(module, _Pixels):
                yield from self._patches(f"{path}.inner")
            elif isinstance(module, modules.Shell):
                done.add(path)
                yield self._block(f"{path}.inner")
            elif kind in LAYERS:
                done.add(path)
                self._refuse(path, "pads its grid of tokens before it shifts windows: attention runs in float")
                yield from self._others(path)
            elif kind == "SwinPatchMerging":
                done.add(path)
                yield self._linear(f"{path}.reduction", "reduction", self._norm(f"{path}.norm"))
            elif kind in _HOLDERS:
                done.add(path)
                yield from self._others(path)
            elif isinstance(module, nn.Linear):
                if is_transformers(parent) or type(self._parent(path, 2)).__name__ in _HEADS:
                    yield self._linear(path, "head")
                else:
                    self._refuse(path, f"belongs to a {type(parent).__name__}: stays float")

    def _parent(self, path: str, levels: int) -> nn.Module:
        return self.model.get_submodule(".".join(path.split(".")[:-levels]))

    def _holds(self, module: nn.Module) -> bool:
        return super()._holds(module) or type(module).__name__ in (*_HOLDERS, "SwinAttention", "SwinMLP")


def _block(layer: nn.Module, names: _Names) -> modules.Block:
    attention = layer.get_submodule(names.q.rpartition(".")[0])
    heads, scale = (_one_of(attention, *pair) for pair in (("num_attention_heads", "num_heads"), ("scaling", "scale")))
    proj = layer.get_submodule(names.proj)
    form = modules.Attention(modules.fused(_qkv(layer, names)), proj, heads, scale)
    gammas = (getattr(getattr(layer, f"layer_scale{i}", None), "lambda1", None) for i in (1, 2))
    norm1, norm2 = (layer.get_submodule(name) for name in (names.norm1, names.norm2))
    return modules.Block(norm1, form, norm2, _mlp(layer, names), *gammas)


def _one_of(module: nn.Module, *names: str) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _qkv(layer: nn.Module, names: _Names) -> tuple[nn.Linear, ...]:
    return tuple(layer.get_submodule(path) for path in (names.q, names.k, names.v))


def _mlp(layer: nn.Module, names: _Names) -> modules.Mlp:
    inner = getattr(layer, "mlp", None)
    if hasattr(inner, "gate_proj"):  # DINOv2's SwiGLU
        fc1 = modules.fused((inner.gate_proj, inner.up_proj))
        return modules.Mlp(fc1, modules.Gated(inner.act_fn), inner.down_proj)
    activation = layer.get_submodule(names.act)
    activation = _ACTIVATIONS.get(type(activation).__name__, lambda: activation)()
    return modules.Mlp(layer.get_submodule(names.fc1), activation, layer.get_submodule(names.fc2))


def _swin_block(layer: nn.Module, names: _Names) -> swin.SwinTransformerBlock | None:
    """timm's block with the layer's parts; None where the two differ: in where padding of shifted windows goes."""
    attention, size, resolution = layer.attention, layer.window_size, layer.input_resolution
    shift = 0 if min(resolution) <= size else layer.shift_size
    padded = any(length % size for length in resolution)
    if min(resolution) < size or (shift and padded):
        return None
    norm1, norm2 = (layer.get_submodule(name) for name in (names.norm1, names.norm2))
    block = swin.SwinTransformerBlock(
        norm1.weight.numel(), resolution, attention.num_attention_heads, window_size=size, shift_size=shift
    )
    if block.window_size != (size, size) or block.shift_size != (shift, shift):
        return None
    block.norm1, block.norm2, block.mlp = norm1, norm2, _mlp(layer, names)
    block.attn.qkv, block.attn.proj = modules.fused(_qkv(layer, names)), attention.o_proj
    block.attn.relative_position_bias_table = attention.relative_position_bias.relative_position_bias_table
    return block.to(norm1.weight.device)


def _forget_hooks(model: nn.Module) -> None:
    """Let the library install its recording hooks anew: those it has installed are not on the shells."""
    for module in model.modules():
        hooks = module._forward_hooks
        for key in [k for k, hook in hooks.items() if hook.__module__.startswith("transformers.")]:
            del hooks[key]
        module.__dict__.pop("_output_capturing_hooks_installed", None)
