"""Whole converted models with random weights: checked against their simulation and ``ref``, timed beside bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import minmax
import timm
import torch
from torch import Tensor, nn
from vitq.bench.latency import tensor_bytes
from vitq.convert import to_integer
from vitq.restore import to_simulated
from vitq.state import ModelState

from vitq_kernels import backend
from vitq_kernels.formats import AttentionState, FocusSpec, LinearState, LowRankSpec, QuantSpec

from . import ops, shapes
from .machine import Machine
from .shapes import RANK

FOCUS = FocusSpec(power=2.0, anchor="row")
LEAST_DB = {"simulated": 25.0, "ref": 18.0}
"""Of logits: sums are taken in another order than in the simulation's stages, and codes beside a tie differ by one;
``ref`` multiplies its branches in float32 besides. Tests hold the C++ back end and ``ref`` to the same 18 dB."""
"""Least SQNR between a simulated model whose float stages round otherwise and the integer one: what codes at ties cost
lies far below what a wrong scale, a lost bias or a transposed head does."""
LABELS = {"int8 W8A8 static": (8, False), "int8 W4A8 dynamic": (4, True)}
"""Timed formats: (weight bits, per-token dynamic scales), each with a rank-32 branch."""


def build(machine: Machine, name: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **kwargs).eval().requires_grad_(False)
    return model.to(machine.device, dtype)


def images_of(machine: Machine, model: nn.Module, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    size = model.patch_embed.img_size
    g = torch.Generator(device=machine.device).manual_seed(n)
    return torch.randn(n, 3, *size, generator=g, device=machine.device).to(dtype)


def _with_branch(state: LinearState, rank: int, kind: str) -> LinearState:
    """``state`` with small random factors: what a branch costs does not depend on what it corrects."""
    n, k = state.codes.shape
    if rank > min(n, k):
        return state
    g = torch.Generator(device=state.codes.device).manual_seed(n)
    device = state.codes.device
    down = torch.randn(rank, k, generator=g, device=device) * k**-0.5
    if kind == "subspace":
        down = torch.linalg.qr(down.T)[0].T.contiguous()
    up = torch.randn(n, rank, generator=g, device=device) * 1e-3
    lora = LowRankSpec(rank, kind)
    return replace(state, lora=lora, lora_down=down.half(), lora_up=up.half())


def random_state(model: nn.Module, images: Tensor, bits: int, dynamic: bool, rank: int, kind: str) -> ModelState:
    """Ranges of ``images``, round-to-nearest weights, a branch of random factors in every block."""
    act = QuantSpec(8, granularity="per_token", dynamic=True) if dynamic else QuantSpec(8)
    operands = QuantSpec(8, granularity="per_token", dynamic=True) if dynamic else QuantSpec(8, granularity="per_head")
    weight = QuantSpec(bits, granularity="per_channel")
    state = minmax.minmax_state(model, images, weight=weight, act=act, operands=operands, focus=FOCUS)
    if not rank:
        return state
    sites = dict(state.sites)
    for path, site in sites.items():
        if isinstance(site, AttentionState):
            branches = {part: _with_branch(getattr(site, part), rank, kind) for part in ("qkv", "proj")}
            sites[path] = replace(site, **branches)
        elif ".mlp." in path:
            sites[path] = _with_branch(site, rank, kind)
    return replace(state, sites=sites)


def sqnr_db(reference: Tensor, got: Tensor) -> float:
    error = (got.double() - reference.double()).square().sum()
    return float("inf") if error == 0 else float(10 * torch.log10(reference.double().square().sum() / error))


def small_models(dry: bool) -> list[tuple[str, Callable[[], nn.Module]]]:
    """The architectures that parity is checked on: every kind of block, few of them."""
    if dry:
        return [("ViT", lambda: minmax.vit(depth=1))]
    deep = {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 3, "num_heads": 6, "num_classes": 100}
    return [
        ("ViT", lambda: minmax.vit(**deep, mlp_ratio=4)),
        ("ViT with LayerScale", lambda: minmax.vit(**deep, init_values=0.5, mlp_ratio=4)),
        ("Swin", lambda: minmax.swin(img_size=(112, 112), embed_dim=64, window_size=7)),
    ]


def parity(machine: Machine) -> Iterator[dict[str, Any]]:
    """Integer logits against the simulation and against the ``ref`` back end.

    Raises: AssertionError with the first differing logit where they are less alike than ``LEAST_DB``.
    """
    recipes = [(8, False, 0, "error"), (8, True, 8, "subspace"), (4, True, 8, "error")]
    for architecture, make in small_models(machine.dry):
        model = make().to(machine.device)
        images = images_of(machine, model, 1 if machine.dry else 4)
        for bits, dynamic, rank, kind in recipes[:1] if machine.dry else recipes:
            branch = f" rank {rank} {kind}" if rank else ""
            label = f"{architecture} W{bits} {'dynamic' if dynamic else 'static'}{branch}"
            state = random_state(model, images, bits, dynamic, rank, kind)
            with torch.no_grad():
                with backend("triton"):
                    simulated = to_simulated(model, state)(images)
                with backend("ref"):
                    reference = to_integer(model, state, "ref")(images)
                for name in ops.served(machine):
                    logits = to_integer(model, state, name)(images)
                    yield _compared(label + ops.SUFFIX[name], logits, {"simulated": simulated, "ref": reference})


def _compared(label: str, logits: Tensor, others: dict[str, Tensor]) -> dict[str, Any]:
    row: dict[str, Any] = {"model": label}
    for against, other in others.items():
        row[f"db_{against}"] = db = sqnr_db(other, logits)
        row[f"same_bits_as_{against}"] = torch.equal(other, logits)
        row[f"top1_as_{against}"] = float((logits.argmax(-1) == other.argmax(-1)).double().mean())
        if not db >= LEAST_DB[against]:  # NaN, too
            raise AssertionError(f"{label} against {against}: {db:.1f} dB, expected at least {LEAST_DB[against]:g}; "
                                 f"{first_difference(other, logits)}")  # fmt: skip
    return row


def first_difference(want: Tensor, got: Tensor) -> str:
    at = tuple((want != got).nonzero()[0].tolist())
    return f"first differing logit at {at}: {got[at].item():.9g}, expected {want[at].item():.9g}"


def compiled(model: nn.Module) -> nn.Module:
    """Compiled anew for every batch size: what is compared with is the best that torch.compile does for it."""
    return torch.compile(model, dynamic=False)


def timed(machine: Machine, name: str, architecture: str, kwargs: dict, batches: tuple[int, ...]) -> Iterator[dict]:
    """One row per batch: bf16 eager and compiled, and the integer formats, all as CUDA graphs, with their memory."""
    half = torch.bfloat16
    model = build(machine, architecture, **kwargs)
    calibration = images_of(machine, model, 2)
    integers: dict[str, nn.Module] = {}
    for label, (bits, dynamic) in LABELS.items():
        state = random_state(model, calibration, bits, dynamic, RANK, "error")
        for which in ops.served(machine):
            integers[label + ops.SUFFIX[which]] = to_integer(model, state, which).to(half)
    floats = model.to(half)
    rivals = {"bf16": floats, **integers, "bf16 compiled": compiled(floats)}
    for batch in batches:
        row: dict[str, Any] = {"model": name, "batch": batch, "ms": {}, "p20": {}, "p80": {}, "memory_mb": {}}
        row["missing"] = []
        images = images_of(machine, floats, batch, half)
        for label, rival in rivals.items():
            if label == "bf16 compiled" and (reason := _does_not_compile(machine, rival, images)):
                row["missing"].append(f"{label}: {reason}")
                continue
            with torch.no_grad():
                rival(images)
                with machine.peak_memory() as peak:
                    timing = machine.time(lambda t, rival=rival: rival(t["x"]), {"x": images}, sets=1, seconds=0.25)
            row["ms"][label], row["p20"][label], row["p80"][label] = timing.median, timing.p20, timing.p80
            row["memory_mb"][label] = {"weights": tensor_bytes(rival) / 1e6, "peak": peak.megabytes}
        yield row


def _does_not_compile(machine: Machine, rival: nn.Module, images: Tensor) -> str | None:
    """Why what we compare with is not there: no fault of the kernels, and no reason to stop."""
    if machine.dry:
        return "not compiled in a dry run"
    try:
        with torch.no_grad():
            rival(images)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def plan(dry: bool) -> list[tuple[str, str, dict, tuple[int, ...]]]:
    """What is timed, in order: batch sizes with goals for every model first."""
    if dry:
        return [(name, architecture, kwargs, (1,)) for name, (architecture, kwargs) in shapes.TINY.items()]
    first, rest = shapes.BATCHES[:2], shapes.BATCHES[2:]
    models = [(name, architecture, {}) for name, architecture in shapes.MODELS.items()]
    return [(*model, first) for model in models] + [(*model, rest) for model in models]
