"""Files written whole or not at all; whatever stops the writing is an OSError that names the file."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """OSErrors that name no file, such as a full disk's, name ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A new file beside ``path``, which takes its place when all went well and is removed otherwise.

    Raises: OSError naming ``path``.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        with naming(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Other processes and threads that want to be alone in ``folder`` wait; where a file system has no locks, they do
    not."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_text(path: str | os.PathLike, text: str) -> None:
    """``text`` in UTF-8 at ``path``; what was there stays whole until all of it is written.

    Raises: OSError naming ``path``.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the mode that the umask gives a new file.

    Raises: OSError naming ``path``.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        # The library words the operating system's complaint and keeps no number of it.
        raise OSError(f"{path} cannot be written: {' '.join(str(error).split())}") from error
    set_mode(path)  # it makes the file its owner's alone


def temporary_beside(path: Path) -> Path:
    """A new empty file in the folder of ``path``, with the mode that the umask gives."""
    handle, name = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    os.close(handle)
    set_mode(Path(name))
    return Path(name)


def set_mode(path: Path) -> None:
    """The mode of a file that ``open`` had made."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
