"""``vitq report``: a checkpoint as one HTML page that needs nothing else: no network, no scripts, no fonts."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vitq_kernels.formats import AttentionState, LinearState, QuantSpec

from . import checkpoint, jobs
from .allocation.plot import draw_frontier, draw_packs
from .checkpoint import Config
from .console import cell
from .restore import to_simulated
from .simulate import SimModel
from .state import ModelState

FRONTIER = "frontier.json"


def render(folder: Path) -> str:
    """The page of the checkpoint at ``folder``: its figures, layers, attentions, and what allocation left, if it did.

    Pictures need matplotlib; without it the page says so in their place.

    Raises: CheckpointError for what cannot be read; ValueError for a ``frontier.json`` that does not belong to it.
    """
    state, config = checkpoint.load_state(folder)
    frontier, packs = read_frontier(folder, state.metrics), state.metrics.get("packs")
    # Layers in execution order.
    sim, linears = to_simulated(checkpoint.build_float(folder, config), state), state.linears()
    loader = PackageLoader("vitq", "assets")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["cell"] = cell
    return environment.get_template("report.html").render(
        architecture=config.architecture,
        recipe=config.recipe,
        facts=_facts(sim, state, config, checkpoint.disk_bytes(folder)),
        linears=[_linear(path, linears[path]) for path in sim.linears if path in linears],
        attentions=[_attention(p, site) for p, site in state.sites.items() if isinstance(site, AttentionState)],
        packs=_packs(packs or []),
        packs_picture=_picture(draw_packs, packs),
        frontier=frontier,
        picked=_picked(frontier) if frontier else None,
        components=_components(frontier) if frontier else None,
        frontier_picture=_picture(draw_frontier, frontier),
    )


def read_frontier(folder: Path, metrics: dict[str, Any]) -> dict[str, Any] | None:
    """The whole frontier from beside the checkpoint where it is, else what the checkpoint itself keeps of it.

    Raises: ValueError for a file that is no frontier, or that of another checkpoint.
    """
    kept, file = metrics.get("frontier"), folder / FRONTIER
    if kept is None or not file.exists():
        return kept
    try:
        whole = json.loads(file.read_text())
        same = all(
            pick(whole) == pick(kept)
            for pick in (lambda f: f["points"][f["picked"]], lambda f: f["sensitivity"], lambda f: f["picked_bits"])
        )
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} cannot be read as a frontier ({type(error).__name__}: {error})") from error
    if not same:
        raise ValueError(f"{file} is of another checkpoint, expected the point that its config.json holds")
    return whole


def _picture(draw: Callable, record: Any) -> str | None:
    """The figure as SVG in a data URI; None without a record or matplotlib."""
    if record is None or not importlib.util.find_spec("matplotlib"):
        return None
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "vitq"}):  # the same page whenever it is written
        draw(record, stacked=True).savefig(out, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}"


def _facts(sim: SimModel, state: ModelState, config: Config, size: int) -> dict[str, str]:
    weights, activations = jobs.average_bits(sim)
    share = size / config.float_bytes
    facts = {
        "recipe": state.recipe.get("summary"),
        "method": state.recipe.get("source"),
        "bits": ", ".join(f"{name} {bits}" for name, bits in state.recipe.get("bits", {}).items()),
        "input": " × ".join(map(str, config.data.input_size)),
        "size": f"{size / 1e6:.2f} MB, {share:.1%} of the float model's {config.float_bytes / 1e6:.2f} MB",
        "average bits": f"{weights:.2f} per weight, {activations:.2f} per activation",
    }
    scalars = {k.replace("_", " "): cell(v) for k, v in state.metrics.items() if isinstance(v, int | float | str)}
    return {name: value for name, value in (facts | scalars).items() if value}


def _form(spec: QuantSpec) -> str:
    range_ = f"dynamic {spec.granularity}" if spec.dynamic else f"static {spec.granularity}"
    return range_.replace("_", " ") + (", table" if spec.table is not None else "")


def _linear(path: str, s: LinearState) -> dict[str, Any]:
    n, k = s.codes.shape
    return {
        "layer": path,
        "size": f"{n} × {k}",
        "weights": f"{s.weight.bits}{', table' if s.weight.table is not None else ''}",
        "activations": "float" if s.act is None else s.act.bits,
        "ranges": "–" if s.act is None else _form(s.act),
        "branch": f"{s.lora.kind}, rank {s.lora.rank}" if s.lora.rank else "–",
    }


def _attention(path: str, s: AttentionState) -> dict[str, Any]:
    f = s.focus
    return {
        "attention": path,
        "heads": s.heads,
        "Q, K, V": s.operands.bits,
        "ranges": _form(s.operands),
        "probabilities": f.bits,
        "interval": f"{cell(f.b1)} to {cell(f.b2)}, {f.anchor}",
        "power": cell(f.power),
    }


def _packs(packs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per block."""
    return [
        {
            "pack": number,
            "bits": pack["bits"],
            "block": block["path"],
            "S": block["curvature"],
            "Ω": block["sensitivity"],
            "mean Ω of the pack": pack["sensitivity"],
            "elements of the pack": pack["elements"],
        }
        for number, pack in enumerate(packs, 1)
        for block in pack["blocks"]
    ]


def _picked(frontier: dict[str, Any]) -> dict[str, str]:
    """Cost of the point picked on every axis, with its budget, and its Σ Ω."""
    point, budget = frontier["points"][frontier["picked"]], frontier["budget"]
    costs = {name: share for name, share in point.items() if name not in ("error", "chosen")}
    rows = {
        name: f"{cell(share)} of float32" + (f", budget {cell(budget[name])}" if name in budget else "")
        for name, share in costs.items()
    }
    return rows | {"Σ Ω": cell(point["error"])}


def _components(frontier: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per layer: the bits picked, Ω of every choice."""
    choices = [f"Ω at {_choice(*choice)}" for choice in frontier["choices"]]
    return [
        {"layer": path, "picked": _choice(*frontier["picked_bits"][path]), **dict(zip(choices, omegas))}
        for path, omegas in frontier["sensitivity"].items()
    ]


def _choice(weights: int, activations: int, rank: int | None = None) -> str:
    return f"W{weights}A{activations}" + (f" rank {rank}" if rank is not None else "")
