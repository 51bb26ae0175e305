"""The simulated model of a finished ModelState: what a checkpoint computes, in float arithmetic."""

from __future__ import annotations

import torch
from torch import nn

from vitq_kernels.formats import AttentionState, LinearState

from .convert import check_state
from .models import adapter_for
from .quantizers import FocusQuantizer, SimAttention, SimLinear
from .simulate import SimModel
from .state import ModelState


@torch.no_grad()
def to_simulated(model: nn.Module, state: ModelState) -> SimModel:
    """The simulated model of ``state``, the float counterpart of ``vitq.convert.to_integer``.

    Args:   model: the float architecture; of its weights none is used.
    Raises: TypeError, ValueError: as :func:`vitq.convert.to_integer`.
    """
    family = adapter_for(model)
    check_state(family, state)
    sim = SimModel(family)
    sim.model.load_state_dict(state.floats, strict=False)
    for path, linear in state.linears().items():
        _restore_linear(sim.linears[path], linear)
    for path, site in state.sites.items():
        if isinstance(site, AttentionState):
            _restore_attention(sim.attentions[path], site)
    return sim.requires_grad_(False).eval()


def _restore_linear(sim: SimLinear, state: LinearState) -> None:
    # Codes times scale round back to the same codes: the product's error is under 2^-22 of a code.
    sim.weight.copy_(state.codes.float() * state.weight_scale.unsqueeze(1))
    if state.bias is not None:
        sim.bias.copy_(state.bias)
    sim.quant.set(state.weight, state.weight_scale)
    sim.act.set(state.act, state.act_scale, state.act_zero_point)
    if state.lora_down is not None:
        sim.set_low_rank(state.lora.kind, state.lora_down, state.lora_up)


def _restore_attention(sim: SimAttention, state: AttentionState) -> None:
    sim.operands.groups = state.groups
    sim.operands.set(state.operands, state.operand_scale)
    sim.focus = FocusQuantizer(state.focus)
    sim.bias = state.bias
    sim.token_bits = state.token_bits
