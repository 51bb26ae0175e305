"""Checkpoints: a folder with ``config.json`` and one safetensors file, written atomically, verified when read.

``config.json`` names the tensor file, whose own name contains its digest: a new file is written beside the old one and
``config.json`` is replaced in one step, so at any instant the folder holds one complete checkpoint. Weights are stored
at their true width (``vitq_kernels.packing.pack_bits``), low-rank branches as float16, everything else as float32.
Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import timm
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vitq_kernels.formats import AttentionState, FocusSpec, LinearState, LowRankSpec, QuantSpec, TokenBits
from vitq_kernels.packing import pack_bits, table_indices, unpack_bits

from .convert import check_state, to_integer
from .devices import checked
from .files import alone_in, naming, save_tensors, temporary_beside
from .models import adapter_for
from .sources import REFUSALS, check_arguments
from .state import ModelState, SiteState

FORMAT, VERSION = "vitq", 1
CONFIG = "config.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message says which and why."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LinearConfig(_Strict):
    """A LinearState without its tensors."""

    kind: Literal["linear"] = "linear"
    out_features: Annotated[int, Field(ge=1)]
    in_features: Annotated[int, Field(ge=1)]
    bias: bool
    weight: QuantSpec
    act: QuantSpec | None
    act_zero_point: int
    lora: LowRankSpec


class AttentionConfig(_Strict):
    """An AttentionState without its tensors; ``tokens`` is N of the additive bias [H, N, N], or None.

    Without ``token_bits`` the field is left out, so that such a config is what a vitq without them writes and reads.
    """

    kind: Literal["attention"] = "attention"
    qkv: LinearConfig
    proj: LinearConfig
    heads: Annotated[int, Field(ge=1)]
    softmax_scale: float
    operands: QuantSpec
    focus: FocusSpec
    tokens: int | None
    token_bits: TokenBits | None = None

    @pydantic.model_serializer(mode="wrap")
    def _without_absent(self, plain: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in plain(self).items() if k != "token_bits" or v is not None}


class DataConfig(_Strict):
    """What images must look like; ``input_size`` (C, H, W), of clouds (N, C), whose mean and std are empty."""

    input_size: tuple[int, int, int] | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    num_classes: Annotated[int, Field(ge=0)]
    class_names: tuple[str, ...] | None = None


class WeightsFile(_Strict):
    """The tensor file: its name (which never leaves the folder), digest and size."""

    file: Annotated[str, Field(pattern=r"^model-[0-9a-f]{16}\.safetensors$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


Sites = dict[str, Annotated[LinearConfig | AttentionConfig, Field(discriminator="kind")]]


class Config(_Strict):
    """``config.json``.

    Args:
        float_bytes: size of the float32 model, to compare ``weights.bytes`` with.
        digest: SHA-256 of the canonical JSON of all other fields.
    """

    format: Literal["vitq"] = FORMAT
    version: Literal[1] = VERSION
    architecture: str
    kwargs: dict[str, Any]
    data: DataConfig
    recipe: dict[str, Any]
    source: dict[str, Any]
    metrics: dict[str, Any]
    sites: Sites
    float_bytes: int
    weights: WeightsFile
    digest: str = ""

    def sealed(self) -> Config:
        """The config with the digest of its other fields."""
        content = self.model_dump(mode="json", exclude={"digest"})
        text = json.dumps(content, sort_keys=True, allow_nan=False)
        return self.model_copy(update={"digest": hashlib.sha256(text.encode()).hexdigest()})


def save(path: str | os.PathLike, state: ModelState, *, overwrite: bool = False) -> Config:
    """Write ``state`` as a checkpoint folder, atomically: an existing checkpoint stays whole until the new one is.

    Args:     path: folder, created with its parents; overwrite: replace the checkpoint that is there.
    Returns:  the Config written.
    Raises:   CheckpointError: something is there that may not be replaced, values that JSON cannot hold, no ``data``, a
              state that is not of the model which ``architecture`` and ``kwargs`` make.
              OSError: the file system's own complaint; the folder then holds what it held before.
    """
    folder = Path(path)
    check_target(folder, overwrite)
    tensors, sites = disassemble(state)
    fields = {k: _plain(f"state.{k}", getattr(state, k)) for k in ("kwargs", "data", "recipe", "source", "metrics")}
    config = _validated(
        folder,
        {
            "architecture": state.architecture,
            "sites": sites,
            "float_bytes": _float_bytes(state, tensors),
            "weights": {"file": f"model-{'0' * 16}.safetensors", "sha256": "0" * 64, "bytes": 0},  # not written yet
            **fields,
        },
    )
    _check_architecture(folder, config, state)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with alone_in(folder):  # or one of two who save removes the tensors that the other's config then names
            config = _write(folder, tensors, config)
            for stale in folder.glob("model-*.safetensors"):
                if stale.name != config.weights.file:
                    stale.unlink()
    except BaseException:
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise
    return config


def _write(folder: Path, tensors: dict[str, Tensor], config: Config) -> Config:
    """``tensors``, and ``config`` with the file that they are in."""
    temporary = temporary_beside(folder / CONFIG)
    committed = None
    try:
        save_tensors(tensors, temporary, {FORMAT: str(VERSION)})  # one key: their order is not deterministic
        digest, size = _sha256(temporary), temporary.stat().st_size
        weights = WeightsFile(file=f"model-{digest[:16]}.safetensors", sha256=digest, bytes=size)
        config = config.model_copy(update={"weights": weights}).sealed()
        fresh = not (folder / weights.file).exists()
        _sync(temporary)
        os.replace(temporary, folder / weights.file)
        committed = folder / weights.file if fresh else None
        with naming(folder / CONFIG):
            temporary.write_text(json.dumps(config.model_dump(mode="json"), indent=1, allow_nan=False) + "\n")
            _sync(temporary)
        os.replace(temporary, folder / CONFIG)
        committed = None
    finally:
        temporary.unlink(missing_ok=True)
        if committed is not None:
            committed.unlink(missing_ok=True)
    _sync(folder)
    return config


def _check_architecture(folder: Path, config: Config, state: ModelState) -> None:
    """Before a checkpoint is written that nothing can load."""
    try:
        with torch.device("meta"):
            check_state(adapter_for(build_float(folder, config)), state)
    except (TypeError, ValueError) as error:
        made = f"timm.create_model({config.architecture!r}, **{config.kwargs})"
        raise CheckpointError(
            f"{folder}: the state is not of the model that {made} makes ({error}); "
            "pass kwargs=<the model's arguments of create_model> and architecture=<its name> to calibrate"
        ) from error


def read_config(path: str | os.PathLike) -> Config:
    """The verified config of the checkpoint at ``path``; its tensors are not read.

    Raises: CheckpointError with what is wrong.
    """
    folder = Path(path)
    if not folder.is_dir():
        why = "is a file, expected a checkpoint folder" if folder.exists() else "no such folder"
        raise CheckpointError(f"{folder}: {why}")
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{folder}: has no {CONFIG}, expected a vitq checkpoint")
    try:
        content = json.loads(file.read_bytes(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is no JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{file}: is not of a vitq checkpoint (format is not {FORMAT!r})")
    version = content.get("version")
    if version != VERSION:
        newer = ", newer than" if isinstance(version, int) and version > VERSION else ", expected"
        raise CheckpointError(f"{file}: has version {version!r}{newer} {VERSION}, which this vitq reads")
    config = _validated(file, content)
    if config.sealed().digest != config.digest:
        raise CheckpointError(f"{file}: does not match its digest; it was changed after it was written")
    return config


def load_state(path: str | os.PathLike) -> tuple[ModelState, Config]:
    """The state in the checkpoint at ``path``, on the CPU, exactly as it was saved, and its config.

    Raises: CheckpointError with what is wrong.
    """
    folder, config = Path(path), read_config(path)
    file = folder / config.weights.file
    if not file.is_file():
        raise CheckpointError(f"{folder}: lacks {file.name}, which {CONFIG} refers to")
    if (size := file.stat().st_size) != config.weights.bytes:
        raise CheckpointError(f"{file}: has {size} bytes, expected {config.weights.bytes}: truncated or replaced")
    if _sha256(file) != config.weights.sha256:
        raise CheckpointError(f"{file}: does not match its SHA-256; it was changed after it was written")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: is no safetensors file: {error}") from error
    sites, floats = assemble(file, tensors, config.sites)
    data = config.data.model_dump(exclude_none=True)
    try:
        plain = {k: getattr(config, k) for k in ("kwargs", "recipe", "source", "metrics")}
        state = ModelState(config.architecture, sites, floats, data=data, **plain)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    return state, config


def load(path: str | os.PathLike, device: torch.device | str = "cpu", backend: str | None = None) -> nn.Module:
    """The integer model of the checkpoint at ``path``, ready to run: eval mode, packed for ``device``.

    Args:     backend: pin every integer module to this back end; None takes the device's best.
    Returns:  the timm model with integer modules; ``vitq_config`` is the Config, ``vitq_report`` the ConversionReport.
    Raises:   CheckpointError with what is wrong; ValueError for a device that is not there or no back end serves.
    """
    device = checked(device)
    state, config = load_state(path)
    model = build_float(Path(path), config)
    try:
        check_state(adapter_for(model), state)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit {config.architecture}: {error}") from error
    model = to_integer(model.to(device), state, backend)
    model.vitq_config = config
    return model


def build_float(path: Path, config: Config) -> nn.Module:
    """The architecture of ``config`` with arbitrary weights; the global random state is left as it was."""
    if not timm.is_model(config.architecture):
        raise CheckpointError(f"{path}: architecture is {config.architecture!r}, which timm {timm.__version__} lacks")
    with torch.random.fork_rng(devices=[]):
        try:
            check_arguments(config.kwargs)
            return timm.create_model(config.architecture, pretrained=False, **config.kwargs).eval()
        except REFUSALS as error:
            raise CheckpointError(f"{path}: {config.architecture} refuses {config.kwargs}: {error}") from error


def disk_bytes(path: str | os.PathLike) -> int:
    """Bytes of the checkpoint on disk: config and tensors."""
    folder = Path(path)
    return (folder / CONFIG).stat().st_size + (folder / read_config(folder).weights.file).stat().st_size


_PARTS = {
    "codes": "weight codes",
    "weight_scale": "scales",
    "act_scale": "scales",
    "operand_scale": "scales",
    "lora_down": "low-rank branches",
    "lora_up": "low-rank branches",
    "bias": "biases",
    "bias_table": "position biases",
    "bias_index": "position biases",
}


def part_bytes(state: ModelState) -> dict[str, int]:
    """Bytes of the tensors that a checkpoint of ``state`` holds, by what they are; float tensors by their module."""
    parts: dict[str, int] = {}
    for name, tensor in disassemble(state)[0].items():
        what = f"float: {name.split('.')[1]}" if name.startswith("float.") else _PARTS[name.rpartition(".")[2]]
        parts[what] = parts.get(what, 0) + tensor.nbytes
    return parts


def check_target(folder: Path, overwrite: bool) -> None:
    """Raises CheckpointError unless a checkpoint may be written at ``folder``."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file, expected a folder")
    file = folder / CONFIG
    if not file.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{folder}: holds a {CONFIG} already, expected a new folder (or overwrite=True)")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{file}: is not of a vitq checkpoint, expected one: it is not overwritten")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _plain(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """``value`` as JSON holds it (tuples become lists)."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name} holds what JSON cannot: {error}") from error


def _validated(where: Path, content: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{where}: {field}: {first['msg']} (got {str(first['input'])[:80]})") from error


def _linear_tensors(path: str, state: LinearState) -> dict[str, Tensor]:
    codes, bits = state.codes.cpu(), state.weight.bits
    if state.weight.table is not None:
        codes = (table_indices(codes, state.weight.table).to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    parts = {"codes": pack_bits(codes, bits)}
    parts |= {name: getattr(state, name) for name in ("weight_scale", "bias", "act_scale", "lora_down", "lora_up")}
    return {f"site.{path}.{name}": t for name, t in parts.items() if t is not None}


def _linear_config(state: LinearState) -> LinearConfig:
    n, k = state.codes.shape
    return LinearConfig(
        out_features=n,
        in_features=k,
        bias=state.bias is not None,
        weight=state.weight,
        act=state.act,
        act_zero_point=state.act_zero_point,
        lora=state.lora,
    )


def disassemble(state: ModelState) -> tuple[dict[str, Tensor], dict[str, LinearConfig | AttentionConfig]]:
    """A state as tensors on the CPU by their names in a file, and what its sites are besides."""
    tensors: dict[str, Tensor] = {}
    sites: dict[str, LinearConfig | AttentionConfig] = {}
    for path, linear in state.linears().items():
        tensors |= _linear_tensors(path, linear)
    for path, site in state.sites.items():
        if isinstance(site, LinearState):
            sites[path] = _linear_config(site)
            continue
        if site.operand_scale is not None:
            tensors[f"site.{path}.operand_scale"] = site.operand_scale
        if site.bias is not None:
            # A relative position bias repeats few distinct columns: bit for bit, as a table and an index.
            columns = site.bias.detach().cpu().flatten(1).T.contiguous().view(torch.int32)
            table, index = columns.unique(dim=0, return_inverse=True)
            tensors[f"site.{path}.bias_table"] = table.view(torch.float32)
            tensors[f"site.{path}.bias_index"] = index.to(torch.int16 if len(table) < 1 << 15 else torch.int32)
        sites[path] = AttentionConfig(
            qkv=_linear_config(site.qkv),
            proj=_linear_config(site.proj),
            heads=site.heads,
            softmax_scale=site.softmax_scale,
            operands=site.operands,
            focus=site.focus,
            tokens=None if site.bias is None else site.bias.shape[-1],
            token_bits=site.token_bits,
        )
    tensors |= {f"float.{name}": tensor for name, tensor in state.floats.items()}
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, sites


def _float_bytes(state: ModelState, tensors: dict[str, Tensor]) -> int:
    kept = (".bias", ".bias_table")
    parts = sum(t.nbytes for n, t in tensors.items() if n.startswith("float.") or n.endswith(kept))
    return parts + sum(4 * linear.codes.numel() for linear in state.linears().values())


def assemble(
    file: Path, tensors: dict[str, Tensor], configs: dict[str, LinearConfig | AttentionConfig]
) -> tuple[dict[str, SiteState], dict[str, Tensor]]:
    """Inverse of :func:`disassemble`: the sites and floats of a ModelState; empties ``tensors``.

    Raises: CheckpointError naming ``file`` and what is missing, malformed or left over.
    """
    reader = _Reader(file, tensors)
    sites = {name: reader.site(name, site) for name, site in configs.items()}
    floats = {name.removeprefix("float."): reader.take(name) for name in list(tensors) if name.startswith("float.")}
    if tensors:
        raise CheckpointError(f"{file}: holds {sorted(tensors)[0]!r}, which {CONFIG} does not mention")
    return sites, floats


class _Reader:
    """Takes tensors out of a file's dictionary, each with the dtype and shape that the config promises."""

    def __init__(self, file: Path, tensors: dict[str, Tensor]) -> None:
        self.file, self.tensors = file, tensors

    def take(self, name: str, shape: tuple[int | None, ...] | None = None, dtypes=(torch.float32,)) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.file}: lacks {name!r}")
        tensor = self.tensors.pop(name)
        if tensor.dtype not in dtypes:
            raise CheckpointError(f"{self.file}: {name!r} has dtype {tensor.dtype}, expected {dtypes[0]}")
        fits = shape is None or (
            tensor.dim() == len(shape) and all(w is None or s == w for s, w in zip(tensor.shape, shape))
        )
        if not fits:
            raise CheckpointError(f"{self.file}: {name!r} has shape {tuple(tensor.shape)}, expected {shape}")
        return tensor

    def linear(self, path: str, config: LinearConfig) -> LinearState:
        n, k, bits = config.out_features, config.in_features, config.weight.bits
        packed = self.take(f"site.{path}.codes", (n, -(-k * bits // 8)), (torch.uint8,))
        codes = unpack_bits(packed, bits, k)
        if config.weight.table is not None:
            levels = torch.tensor(config.weight.table.levels, dtype=torch.int8)
            codes = levels[codes.long() + (1 << (bits - 1))]
        side = config.lora.rank > 0 and config.lora.kind != "merged"
        static = config.act is not None and not config.act.dynamic
        optional = {
            "bias": (config.bias, (n,)),
            "act_scale": (static, (1,)),
        }
        branch = {"lora_down": (config.lora.rank, k), "lora_up": (n, config.lora.rank)} if side else {}
        parts = {name: self.take(f"site.{path}.{name}", shape) for name, (there, shape) in optional.items() if there}
        parts |= {name: self.take(f"site.{path}.{name}", shape, (torch.float16,)) for name, shape in branch.items()}
        scale = self.take(f"site.{path}.weight_scale", (n,))
        fixed = {"act": config.act, "act_zero_point": config.act_zero_point, "lora": config.lora}
        return LinearState(codes, scale, config.weight, **fixed, **parts)

    def site(self, path: str, config: LinearConfig | AttentionConfig) -> SiteState:
        try:
            return self.linear(path, config) if isinstance(config, LinearConfig) else self.attention(path, config)
        except CheckpointError:
            raise
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self.file}: {path!r}: {error}") from error

    def attention(self, path: str, config: AttentionConfig) -> AttentionState:
        scale = None if config.operands.dynamic else self.take(f"site.{path}.operand_scale", (None,))
        bias = None
        if (n := config.tokens) is not None:
            table = self.take(f"site.{path}.bias_table", (None, config.heads))
            index = self.take(f"site.{path}.bias_index", (n * n,), (torch.int16, torch.int32)).long()
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(table):
                raise CheckpointError(f"{self.file}: {path!r}: bias_index leaves its table of {len(table)} rows")
            bias = table[index].T.reshape(config.heads, n, n).contiguous()
        qkv, proj = self.linear(f"{path}.qkv", config.qkv), self.linear(f"{path}.proj", config.proj)
        fixed = (config.heads, config.softmax_scale, config.operands)
        return AttentionState(qkv, proj, *fixed, scale, config.focus, bias, config.token_bits)
