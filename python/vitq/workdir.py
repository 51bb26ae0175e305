"""Finished units of an interrupted calibration, on disk: written atomically, refused for another run."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from vitq_kernels.formats import FocusSpec, LevelTable, LowRankSpec, QuantSpec, TokenBits

from .files import naming, save_tensors
from .quantizers import FocusQuantizer, SimAttention, SimLinear
from .quantizers.simulated import from_plain
from .simulate import SimModel

FORMAT, LOCK = 3, "lock"


def tensor_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name}{tuple(t.shape)}{t.dtype}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class WorkDir:
    """A directory that holds one calibration's finished units.

    Args:
        path: created if missing.
        identity: what the run is of: name -> plain JSON value (recipe, digests of model and images, seed).

    Raises:
        ValueError: the directory belongs to another calibration (the message says what differs), or is no work
            directory and not empty.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        index = self.path / "calibration.json"
        if index.exists():
            try:
                found = json.loads(index.read_text())
                if not isinstance(found, dict):
                    raise ValueError(f"holds a {type(found).__name__}, expected an object")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"work_dir {self.path}: calibration.json cannot be read ({error})") from error
            different = [k for k in sorted(identity.keys() | found.keys()) if identity.get(k) != found.get(k)]
            if different:
                raise ValueError(f"work_dir {self.path} is of another calibration: {', '.join(different)} differ")
        elif any(self.path.iterdir()):
            raise ValueError(
                f"work_dir {self.path} is not empty and holds no calibration.json, expected a new directory"
            )
        else:
            _write(index, json.dumps(identity, indent=1).encode())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The time in which no other process may calibrate into the directory. Raises: ValueError if one does."""
        with (self.path / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"work_dir is '{self.path}', into which another process calibrates") from error
            yield

    def _file(self, step: str, unit: str) -> Path:
        return self.path / f"{step}.{unit}.safetensors"

    def keep(self, step: str, unit: str, sim: SimModel, ranks: dict[str, int]) -> None:
        """Store the quantized modules below ``unit`` and its allocated ranks as they are now."""
        tensors, meta = snapshot(sim.model.get_submodule(unit))
        file = self._file(step, unit)
        partial = file.with_suffix(".partial")
        save_tensors(tensors, partial, {"modules": json.dumps(meta), "ranks": json.dumps(ranks)})
        os.replace(partial, file)

    def restore(self, step: str, unit: str, sim: SimModel) -> dict[str, int] | None:
        """Load what :meth:`keep` stored and return the unit's ranks; None if there is nothing.

        Raises: ValueError for a file that cannot be read.
        """
        file = self._file(step, unit)
        if not file.exists():
            return None
        try:
            with safe_open(file, "pt") as f:
                meta, ranks = (json.loads(f.metadata()[key]) for key in ("modules", "ranks"))
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"work_dir: {file} cannot be read ({error}); delete it to compute it again") from error
        apply_snapshot(sim.model.get_submodule(unit), tensors, meta)
        return ranks

    def note(self, name: str, values: Any) -> None:
        """Store plain JSON values as ``<name>.json``."""
        _write(self.path / f"{name}.json", json.dumps(values, indent=1).encode())

    def noted(self, name: str) -> Any:
        """What :meth:`note` stored; None if there is nothing.

        Raises: ValueError for a file that cannot be read.
        """
        file = self.path / f"{name}.json"
        if not file.exists():
            return None
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"work_dir: {file} cannot be read ({error}); delete it to compute it again") from error


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    with naming(path):
        partial.write_bytes(data)
    os.replace(partial, path)


def _plain(spec: QuantSpec | FocusSpec | LowRankSpec | TokenBits | None) -> dict | None:
    return None if spec is None else dataclasses.asdict(spec)


def _quant_spec(plain: dict | None) -> QuantSpec | None:
    if plain is None:
        return None
    table = plain.pop("table")
    return QuantSpec(**plain, table=None if table is None else LevelTable(tuple(table["levels"])))


def snapshot(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Tensors and formats of every Sim module at or below ``module``."""
    meta: dict[str, dict] = {}
    tensors: dict[str, Tensor] = {}
    for name, m in module.named_modules():
        if isinstance(m, SimLinear):
            meta[name] = {"weight": _plain(m.quant.spec), "act": _plain(m.act.spec), "lora": _plain(m.lora)}
        elif isinstance(m, SimAttention):
            focus = None if m.focus is None else _plain(m.focus.spec)
            meta[name] = {"operands": _plain(m.operands.spec), "groups": m.operands.groups, "focus": focus}
            meta[name]["token_bits"] = _plain(m.token_bits)
        else:
            continue
        meta[name]["simulated"] = None if m.simulated is None else m.simulated.plain()
        own = {f"{name}|{k}": t.detach().clone().contiguous() for k, t in m.state_dict().items()}
        tensors |= {k: t for k, t in own.items() if k.split("|")[1].count(".") <= 1}
    return tensors, meta


def apply_snapshot(module: nn.Module, tensors: dict[str, Tensor], meta: dict[str, dict]) -> None:
    """Inverse of :func:`snapshot`; tensors go where the module is."""
    device = next(module.parameters()).device
    tensors = {key: t.to(device) for key, t in tensors.items()}
    for name, m in module.named_modules():
        own = {k.split("|")[1]: t for k, t in tensors.items() if k.split("|")[0] == name}
        if name in meta:
            simulated = meta[name]["simulated"]
            m.simulated = None if simulated is None else from_plain(simulated)
        if isinstance(m, SimLinear):
            spec = _quant_spec(meta[name]["weight"])
            m.quant.set(spec, own.get("quant.scale"))
            if "quant.alpha" in own:
                m.quant.alpha = nn.Parameter(own["quant.alpha"])
            lora = LowRankSpec(**meta[name]["lora"])
            m.set_low_rank(lora.kind, own.get("lora_down"), own.get("lora_up"))
            m.weight.data, m.bias = own["weight"], _like(m.bias, own.get("bias"))
            _set_activation(m.act, meta[name]["act"], own, "act")
        elif isinstance(m, SimAttention):
            m.operands.groups = meta[name]["groups"]
            _set_activation(m.operands, meta[name]["operands"], own, "operands")
            focus = meta[name]["focus"]
            m.focus = None if focus is None else FocusQuantizer(FocusSpec(**focus))
            token_bits = meta[name]["token_bits"]
            m.token_bits = None if token_bits is None else TokenBits(**token_bits)


def _like(old: nn.Parameter | None, new: Tensor | None) -> nn.Parameter | None:
    return None if new is None else nn.Parameter(new, requires_grad=old is not None and old.requires_grad)


def _set_activation(quantizer, plain: dict | None, own: dict[str, Tensor], prefix: str) -> None:
    zero = own.get(f"{prefix}.zero_point")
    quantizer.set(_quant_spec(plain), own.get(f"{prefix}.scale"), 0.0)
    if zero is not None:
        quantizer.zero_point.data = zero
