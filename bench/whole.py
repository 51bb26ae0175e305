"""Whole models and single blocks: ours beside float32 eager and beside what a user would pick instead."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from vitq import checkpoint, export, jobs
from vitq.bench import host
from vitq.bench.latency import tensor_bytes
from vitq.bench.profile import profile
from vitq.convert import to_integer
from vitq.data import load_calibration, load_data
from vitq.evaluate import agreement, sqnr_db
from vitq.models import state_data
from vitq.recipes import load_recipe
from vitq.restore import to_simulated
from vitq.simulate import inputs_of
from vitq.sources import ModelSource, load_float

from .models import MODELS as TRAINED
from .registry import Prepared, benchmark, peers

EAGER = "torch eager fp32"
#: Logits of the integer model against its simulation: the same bits but for torch's own float modules.
GATE_DB = 80.0
CALIBRATION, EVALUATION = 32, 64
STATIC = {"calibration": {"images": CALIBRATION}, "compensate": [], "reconstruct": [], "allocate": []}
#: Of everybody, also where there is no peer: right after another model's call, caches and thread pools are another's.
TURN = 0.15


def _bits(weights: int) -> dict[str, Any]:
    bits = {"weights": weights, "activations": 8, "operands": 8, "softmax": 8}
    return {**STATIC, "bits": bits, "focus": {"anchor": "row", "power": 2.0}}


# Closed forms: latency depends on formats, not on how well they are calibrated.
OURS = {
    "W4A8 static": ("minmax-w4a4", _bits(4)),
    "W8A8 static": ("minmax-w4a4", _bits(8)),
    "vitq-w4a8 (dynamic, rank 16)": ("vitq-w4a8", {}),
    "vitq-w8a8 (dynamic, rank 16)": ("vitq-w8a8", {}),
}
BESIDE_PEERS = ("W4A8 static", "W8A8 static")
#: Timed ahead of time, too, as some peers run: of a small model's time, Python is a large part.
PACKAGED = "W8A8 static"


@dataclass(frozen=True)
class Subject:
    """A model that is timed; with ``data`` (a trained one) it is evaluated on test images, else on noise."""

    source: ModelSource
    data: str | None = None


SUBJECTS = {
    "ViT-S/16": Subject(ModelSource("vit_small_patch16_224", pretrained=False)),
    "DeiT-T/16": Subject(ModelSource("deit_tiny_patch16_224", pretrained=False)),
    "ViT of the bench": Subject(TRAINED["vit"].source, TRAINED["vit"].data),
    "digits": Subject(TRAINED["digits"].source, TRAINED["digits"].data),
}


@cache
def _float(name: str) -> nn.Module:
    with torch.inference_mode(False):  # of tensors that tracers take
        return load_float(SUBJECTS[name].source).requires_grad_(False)


def _noise(model: nn.Module, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *state_data(model)["input_size"], generator=generator)


@cache
def _images(name: str) -> tuple[Tensor, Tensor]:
    """To calibrate with and to evaluate on."""
    subject, model = SUBJECTS[name], _float(name)
    if subject.data is None:
        return _noise(model, CALIBRATION, 0), _noise(model, 16, 1)
    data = load_data(subject.data, "test", model, EVALUATION)
    return load_calibration(subject.data, model, CALIBRATION), next(iter(DataLoader(data, len(data))))[0]


@cache
def _folder() -> Path:
    """What all processes of a run share, so that they time the same models."""
    return Path(os.environ.get("VITQ_BENCH_CACHE") or tempfile.mkdtemp())


@cache
def _states(name: str) -> dict[str, Any]:
    """Label → state."""
    states = {}
    for label, (base, overrides) in OURS.items():
        kept = _folder() / f"{name} {label}".replace("/", "-")
        if not kept.exists():
            recipe, images = load_recipe(base, fast=True, **overrides), _images(name)[0]
            with torch.inference_mode(False):
                done = jobs.quantize(_float(name), SUBJECTS[name].source, recipe, images.clone())
                checkpoint.save(kept, done.state)
        states[label] = checkpoint.load_state(kept)[0]
    return states


@torch.inference_mode()  # with gradients the simulation takes other operators
def _ours(name: str, example: Tensor, beside_peer: bool = False) -> dict[str, nn.Module]:
    """Label → integer model, checked on one image. Raises: AssertionError where one is not its simulation."""
    model, out = _float(name), {}
    for label, state in _states(name).items():
        if beside_peer and label not in BESIDE_PEERS:
            continue
        out[label] = to_integer(model, state)
        found = sqnr_db(to_simulated(model, state)(example[:1]), out[label](example[:1]))
        if not found >= GATE_DB:
            raise AssertionError(f"{label}: logits are within {found:.1f} dB of the simulation, expected {GATE_DB}")
    return out


def _packaged(name: str, model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """``model`` as an AOTInductor package for this batch and number of threads, checked on its images. Raises:
    AssertionError where its logits are others."""
    path = _folder() / f"{name} {PACKAGED} b{len(example)} t{torch.get_num_threads()}.pt2".replace("/", "-")
    if not path.exists():
        with torch.inference_mode(False):
            export.write(model, path, tuple(example.shape[1:]), "aoti", len(example))
    run = torch._inductor.aoti_load_package(str(path))
    found = sqnr_db(model(example), run(example))
    if not found >= GATE_DB:
        raise AssertionError(f"the package: logits are within {found:.1f} dB of the model's, expected {GATE_DB}")
    return run


def _accuracy(reference: Tensor, run, images: Tensor, batch: int) -> dict[str, Any]:
    logits = torch.cat([run(part).float() for part in images.split(batch)])
    found = sqnr_db(reference, logits)
    return {"sqnr_db": found if math.isfinite(found) else None, "agreement": agreement(reference, logits)}


def _case(case: str) -> tuple[str, int]:
    name, _, batch = case.rpartition(" b")
    return name, int(batch)


@benchmark(
    "model",
    [f"{name} b{batch}" for name in SUBJECTS for batch in (1, 8)],
    ["digits b1"],
    peers=True,
)
def model(case: str, peer: str | None) -> Prepared:
    """A whole model at a batch size, everybody's logits beside the float ones."""
    name, batch = _case(case)
    floating, (calibration, images) = _float(name), _images(name)
    images = images[: len(images) // batch * batch]
    reference = torch.cat([floating(part) for part in images.split(batch)])
    example = images[:batch].contiguous()
    ours = _ours(name, example, peer is not None)
    mb = {who: tensor_bytes(run) / 1e6 for who, run in {EAGER: floating, **ours}.items()}
    if PACKAGED in ours:  # before the peer, whose settings of the compiler are its own
        ahead = f"{PACKAGED}, AOTInductor"
        ours[ahead], mb[ahead] = _packaged(name, ours[PACKAGED], example), mb[PACKAGED]
    runs = {EAGER: floating}
    if peer:
        # Some trace or compile: with autograd's own tensors, as outside.
        with torch.inference_mode(False), torch.no_grad():
            runs[peer] = peers[peer].build(floating, calibration.clone(), example.clone(), torch.get_num_threads())
    runs |= ours
    about = {who: _accuracy(reference, run, images, batch) for who, run in runs.items()}
    for who, size in mb.items():
        about[who]["mb"] = size
    calls = {who: lambda run=run: run(example) for who, run in runs.items()}
    return Prepared(calls, about, TURN)


@benchmark(
    "block",
    [f"{name} b{batch}" for name in ("ViT-S/16", "DeiT-T/16") for batch in (1, 8)],
    ["digits b1"],
)
def block(case: str) -> Prepared:
    """The first transformer block on what the float model gives it."""
    name, batch = _case(case)
    floating, images = _float(name), _images(name)[1][:batch]
    x = inputs_of(floating, "blocks.0", images, batch)
    calls = {EAGER: lambda: floating.blocks[0](x)}
    for label, integer in _ours(name, images).items():
        calls[label] = lambda module=integer.blocks[0]: module(x)
    return Prepared(calls)


def profiles(case: str, n_threads: int) -> dict[str, Any]:
    """Label → ``vitq.bench.profile.profile`` of the float model and of the first of ours; "ceilings" says why not."""
    name, batch = _case(case)
    images = _images(name)[1][:batch]
    try:
        ceilings, out = host.measure(n_threads), {}
    except host.Unmeasured as error:
        ceilings, out = None, {"ceilings": str(error)}
    label, integer = next(iter(_ours(name, images).items()))
    for who, model in ((EAGER, _float(name)), (label, integer)):
        out[who] = {"case": case, **profile(model, images, n_threads, ceilings)}
    return out
