"""Where a model is to run."""

from __future__ import annotations

import torch


def checked(device: torch.device | str, name: str = "device") -> torch.device:
    """``device`` as torch names it. Raises: ValueError, of an argument ``name``, for a GPU that is not there."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{name} is {str(device)!r}, expected cpu, cuda or cuda:<index>") from error
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ValueError(f"{name} is {str(device)!r}, expected cpu or one of {count} CUDA devices")
    return found
