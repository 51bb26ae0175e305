"""Data-parallel calibration under torch's own launcher: ``torchrun --nproc-per-node N -m vitq quantize ...``.

Every process runs the whole recipe on all images; learning loops share the images of each step and add up their
gradients. What a process decides from numbers that may differ in their last bit elsewhere is taken from the first one
(:func:`same`), and after every step of the recipe so is everything quantized. Outside a launcher every function here
does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")


def size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Of this process, 0 for the first."""
    return distributed.get_rank() if distributed.is_initialized() else 0


@contextmanager
def launched() -> Iterator[torch.device]:
    """Join the processes of torchrun, if it started this one; yields the device that this process computes on."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if cuda:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def same(value: T) -> T:
    """The first process's value (anything that pickles), everywhere."""
    if size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box)
    return box[0]


def share(chosen: Tensor) -> Tensor:
    """This process's part of the images [B] of a step; together they are all of them.

    Raises: ValueError if there is none for some process.
    """
    if len(chosen) < size():
        raise ValueError(f"batch is {len(chosen)}, expected at least one image for each of {size()} processes")
    return chosen[rank() :: size()]


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum over processes, in place; a parameter without a gradient counts as zero."""
    if size() == 1:
        return
    parameters = list(parameters)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in parameters])
    distributed.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = part.reshape(p.shape).to(p.dtype)


def spread(values: Tensor, chosen: Tensor) -> Tensor:
    """[B] values of all of ``chosen``, of which this process has those of its :func:`share`."""
    if size() == 1:
        return values
    out = values.new_zeros(len(chosen))
    out[rank() :: size()] = values
    distributed.all_reduce(out)
    return out
