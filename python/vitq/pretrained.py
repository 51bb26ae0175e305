"""Quantized models of transformers as its own: ``save_pretrained`` and, once this is imported, ``from_pretrained``.

A folder holds the library's ``config.json``, whose ``quantization_config`` says what every site is, and
``model.safetensors`` with weights at their true width, as vitq's own checkpoints have them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import CheckpointError, Sites, assemble, disassemble
from .convert import to_integer
from .state import ModelState

METHOD, VERSION = "vitq", 1


class _Fields(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    quant_method: Literal["vitq"] = METHOD
    version: Literal[1] = VERSION
    sites: Sites
    recipe: dict[str, Any] = {}
    metrics: dict[str, Any] = {}


@register_quantization_config(METHOD)
class VitqConfig(QuantizationConfigMixin):
    """``quantization_config`` of a quantized model.

    Args:   fields: ``sites`` (path -> LinearConfig or AttentionConfig), ``recipe``, ``metrics``.
    Raises: CheckpointError for fields of another form.
    """

    def __init__(self, **fields: Any) -> None:
        try:
            self.fields = _Fields.model_validate(fields)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"quantization_config: {where}: {first['msg']}") from error
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        return self.fields.model_dump(mode="json")


@register_quantizer(METHOD)
class VitqQuantizer(HfQuantizer):
    """Reads and writes quantized models in the library's loader and saver.

    Attributes: tensors: what ``model.safetensors`` holds, by name.
    """

    requires_calibration = True

    def __init__(self, quantization_config: VitqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.tensors: dict[str, Tensor] = {}
        self.file, self.dtype = Path(), None

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        if device_map is not None:
            raise ValueError(f"device_map is {device_map!r}, expected None: move the loaded model with .to(device)")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        files = [Path(file) for file in kwargs["checkpoint_files"]]
        for file in files:
            try:
                self.tensors |= load_file(file)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: is no safetensors file: {error}") from error
        self.file = files[0]
        # Nothing is left to load or to initialize: the integer modules come from the tensors.
        for parts in (model._modules, model._parameters, model._buffers):
            parts.clear()
        model._keys_to_ignore_on_load_unexpected, model._is_hf_initialized = {""}, True

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        fields = self.quantization_config.fields
        sites, floats = assemble(self.file, dict(self.tensors), fields.sites)
        with torch.random.fork_rng(devices=[]):
            skeleton = type(model)(copy.deepcopy(model.config)).eval()
        try:
            integer = to_integer(skeleton, ModelState(type(model).__name__, sites, floats))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self.file}: does not fit {type(model).__name__}: {error}") from error
        integer.to(self.dtype)
        _take_over(model, integer, self)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        return dict(self.tensors), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _take_over(model: nn.Module, integer: nn.Module, quantizer: VitqQuantizer) -> None:
    """Give ``model`` the modules of ``integer``, and its saver what to write."""
    for name in ("_modules", "_parameters", "_buffers"):
        setattr(model, name, getattr(integer, name))
    model.vitq_report = integer.vitq_report
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD
    model.config.quantization_config = quantizer.quantization_config
    # The library renames parameters of older checkpoints; these names are ours.
    model._weight_conversions = []


def to_pretrained(model: nn.Module, state: ModelState, backend: str | None = None) -> nn.Module:
    """The integer model of ``state``: ``save_pretrained`` writes what ``from_pretrained`` reads back, bit for bit.

    Args:   as :func:`vitq.convert.to_integer`; ``model`` of transformers, left untouched.
    Raises: TypeError, ValueError: as there.
    """
    integer = to_integer(model, state, backend)
    tensors, sites = disassemble(state)
    plain = {name: site.model_dump(mode="json") for name, site in sites.items()}
    config = VitqConfig(sites=plain, recipe=state.recipe, metrics=state.metrics)
    quantizer = VitqQuantizer(config, pre_quantized=True)
    quantizer.tensors = tensors
    integer.config = copy.deepcopy(integer.config)
    _take_over(integer, integer, quantizer)
    return integer
