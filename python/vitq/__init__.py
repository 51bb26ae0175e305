"""Calibration, conversion and deployment of quantized vision transformers."""

__version__ = "0.1.0"
