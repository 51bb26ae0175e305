"""The integer model as one file: a ``torch.export`` program, or an AOTInductor package of compiled code.

Whoever loads one needs torch and ``import vitq_kernels`` (the operators), neither timm nor vitq.
"""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from .data.coco import is_detector
from .files import naming

FORMATS = ("exported", "aoti")
SUFFIX = ".pt2"


def check_graph(model: nn.Module) -> None:
    """Raises ValueError for a model that no graph describes."""
    if is_detector(model):
        raise ValueError(
            f"model is a {type(model).__name__}: regions and boxes depend on the image, so there is no graph of it; "
            "expected a model of one output, such as its backbone.body"
        )


def to_program(model: nn.Module, size: tuple[int, ...], batch: int | None = None) -> ExportedProgram:
    """``model`` as a graph of operators, on its own device and in its own dtype.

    Args: size: (C, H, W) of an image, (N, C) of a cloud; batch: None makes the batch size an input's property, as it is
    in eager mode.
    Raises: ValueError for a detector, whose number of boxes no graph knows beforehand.
    """
    check_graph(model)
    parameter = next(p for p in model.parameters())
    # Two images: tracers take a batch of one for a constant.
    x = torch.zeros(batch or 2, *size, dtype=parameter.dtype, device=parameter.device)
    shapes = None if batch else ({0: Dim("batch")},)
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)


def check_target(path: Path, suffix: str, overwrite: bool) -> None:
    """Raises ValueError unless a file may be written at ``path``, which has to end in ``suffix``."""
    if path.suffix != suffix:
        raise ValueError(f"'{path}' ends in {path.suffix!r}, expected {suffix}")
    if path.is_dir():
        raise ValueError(f"'{path}' is a folder, expected a file")
    if path.exists() and not overwrite:
        raise ValueError(f"'{path}' exists already, expected a new file (or overwrite)")


def write(
    model: nn.Module,
    path: str | os.PathLike,
    size: tuple[int, ...],
    format: str = "exported",
    batch: int | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write ``model`` to ``path``, atomically: what is there stays whole until the new file is.

    Args:   model: in eval mode, in the dtype and on the device it is to run; size, batch: as :func:`to_program`.
            format: "exported" (read by ``torch.export.load``, any machine) or "aoti" (read by
            ``torch._inductor.aoti_load_package``, machines like this one, of which it needs the C++ compiler).
    Raises: ValueError: a path or format that may not be written, a compiler that fails.
            OSError: the file system's own complaint.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
    check_target(path, SUFFIX, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    program = to_program(model, size, batch)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        file = Path(folder) / path.name
        if format == "exported":
            # Into memory first: torch's own writer ends the process where a disk is full.
            content = io.BytesIO()
            torch.export.save(program, content)
            with naming(path):
                file.write_bytes(content.getbuffer())
        else:
            _compile(program, file)
        os.replace(file, path)


def _compile(program: ExportedProgram, file: Path) -> None:
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    except RuntimeError as error:
        raise ValueError(f"AOTInductor fails: {' '.join(str(error).split())[:300]}") from error
