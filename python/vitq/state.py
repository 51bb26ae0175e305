"""What calibration hands over: every number of a quantized model, and nothing about how it runs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from vitq_kernels.formats import AttentionState, LinearState

SiteState = LinearState | AttentionState


@dataclass(frozen=True)
class ModelState:
    """A quantized model: the states of its integer sites and the float tensors of everything else.

    Args:
        architecture: timm model name.
        sites: module path in the float model -> LinearState (``blocks.0.mlp.fc1``, ``patch_embed.proj``, ``head``)
            or AttentionState (``blocks.0.attn``, with qkv and proj inside it). A site without a state stays float.
        floats: state-dict name -> float32 tensor, for exactly the parameters that no site consumes: norms (rescaled
            where calibration folded something into them), embeddings, tokens, LayerScale, float layers
            (see ``Family.float_tensors``).
        kwargs: arguments of ``timm.create_model`` besides the name, plain JSON values.
        data: what images must look like: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``,
            ``num_classes``, and ``class_names`` where known.
        recipe: the recipe that produced the state, plain JSON values.
        source: where the float model came from (see ``vitq.sources.ModelSource``), plain JSON values.
        metrics: figures worth keeping with the model (accuracy, SQNR, calibration seconds), plain JSON values.
    """

    architecture: str
    sites: dict[str, SiteState]
    floats: dict[str, Tensor]
    kwargs: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path, state in self.sites.items():
            if not isinstance(state, LinearState | AttentionState):
                raise TypeError(f"sites[{path!r}] is {type(state).__name__}, expected LinearState or AttentionState")
        for name, tensor in self.floats.items():
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32:
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"floats[{name!r}] is {kind}, expected a float32 tensor")

    def linears(self) -> dict[str, LinearState]:
        """Every linear layer's state by module path, those inside attention too, in the order of ``sites``."""
        out: dict[str, LinearState] = {}
        for path, state in self.sites.items():
            if isinstance(state, AttentionState):
                out[f"{path}.qkv"], out[f"{path}.proj"] = state.qkv, state.proj
            else:
                out[path] = state
        return out

    def to(self, device: torch.device | str) -> ModelState:
        """The state with every tensor on ``device``."""
        sites = {path: _moved(state, device) for path, state in self.sites.items()}
        return replace(self, sites=sites, floats={name: t.to(device) for name, t in self.floats.items()})


def _moved(state: SiteState, device: torch.device | str) -> SiteState:
    values = {f.name: getattr(state, f.name) for f in fields(state)}
    nested = {k: _moved(v, device) for k, v in values.items() if isinstance(v, LinearState)}
    return replace(state, **{k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}, **nested)
