"""Recipes: a paper's or a deployment's whole calibration as one validated YAML file."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vitq_kernels.formats import FocusSpec, QuantSpec

from ..stages import STAGES, find
from ..stages.base import Method, Options

FOLDER = Path(__file__).parent
ACTIVATION_BITS = ("activations", "operands", "softmax")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Images(_Model):
    """Calibration images: how many, what fraction of them augmented, how many at a time."""

    images: int = Field(128, ge=1)
    augment: float = Field(0.0, ge=0.0, le=1.0)
    batch: int = Field(32, ge=1)


class Bits(_Model):
    """Bit-widths, 2..8: weights, inputs of linear layers, Q/K/V, post-softmax probabilities, first and last layer."""

    weights: int = Field(8, ge=2, le=8)
    activations: int = Field(8, ge=2, le=8)
    operands: int = Field(8, ge=2, le=8)
    softmax: int = Field(8, ge=2, le=8)
    boundary: int = Field(8, ge=2, le=8)


class Focus(_Model):
    """Form of the post-softmax quantizer (see FocusSpec); ``b1`` and ``b2`` are where it starts."""

    anchor: Literal["absolute", "row"] = "row"
    power: float = Field(2.0, ge=1.0)
    below: Literal["floor", "zero"] = "floor"
    renormalize: bool = False
    grid: int = Field(255, ge=1, le=255)
    b1: float = Field(0.0, ge=0.0, lt=1.0)
    b2: float = Field(1.0, gt=0.0, le=1.0)


class LowRank(_Model):
    """The low-rank branch of every interior linear layer; ``rank`` is clipped to what layer and kernels can use."""

    kind: Literal["none", "merged", "error", "subspace"] = "none"
    rank: int = Field(0, ge=0, le=1024)


class Step(_Model):
    """One step of a stage: a method's name and its options, already validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    method: str
    options: Options


class Recipe(_Model):
    """What is quantized to what, and by which methods.

    Attributes: one list of steps per stage; ``effort`` scales every iteration count, ``fast_effort`` is what demos
    take for it. ``learning``: arithmetic of the products that are differentiated (on a GPU bfloat16 takes the tensor
    cores); quantizers, and whatever decides or is kept, are computed in float32.
    """

    name: str = Field(min_length=1)
    summary: str = ""
    source: str = ""
    calibration: Images = Images()
    bits: Bits = Bits()
    activations: Literal["static", "dynamic"] = "static"
    activation_levels: Literal["uniform", "table"] = "uniform"
    weight_levels: Literal["uniform", "table"] = "uniform"
    operands: Literal["static", "dynamic"] = "static"
    operand_scales: Literal["per_tensor", "per_head"] = "per_head"
    focus: Focus = Focus()
    low_rank: LowRank = LowRank()
    learning: Literal["float32", "bfloat16"] = "float32"
    effort: float = Field(1.0, gt=0.0)
    fast_effort: float = Field(1.0, gt=0.0)
    transform: tuple[Step, ...] = ()
    initialise: tuple[Step, ...] = ()
    allocate: tuple[Step, ...] = ()
    compensate: tuple[Step, ...] = ()
    reconstruct: tuple[Step, ...] = ()
    refine: tuple[Step, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _steps(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {k: tuple(_step(k, s) for s in _as_list(k, v)) if k in STAGES else v for k, v in data.items()}

    def steps(self) -> list[tuple[str, Method, Options]]:
        """(stage, method, options) in the order in which they run."""
        return [(s, find(s, step.method), step.options) for s in STAGES for step in getattr(self, s)]

    @property
    def refusal(self) -> str | None:
        """Why models by this recipe exist in simulation only; None if they become integer."""
        return next((reason for *_, options in self.steps() if (reason := options.refusal)), None)

    def plain(self) -> dict[str, Any]:
        """The recipe as plain JSON values; :func:`parse` takes them back."""
        out = self.model_dump(mode="json", exclude=set(STAGES))
        for stage in STAGES:
            out[stage] = [{"method": s.method, **s.options.model_dump(mode="json")} for s in getattr(self, stage)]
        return out

    def with_budget(self, budget: dict[str, Any]) -> Recipe:
        """The recipe with ``budget`` (such as {"size": 0.2}) for what its allocation may spend.

        Raises: ValueError if no step of ``allocate`` has a budget, or it takes no such one.
        """
        plain = self.plain()
        spending = [step for step in plain["allocate"] if "budget" in step]
        if not spending:
            raise ValueError(f"budget is given and no step of recipe {self.name} has one, expected such as pmq-mixed")
        for step in spending:
            step["budget"] = budget
        return parse(plain, f"recipe {self.name}")

    def weight_spec(self, boundary: bool) -> QuantSpec:
        """Without a level table: that is fitted later."""
        return QuantSpec(self.bits.boundary if boundary else self.bits.weights, granularity="per_channel")

    def activation_spec(self, boundary: bool) -> QuantSpec:
        bits = self.bits.boundary if boundary else self.bits.activations
        if self.activations == "dynamic":
            return QuantSpec(bits, granularity="per_token", dynamic=True)
        return QuantSpec(bits, symmetric=False)

    def operand_spec(self) -> QuantSpec:
        if self.operands == "dynamic":
            return QuantSpec(self.bits.operands, granularity="per_token", dynamic=True)
        return QuantSpec(self.bits.operands, granularity=self.operand_scales)

    def focus_spec(self) -> FocusSpec:
        f = self.focus
        return FocusSpec(self.bits.softmax, f.b1, f.b2, f.power, f.anchor, f.below, f.renormalize, f.grid)


def _as_list(stage: str, value: Any) -> list:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{stage} is {value!r}, expected a list of steps, each {{method: name, ...}}")
    return list(value)


def _step(stage: str, value: Any) -> Step:
    if isinstance(value, Step):
        return value
    if isinstance(value, str):
        value = {"method": value}
    if not isinstance(value, dict) or not isinstance(value.get("method"), str):
        raise ValueError(f"{stage} has step {value!r}, expected {{method: name, ...options}}")
    known = find(stage, value["method"])
    options = {k: v for k, v in value.items() if k != "method"}
    try:
        return Step(method=known.name, options=known.options(**options))
    except ValidationError as error:
        raise ValueError(f"{stage}.{known.name}: {_reasons(error)}") from error


def _reasons(error: ValidationError) -> str:
    """One line: field, what is wrong with it, its value."""
    lines = []
    for e in error.errors():
        where = ".".join(map(str, e["loc"]))
        if e["type"] == "extra_forbidden":
            lines.append(f"{where} is no field of it")
        elif e["type"] == "value_error":
            lines.append(str(e["ctx"]["error"]))
        elif e["type"] == "missing":
            lines.append(f"{where} is missing")
        else:
            lines.append(f"{where} is {e['input']!r}, {e['msg'][0].lower()}{e['msg'][1:]}")
    return "; ".join(lines)


def parse(data: Any, where: str = "recipe") -> Recipe:
    """A Recipe of plain values. Raises: ValueError in one line, naming ``where``, field, value and what is expected."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} is a {type(data).__name__}, expected a mapping of recipe fields")
    try:
        return Recipe(**data)
    except ValidationError as error:
        raise ValueError(f"{where}: {_reasons(error)}") from error


def names() -> list[str]:
    """The recipes that ship with the package."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def _merged(base: dict, over: dict) -> dict:
    out = dict(base)
    for key, value in over.items():
        out[key] = _merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    if path in seen:
        raise ValueError(f"recipe {path.name} extends itself: {' -> '.join(p.name for p in (*seen, path))}")
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"recipe {path} holds a {type(data).__name__}, expected a mapping of recipe fields")
    parent = data.pop("extends", None)
    return data if parent is None else _merged(_read(_find(str(parent), path.parent), (*seen, path)), data)


def _candidate(name: str, folder: Path | None = None) -> Path | None:
    candidates = [Path(name)] + [f / f"{name}.yaml" for f in (folder, FOLDER) if f is not None]
    return next((path for path in candidates if path.is_file()), None)


def _find(name: str, folder: Path | None = None) -> Path:
    path = _candidate(name, folder)
    if path is None:
        stem = re.sub(r"(-w[0-9]+a[0-9]+)?(-static|-dynamic)?$", "", name)
        near = dict.fromkeys(difflib.get_close_matches(stem, names(), 2) + difflib.get_close_matches(name, names(), 2))
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"recipe is {name!r}, expected a YAML file or one of {', '.join(names())}; to a name may be appended "
            f"-w<W>a<A> (2 to 8 bits), then -static or -dynamic{hint}"
        )
    return path


def load_recipe(name: str | Path, *, fast: bool = False, **overrides: Any) -> Recipe:
    """A shipped recipe by name, or a YAML file of your own.

    Args:
        name: name of a shipped recipe or a path. To a name may be appended ``-w<W>a<A>``, the bits of weights and of
            everything else inside blocks where no file of that name has its own, then ``-static`` or ``-dynamic``.
        fast: scale iteration counts by the recipe's own ``fast_effort``.
        overrides: fields to replace; mappings are merged into theirs.

    A file may name another recipe as ``extends`` and give only what differs. ``-dynamic`` replaces the static ranges of
    activations and attention operands by scales per token.

    Raises: ValueError in one line for an unknown recipe, a file that is no YAML, a field that does not fit, or bits
    appended to the name of one whose allocation has a budget, or widths, of its own.
    """
    stem, form, suffixes = str(name), {}, ""
    if not Path(stem).is_file():
        if found := re.fullmatch(r"(.*)-(static|dynamic)", stem):
            stem, form = found[1], {"activations": found[2], "operands": found[2]}
            suffixes = f"-{found[2]}"
        if not _candidate(stem) and (found := re.fullmatch(r"(.*)-w([2-8])a([2-8])", stem)) and _candidate(found[1]):
            stem, suffixes = found[1], f"-w{found[2]}a{found[3]}{suffixes}"
            form["bits"] = {"weights": int(found[2])} | dict.fromkeys(ACTIVATION_BITS, int(found[3]))
    path = _find(stem)
    data = {"name": path.stem + suffixes, **_merged(_read(path), _merged(form, overrides))}
    if fast:
        data["effort"] = data.get("fast_effort", 1.0)
    recipe = parse(data, f"recipe {data['name']}")
    if "bits" in form:
        own = Bits(**_read(path).get("bits", {}))
        reason = next((reason for *_, options in recipe.steps() if (reason := options.own_bits)), None)
        if reason and (own.weights, own.activations) != (form["bits"]["weights"], form["bits"]["activations"]):
            raise ValueError(
                f"recipe is {str(name)!r}, expected {stem}: bits do not decide what its layers get, {reason}"
            )
    return recipe
