"""``vitq report``: a checkpoint as one HTML page that needs nothing else: no network, no scripts, no fonts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vitq_kernels.formats import AttentionState, LinearState, QuantSpec

from . import checkpoint, jobs, plots
from .allocation.plot import draw_frontier, draw_packs
from .checkpoint import Config
from .console import cell
from .files import write_text
from .plots import Picture
from .propagation import EDGES
from .restore import to_simulated
from .simulate import SimModel
from .state import ModelState

FRONTIER, EVALUATION = "frontier.json", "evaluation.json"
ACCURACY = {
    "split": "split",
    "images": "images",
    "top1_float": "float top-1 %",
    "top1_simulated": "simulated %",
    "top1_integer": "integer %",
    "agreement_simulated_integer": "simulated = integer",
    "agreement_float_quantized": "float = integer",
    "logit_sqnr_db": "logit SQNR dB",
}
LATENCY = ("batch", "threads", "latency_ms_float", "latency_ms_integer", "speedup")


def collect(folder: Path) -> dict[str, Any]:
    """Every figure of the page of the checkpoint at ``folder``, as JSON holds it; what was not recorded is None.

    Raises: CheckpointError for what cannot be read; ValueError for a ``frontier.json`` or an ``evaluation.json`` that
            does not belong to it.
    """
    state, config = checkpoint.load_state(folder)
    metrics, linears = state.metrics, state.linears()
    sim = to_simulated(checkpoint.build_float(folder, config), state)
    size, parts, errors = checkpoint.disk_bytes(folder), checkpoint.part_bytes(state), metrics.get("errors")
    attentions = {path: site for path, site in state.sites.items() if isinstance(site, AttentionState)}
    runs = read_evaluation(folder, config)
    return {
        "architecture": config.architecture,
        "recipe": config.recipe,
        "facts": _facts(sim, state, config, size),
        "accuracy": runs and [{heading: run[key] for key, heading in _keys(run).items()} for run in runs],
        "latency": runs and {key: runs[0][key] for key in LATENCY},
        "bytes": {**parts, "config.json and headers": size - sum(parts.values())},
        # Layers in execution order.
        "layers": [_linear(path, linears[path], errors) for path in sim.linears if path in linears],
        "attentions": [_attention(path, site) for path, site in attentions.items()],
        "errors": errors,
        "packs": metrics.get("packs"),
        "frontier": read_frontier(folder, metrics),
    }


def _keys(run: dict[str, Any]) -> dict[str, str]:
    """Of a row of ``jobs.evaluate``: key → heading."""
    if "box AP float" not in run:
        return ACCURACY
    own = ("split", "images", *(key for key in run if " AP " in key))
    return {key: key for key in own} | {"identical": "simulated = integer"}


def render(figures: dict[str, Any]) -> str:
    """The page of what :func:`collect` found."""
    errors, packs, frontier = figures["errors"], figures["packs"], figures["frontier"]
    loader = PackageLoader("vitq", "assets")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["cell"] = cell
    return environment.get_template("report.html").render(
        figures,
        sizes=[{"part": part, "kB": n / 1e3} for part, n in figures["bytes"].items()],
        sizes_picture=plots.bars({k: [n / 1e3] for k, n in figures["bytes"].items()}, ["kB"], "kB of each part"),
        layers_picture=_draw_layers(figures["layers"]),
        units=None if errors is None else [_unit(row) for row in errors["units"]],
        errors_picture=None if errors is None else _draw_errors(errors["units"]),
        histograms=[] if errors is None else [_draw_histogram(row, errors) for row in figures["attentions"]],
        blocks=_packs(packs or []),
        packs_picture=draw_packs(packs) if packs else None,
        picked=_picked(frontier) if frontier else None,
        components=_components(frontier) if frontier else None,
        frontier_picture=draw_frontier(frontier) if frontier else None,
    )


def read_evaluation(folder: Path, config: Config) -> list[dict[str, Any]] | None:
    """What ``vitq quantize`` found when it evaluated and timed the checkpoint, a row per split; None if it did not.

    Raises: ValueError for a file that is no evaluation, or that of another checkpoint.
    """
    file = folder / EVALUATION
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
        runs, digest = [dict(run) for run in record["runs"]], record["digest"]
        if missing := [key for run in runs for key in (*_keys(run), *LATENCY) if key not in run] or not runs:
            raise LookupError(missing)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} cannot be read as an evaluation ({type(error).__name__}: {error})") from error
    if digest != config.digest:
        raise ValueError(f"{file} is of another checkpoint, expected one of digest {config.digest[:16]}")
    return runs


def write_evaluation(folder: Path, runs: list[dict[str, Any]] | None) -> None:
    """Keep ``runs`` beside the checkpoint; None takes those of an earlier one away."""
    file = folder / EVALUATION
    file.unlink(missing_ok=True)
    if runs is not None:
        digest = checkpoint.read_config(folder).digest
        write_text(file, json.dumps({"digest": digest, "runs": runs}, indent=1) + "\n")


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


def _draw_layers(layers: list[dict[str, Any]]) -> Picture:
    """Bits of every layer, and below them the ranks where there are any."""
    activations = {row["layer"]: None if row["activations"] == "float" else row["activations"] for row in layers}
    bits = {row["layer"]: [row["bits"], activations[row["layer"]]] for row in layers}
    pictures = [plots.bars(bits, ["weight bits", "activation bits"], "Bits of every layer")]
    if any(row["rank"] for row in layers):
        pictures.append(plots.bars({row["layer"]: [row["rank"]] for row in layers}, ["rank"], "Rank of every layer"))
    return plots.stack(pictures)


def _draw_errors(units: list[dict[str, Any]]) -> Picture | None:
    places = {row["path"]: at for at, row in enumerate(units)}
    series = [
        plots.Series(name, [(places[row["path"]], row[key]) for row in units if row[key] is not None])
        for name, key in (("by itself", "own_db"), ("with all before it", "through_db"))
    ]
    every = -(-len(units) // 8)
    ticks = [(at, path.rpartition(".")[2]) for path, at in places.items() if at % every == 0 or at == len(units) - 1]
    x, y = plots.Axis("block or layer", low=-0.3, high=len(units) - 0.7), plots.Axis("SQNR, dB")
    drawn = [s for s in series if s.points]
    return plots.plot(drawn, x, y, "SQNR of every block", ticks=ticks) if drawn else None


def _draw_histogram(row: dict[str, Any], errors: dict[str, Any]) -> tuple[str, Picture]:
    """(path, picture) of one attention's probabilities under its quantizer."""
    relative = " / largest of the row" if row["anchor"] == "row" else ""
    drawn = plots.histogram(
        EDGES,
        errors["softmax"][row["attention"]],
        plots.Axis(f"probability{relative}", log=True),
        f"Probabilities of {row['attention']} and the interval {row['b1']:.4g} to {row['b2']:.4g}",
        interval=(row["b1"], row["b2"]),
        levels=row["levels"],
    )
    return row["attention"], drawn


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


def _linear(path: str, s: LinearState, errors: dict[str, Any] | None) -> dict[str, Any]:
    n, k = s.codes.shape
    measured = {} if errors is None else errors["layers"][path]
    return {
        "layer": path,
        "n": n,
        "k": k,
        "bits": s.weight.bits,
        "levels": "uniform" if s.weight.table is None else "table",
        "activations": "float" if s.act is None else s.act.bits,
        "ranges": "–" if s.act is None else _form(s.act),
        "branch": s.lora.kind if s.lora.rank else None,
        "rank": s.lora.rank,
        "own_db": measured.get("own_db"),
        "through_db": measured.get("through_db"),
    }


def _attention(path: str, s: AttentionState) -> dict[str, Any]:
    f = s.focus
    levels, step, offset = f.decode()
    return {
        "attention": path,
        "heads": s.heads,
        "operands": s.operands.bits,
        "ranges": _form(s.operands),
        "bits": f.bits,
        "b1": f.b1,
        "b2": f.b2,
        "anchor": f.anchor,
        "power": f.power,
        "levels": [level * step + offset for level in levels.tolist()],
    }


def _unit(row: dict[str, Any]) -> dict[str, Any]:
    return {"block": row["path"], "by itself, dB": row["own_db"], "with all before it, dB": row["through_db"]}


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
