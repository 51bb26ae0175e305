"""Where a float model comes from: a timm name, optionally with local weights, optionally as its outlier variant."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn

#: What the constructors of models raise at arguments that do not fit, and what a lack of their weights does.
REFUSALS = (TypeError, ValueError, RuntimeError, OSError, AssertionError, ArithmeticError, LookupError, AttributeError)


@dataclass(frozen=True)
class ModelSource:
    """A float model, reproducibly named.

    Args:
        name: timm architecture, such as ``vit_small_patch16_224`` (see ``timm.list_models()``).
        pretrained: load timm's weights (downloads them unless they are shipped or cached).
        weights: path of a local ``.safetensors``, ``.pth`` or ``.bin`` state dict instead.
        outlier: apply the function-preserving outlier variant (see ``vitq.models.outlier``).
        kwargs: further arguments of ``timm.create_model``, such as ``img_size`` or ``num_classes``.
        seed: initial weights where there are no others.
    """

    name: str
    pretrained: bool = True
    weights: str | None = None
    outlier: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def record(self) -> dict[str, Any]:
        """The source as plain JSON values."""
        return json.loads(json.dumps(asdict(self)))


def check_arguments(kwargs: dict[str, Any]) -> None:
    """Raises ValueError for arguments of ``timm.create_model`` that name a file: older timms unpickle it."""
    if "checkpoint_path" in kwargs:
        path = str(kwargs["checkpoint_path"])[:200]
        raise ValueError(f"model arguments have checkpoint_path={path!r}, expected weights=<file> (--weights) instead")


def load_float(source: ModelSource) -> nn.Module:
    """The float model of ``source`` in eval mode.

    Raises: ValueError for a name that timm does not know (with near matches), arguments that the architecture refuses,
            weights that cannot be had or do not fit; the message names the file or the reason.
    """
    from . import models

    if not timm.is_model(source.name):
        near = timm.list_models(f"*{source.name.split('_')[0]}*")[:4]
        hint = f"; known ones include {', '.join(near)}" if near else ""
        raise ValueError(f"model is {source.name!r}, expected an architecture of timm{hint}")
    check_arguments(source.kwargs)
    local = source.weights is not None
    torch.manual_seed(source.seed)
    pretrained = source.pretrained and not local
    try:
        model = timm.create_model(source.name, pretrained=pretrained, **source.kwargs)
    except REFUSALS as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        if not (pretrained and isinstance(error, OSError | RuntimeError)):
            raise ValueError(f"model arguments {source.kwargs} do not fit {source.name}: {reason}") from error
        raise ValueError(
            f"the pretrained weights of {source.name} cannot be had ({reason}); "
            "give weights=<file> or pretrained=False (--weights, --random-weights)"
        ) from error
    if local:
        _load_weights(model, Path(source.weights))
    model.eval()
    return models.outlier_variant(model) if source.outlier else model


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"weights is '{path}', expected a file")
    try:
        # Never unpickle code: weights_only admits tensors alone.
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"holds a {type(state).__name__}, expected a state dict")
        for wrapper in ("state_dict", "model", "base_model", "model_state_dict"):
            if isinstance(state.get(wrapper), dict):
                state = state[wrapper]
        model.load_state_dict(state)
    except Exception as error:  # what a damaged file makes torch.load raise is of any kind
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"weights '{path}' do not fit the model: {reason}") from error
