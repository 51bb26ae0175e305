"""Calibration, conversion and deployment of quantized vision transformers."""

__version__ = "0.1.0"

_CHECKPOINT = ("CheckpointError", "load", "save")


def __getattr__(name: str):
    # Importing timm takes seconds: only those who load or save pay for it.
    if name in _CHECKPOINT:
        from . import checkpoint

        return getattr(checkpoint, name)
    if name == "Engine":
        from .serving.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
