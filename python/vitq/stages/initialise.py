"""initialise.scales: specs and starting scales of every operand, from the float model's observations."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..quantizers import FocusQuantizer
from ..scales import Search, search_focus, set_activation, set_operands, set_weight
from .base import Calibration, Options, method


class ScalesOptions(Options):
    """
    Args:
        weights, activations, operands: range searches. The scores of attention are ruled by the largest queries and
            keys: a search that clips them for the sake of the many small ones costs 10 dB, hence ``minmax`` there.
        weight_importance: what a weight's squared error counts: ``input`` E x_k² of its column, or ``none`` one.
        focus_search: steps of the grid search for the focusing interval on the attention output; 0 keeps the recipe's.
    """

    weights: Search = Search()
    activations: Search = Search()
    operands: Search = Search(method="minmax")
    weight_importance: Literal["input", "none"] = "input"
    focus_search: int = Field(0, ge=0, le=100)


@method("initialise", "scales")
def scales(calibration: Calibration, options: ScalesOptions) -> None:
    recipe, sim, seen = calibration.recipe, calibration.sim, calibration.observations()
    for path, linear in sim.linears.items():
        boundary = calibration.boundary(path)
        rows = seen.inputs[path].rows
        importance = rows.square().mean(0) if options.weight_importance == "input" else None
        table = recipe.weight_levels == "table" and not boundary
        set_weight(linear, linear.weight, recipe.weight_spec(boundary), options.weights, importance, table)
        table = recipe.activation_levels == "table" and not boundary
        set_activation(linear, rows, recipe.activation_spec(boundary), options.activations, table)
    for path, attention in sim.attentions.items():
        focus = recipe.focus_spec()
        if options.focus_search:
            mask = calibration.attention_mask(path)
            focus = search_focus(attention, focus, seen.qkv[path], mask, options.focus_search)
        attention.focus = FocusQuantizer(focus)
        set_operands(attention, seen.qkv[path], recipe.operand_spec(), options.operands)
