"""Where a quantized model loses precision: what every layer adds by itself, and what has come together up to it."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from .simulate import SimModel, recording

#: Images that calibration measures with: the figures are of a diagnosis, not of a test set.
IMAGES = 8
#: Softmax histograms: half octaves from 2^−16, which takes all below, to 1.
OCTAVES, BINS = 16, 32
EDGES = [2.0 ** (i / 2 - OCTAVES) for i in range(BINS + 1)]


class _Sqnr:
    """10·log10(Σ reference² / Σ (reference − actual)²) per name, summed up over calls."""

    def __init__(self) -> None:
        self.signal: dict[str, float] = defaultdict(float)
        self.noise: dict[str, float] = defaultdict(float)

    def add(self, name: str, reference: Tensor, actual: Tensor) -> None:
        self.signal[name] += float(reference.double().square().sum())
        self.noise[name] += float((reference.double() - actual.double()).square().sum())

    def db(self, name: str) -> float | None:
        """None where nothing differs, or where the signal is not a positive finite one."""
        signal, noise = self.signal[name], self.noise[name]
        if not (0 < signal < math.inf and 0 < noise < math.inf):
            return None
        return round(10 * math.log10(signal / noise), 2)


@torch.no_grad()
def propagation(reference: SimModel, sim: SimModel, images: Tensor) -> dict[str, Any]:
    """SQNR at the output of every block and layer, and histograms of the probabilities.

    own_db: the layer (or block) quantized alone, on the input that it has in the float model. through_db: its output in
    the quantized model, thus with the errors of everything before it. Both against the output in the float model; None
    where they are equal.

    Args:     reference: the float twin of ``sim``, with the same transforms; images [B, C, H, W], run one by one.
    Returns:  images, units (rows of path, own_db, through_db in execution order), layers (path → own_db, through_db),
              softmax (path of an attention → count and mass: shares of the probabilities, and of their sum, per bin of
              ``EDGES``; relative to the largest of its row where the quantizer is). Plain JSON values.
    """
    own, through = _Sqnr(), _Sqnr()
    units = [site.path for site in sim.sequence]
    watched = list(dict.fromkeys([*units, *sim.linears]))
    histograms = {path: torch.zeros(2, BINS, dtype=torch.float64, device="cpu") for path in sim.attentions}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str, inputs: tuple, output: Tensor) -> None:
        seen[path] = inputs[0].detach(), output.detach()

    def compare(path: str, inputs: tuple, output: Tensor) -> None:
        through.add(path, seen[path][1], output)

    for image in images.split(1):
        with recording({path: reference.model.get_submodule(path) for path in watched}, keep):
            reference(image)
        with recording({path: sim.model.get_submodule(path) for path in watched}, compare):
            sim(image)
        for path in watched:
            own.add(path, seen[path][1], sim.model.get_submodule(path)(seen[path][0]))
        for path, histogram in histograms.items():
            histogram += _histogram(reference, sim, path, seen[sim.attention_sites[path].qkv.path][1])
        seen.clear()
    row = lambda path: {"own_db": own.db(path), "through_db": through.db(path)}  # noqa: E731
    return {
        "images": images.shape[0],
        "units": [{"path": path, **row(path)} for path in units],
        "layers": {path: row(path) for path in sim.linears},
        "softmax": {path: _shares(histogram) for path, histogram in histograms.items()},
    }


def _histogram(reference: SimModel, sim: SimModel, path: str, qkv: Tensor) -> Tensor:
    """[2, BINS]: how many probabilities lie in each bin, and their sum; those that are 0 (excluded keys) in none."""
    mask = sim.family.attention_mask(sim.attention_sites[path])
    p = reference.attentions[path].probabilities(qkv, None if mask is None else mask.to(qkv)).double()
    focus = sim.attentions[path].focus
    if focus is not None and focus.anchor == "row":
        p = p / p.amax(-1, keepdim=True)
    p = p[p > 0].cpu()
    index = (2 * (p.log2() + OCTAVES)).floor().clamp(0, BINS - 1).long()
    return torch.stack([torch.bincount(index, w, BINS) for w in (torch.ones_like(p), p)])


def _shares(histogram: Tensor) -> dict[str, list[float]]:
    shares = histogram / histogram.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return {name: [round(v, 6) for v in row.tolist()] for name, row in zip(("count", "mass"), shares)}
