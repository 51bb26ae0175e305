"""refine.bias_correction: what quantization shifts on average, the bias takes back.

Nagel et al. 2019 (arXiv 1906.04721), its empirical form: the mean output of every channel is made that of the float
model, layer after layer, each seeing what the corrected layers before it do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.sites import BlockSite
from ..simulate import SimModel, recording
from .base import Calibration, Options, Unit, method


class BiasOptions(Options):
    """No options."""


@method("refine", "bias_correction")
def bias_correction(calibration: Calibration, options: BiasOptions) -> None:
    blocks = [unit for unit in calibration.sim.sequence if isinstance(unit, BlockSite)]
    for unit, x_ref, x_sim in calibration.units(blocks):
        for path, linear in calibration.sim.linears_of(unit).items():
            if linear.bias is not None:
                wanted = mean_output(calibration, calibration.reference, unit, path, x_ref)
                linear.bias.data += wanted - mean_output(calibration, calibration.sim, unit, path, x_sim)


def mean_output(calibration: Calibration, model: SimModel, unit: Unit, path: str, x: Tensor) -> Tensor:
    """[N] over all images and tokens, of the layer at ``path`` when its block sees x."""
    means: list[Tensor] = []
    counts: list[int] = []

    def record(_: str, inputs: tuple, output: Tensor) -> None:
        means.append(output.flatten(0, -2).mean(0))
        counts.append(len(output))

    with recording({path: model.linears[path]}, record):
        calibration.run(model, unit, x)
    return torch.stack(means).T @ means[0].new_tensor(counts) / sum(counts)
