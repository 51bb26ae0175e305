"""Point clouds to calibrate and to evaluate with: the bundled primitives, ModelNet40, ScanObjectNN and ShapeNetPart.

A source is ``primitives`` or ``<layout>:<folder>`` with one of these layouts, as their authors distribute them:

- ``modelnet40``: ``train_files.txt`` and ``test_files.txt`` with the names of HDF5 files (``data`` [n, 2048, 3],
  ``label``, ``normal``), or the resampled text files with normals (``modelnet40_shape_names.txt``,
  ``modelnet40_train.txt``, ``<class>/<class>_0001.txt`` with rows x,y,z,nx,ny,nz).
- ``scanobjectnn``: ``training_objectdataset_augmentedrot_scale75.h5`` and its ``test_`` file, the hardest variant
  (PB_T50_RS); ``scanobjectnn-plain``: ``training_objectdataset.h5`` (OBJ_BG; OBJ_ONLY in another folder).
- ``shapenetpart``: ``synsetoffset2category.txt``, ``train_test_split/shuffled_*_file_list.json`` and
  ``<synset>/<id>.txt`` with rows x y z nx ny nz part.

Clouds are centred and scaled to the unit sphere. What a model takes of them is its ``vitq_data``: [N, C]; part
segmentation has the category in one channel more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from . import primitives
from .bundled import draw

PRIMITIVES = "primitives"

#: Parts of ShapeNetPart's categories, positions among its 50.
SHAPENET_PARTS = {
    "Airplane": range(0, 4), "Bag": range(4, 6), "Cap": range(6, 8), "Car": range(8, 12), "Chair": range(12, 16),
    "Earphone": range(16, 19), "Guitar": range(19, 22), "Knife": range(22, 24), "Lamp": range(24, 28),
    "Laptop": range(28, 30), "Motorbike": range(30, 36), "Mug": range(36, 38), "Pistol": range(38, 41),
    "Rocket": range(41, 44), "Skateboard": range(44, 47), "Table": range(47, 50),
}  # fmt: skip


@dataclass(frozen=True)
class CloudFormat:
    """What a model takes of a cloud: ``points`` of it, ``features`` numbers each, 3 or 6 with normals; whether it tells
    ``parts`` apart (then the category is one channel more), and how many ``classes`` or parts."""

    points: int
    features: int
    parts: bool
    classes: int

    @classmethod
    def of(cls, model: nn.Module) -> CloudFormat:
        points, channels = model.vitq_data["input_size"]
        parts = hasattr(model, "categories")
        return cls(points, channels - parts, parts, model.num_classes)


@dataclass(frozen=True)
class Raw:
    """A cloud as it is stored: points [P, 3 or 6], class or category, and [P] parts or None."""

    points: np.ndarray
    label: int
    parts: np.ndarray | None = None


#: Reads the clouds of a split: how many there are, and cloud i.
Reader = tuple[int, Callable[[int], Raw]]


def is_cloud_model(model: nn.Module) -> bool:
    """Whether ``model`` takes clouds [B, N, C] (it says so in ``vitq_data``) rather than images."""
    return len(getattr(model, "vitq_data", {}).get("input_size", ())) == 2


def is_source(source: object) -> bool:
    """Whether ``source`` names clouds."""
    return isinstance(source, str) and (source == PRIMITIVES or source.partition(":")[0] in LAYOUTS)


def splits(source: str) -> tuple[str, ...]:
    """The splits of ``source`` to evaluate on."""
    return ("test", "hard") if source == PRIMITIVES else ("test",)


def load_clouds(source: str, split: str, model: nn.Module, limit: int | None = None, *, seed: int = 0) -> Dataset:
    """A split as a data set of (cloud [N, C] float32, label) pairs; a label is a class, or the part of every point.

    Of stored clouds with more points than the model takes, these are the first N, as in published evaluations, or for
    parts a choice that depends on the cloud alone; clouds with fewer points repeat some.

    Args:
        source, split, limit, seed: as in ``load_data``; ``split`` "train" or "test" (``primitives``: also "hard").
            "train" of ShapeNetPart is its training and validation lists together, as is customary.
        model: a point-cloud model; decides N, C and the kind of label.
    Raises:
        ValueError: a source that is none or does not fit the model, files that are missing or malformed (the message
            names the file), ``limit`` outside what there is. ImportError: HDF5 files without h5py.
    """
    form = CloudFormat.of(model)
    if source == PRIMITIVES:
        return _primitives(split, form, limit, seed)
    layout, colon, folder = str(source).partition(":")
    if layout not in LAYOUTS or not colon:
        raise ValueError(f"data is {str(source)!r}, expected {PRIMITIVES} or <layout>:<folder>, {', '.join(LAYOUTS)}")
    if split not in ("train", "test"):
        raise ValueError(f"split must be one of ('train', 'test') for {layout}, got {split!r}")
    if not Path(folder).is_dir():
        raise ValueError(f"{layout} must be in an existing folder, got '{folder}'")
    if form.parts != (layout == "shapenetpart"):
        task = "tells parts apart" if form.parts else "tells classes apart"
        raise ValueError(f"the model {task}, which {layout} does not")
    count, read = LAYOUTS[layout](Path(folder), split, form.features == 6)
    return _Clouds(read, draw(count, limit, seed, f"split {split!r} of '{source}'").tolist(), form, layout)


def calibration_clouds(source: str, model: nn.Module, n: int, seed: int = 0, augment: float = 0.0) -> Tensor:
    """``n`` training clouds [n, N, C] in random order, round(n · augment) of them scaled and moved, as in training.

    Each coordinate of those is multiplied by a number in [2/3, 3/2] and shifted by one in [−0.2, 0.2].

    Raises: ValueError: as :func:`load_clouds`, or ``augment`` outside [0, 1].
    """
    if not 0.0 <= augment <= 1.0:
        raise ValueError(f"augment must be a fraction between 0 and 1, got {augment}")
    data = load_clouds(source, "train", model, n, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    out = torch.stack([data[i][0] for i in torch.randperm(n, generator=generator).tolist()])
    where = torch.randperm(n, generator=generator)[: round(n * augment)]
    scale, shift = (torch.empty(len(where), 1, 3).uniform_(*ends, generator=generator) for ends in _AUGMENT)
    out[where, :, :3] = out[where, :, :3] * scale + shift
    return out


_AUGMENT = ((2 / 3, 3 / 2), (-0.2, 0.2))


def _primitives(split: str, form: CloudFormat, limit: int | None, seed: int) -> TensorDataset:
    names = primitives.PARTS if form.parts else primitives.CLASSES
    for what, has, wants in (
        ("points", form.points, primitives.POINTS),
        ("features a point", form.features, 3),
        ("classes", form.classes, len(names)),
    ):
        if has != wants:
            raise ValueError(f"the model has clouds of {has} {what}, {PRIMITIVES} of {wants}")
    if split not in primitives.COUNTS:
        raise ValueError(f"split must be one of {tuple(primitives.COUNTS)}, got {split!r}")
    index = draw(primitives.COUNTS[split], limit, seed, f"split {split!r} of the {PRIMITIVES}")
    return TensorDataset(*(primitives.objects if form.parts else primitives.classes)(split, index))


class _Clouds(Dataset):
    """Stored clouds in the format of a model, read when asked for."""

    def __init__(self, read: Callable[[int], Raw], index: list[int], form: CloudFormat, layout: str) -> None:
        self.read, self.index, self.form, self.layout = read, index, form, layout

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        position, form = self.index[i], self.form
        raw = self.read(position)
        top = raw.label if raw.parts is None else int(raw.parts.max())
        if not 0 <= top < form.classes:
            raise ValueError(f"cloud {position} of {self.layout} is of class {top}, the model knows {form.classes}")
        total = len(raw.points)
        order = np.random.default_rng(position).permutation(total) if form.parts else np.arange(total)
        chosen = np.resize(order, form.points)
        points = raw.points[chosen]
        points = np.concatenate([primitives.normalise(points[:, :3].astype(np.float64)), points[:, 3:]], 1)
        cloud = torch.from_numpy(points).float()
        if not form.parts:
            return cloud, torch.tensor(raw.label)
        cloud = torch.nn.functional.pad(cloud, (0, 1), value=float(raw.label))
        return cloud, torch.from_numpy(raw.parts[chosen]).long()


def _modelnet40(root: Path, split: str, normals: bool) -> Reader:
    if (root / f"{split}_files.txt").is_file():
        files = [root / Path(line).name for line in _lines(root / f"{split}_files.txt")]
        return _stored(files, normals)
    names = _lines(root / "modelnet40_shape_names.txt")
    clouds = _lines(root / f"modelnet40_{split}.txt")
    kinds = [cloud.rpartition("_")[0] for cloud in clouds]
    if unknown := sorted(set(kinds) - set(names)):
        raise ValueError(f"'{root / f'modelnet40_{split}.txt'}' lists a {unknown[0]!r}, which the shape names lack")

    def read(i: int) -> Raw:
        rows = _rows(root / kinds[i] / f"{clouds[i]}.txt", 6, ",")
        return Raw(rows if normals else rows[:, :3], names.index(kinds[i]))

    return len(clouds), read


def _scanobjectnn(suffix: str, root: Path, split: str, normals: bool) -> Reader:
    stem = "training" if split == "train" else "test"
    return _stored([root / f"{stem}_objectdataset{suffix}.h5"], normals)


def _shapenetpart(root: Path, split: str, normals: bool) -> Reader:
    pairs = [line.split() for line in _lines(root / "synsetoffset2category.txt")]
    wrong = [pair for pair in pairs if len(pair) != 2 or pair[0] not in SHAPENET_PARTS]
    if wrong:
        raise ValueError(
            f"'{root / 'synsetoffset2category.txt'}' has {' '.join(wrong[0])!r}, expected category, synset"
        )
    kind = {synset: list(SHAPENET_PARTS).index(name) for name, synset in pairs}
    paths: list[tuple[int, Path]] = []
    for which in ("train", "val") if split == "train" else ("test",):
        file = root / "train_test_split" / f"shuffled_{which}_file_list.json"
        for entry in _listed(file):
            _, synset, name = entry.split("/")
            if synset not in kind:
                raise ValueError(f"'{file}' lists synset {synset!r}, which synsetoffset2category.txt lacks")
            paths.append((kind[synset], root / synset / f"{name}.txt"))

    def read(i: int) -> Raw:
        label, file = paths[i]
        rows, known = _rows(file, 7, None), list(SHAPENET_PARTS.values())[label]
        parts = rows[:, 6].astype(np.int64)
        if parts.min() not in known or parts.max() not in known or (parts != rows[:, 6]).any():
            raise ValueError(f"'{file}' has parts {rows[:, 6].min():g} to {rows[:, 6].max():g}, expected {known}")
        return Raw(rows[:, : 6 if normals else 3], label, parts)

    return len(paths), read


#: Layout -> (folder, split, with normals) to a Reader.
LAYOUTS: dict[str, Callable[[Path, str, bool], Reader]] = {
    "modelnet40": _modelnet40,
    "scanobjectnn": partial(_scanobjectnn, "_augmentedrot_scale75"),
    "scanobjectnn-plain": partial(_scanobjectnn, ""),
    "shapenetpart": _shapenetpart,
}


def _lines(file: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises: ValueError: none, or no such file."""
    if not file.is_file():
        raise ValueError(f"'{file}' is missing")
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"'{file}' is empty")
    return lines


def _listed(file: Path) -> list[str]:
    try:
        entries = json.loads("\n".join(_lines(file)))
    except json.JSONDecodeError as error:
        raise ValueError(f"'{file}' is no JSON: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(e, str) and e.count("/") == 2 for e in entries):
        raise ValueError(f"'{file}' is no list of shape_data/<synset>/<id>")
    return entries


def _rows(file: Path, columns: int, delimiter: str | None) -> np.ndarray:
    """[P, columns] float64 of a text file. Raises: ValueError naming it."""
    lines = _lines(file)
    try:
        rows = np.loadtxt(lines, delimiter=delimiter, ndmin=2)
    except ValueError as error:
        raise ValueError(f"'{file}' is no table of numbers: {error}") from error
    if rows.shape[1] != columns:
        raise ValueError(f"'{file}' has {rows.shape[1]} columns, expected {columns}")
    return _finite(rows, file)


def _finite(points: np.ndarray, where: object) -> np.ndarray:
    if not np.isfinite(points).all():
        raise ValueError(f"'{where}' has NaN or Inf, expected finite coordinates")
    return points


def _stored(files: list[Path], normals: bool) -> Reader:
    """Clouds of HDF5 files, one after another."""
    parts = [_hdf5(file, normals) for file in files]
    ends = np.cumsum([len(labels) for _, labels in parts])

    def read(i: int) -> Raw:
        which = int(np.searchsorted(ends, i, side="right"))
        points, labels = parts[which]
        row = i - (int(ends[which - 1]) if which else 0)
        return Raw(_finite(points[row], files[which]), int(labels[row]))

    return int(ends[-1]), read


def _hdf5(file: Path, normals: bool) -> tuple[np.ndarray, np.ndarray]:
    """Points [n, P, 3 or 6] and labels [n] of one file."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError("HDF5 files need h5py: pip install 'vitq-kernels[points]'") from error
    if not file.is_file():
        raise ValueError(f"'{file}' is missing")
    wanted = ("data", "label", "normal") if normals else ("data", "label")
    try:
        with h5py.File(file, "r") as content:
            if missing := [name for name in wanted if name not in content]:
                raise ValueError(f"'{file}' lacks {missing[0]!r}, it has {', '.join(content) or 'nothing'}")
            arrays: dict[str, Any] = {name: content[name][:] for name in wanted}
    except OSError as error:
        raise ValueError(f"'{file}' is no HDF5 file: {error}") from error
    labels, points = arrays["label"].reshape(-1), [arrays[name] for name in wanted if name != "label"]
    for array in points:
        if array.ndim != 3 or array.shape[2] != 3 or len(array) != len(labels) or array.shape[1] == 0:
            raise ValueError(f"'{file}' has clouds {array.shape} and {len(labels)} labels, expected [n, P, 3] and n")
    return np.concatenate(points, -1), labels.astype(np.int64)
