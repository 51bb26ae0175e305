"""Detectors: Mask R-CNN and Cascade Mask R-CNN on timm backbones, registered with timm by being imported."""

from . import registry
from .family import DetectionFamily
from .rcnn import Detector, padded_detections

__all__ = ["DetectionFamily", "Detector", "padded_detections", "registry"]
