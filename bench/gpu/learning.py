"""What calibration spends its time on: quantizers with their derivatives beside torch's operators, and whole steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import test_learning as oracle
import torch
from torch import Tensor

from vitq_kernels.formats import FocusSpec
from vitq_kernels.ops import learning
from vitq_kernels.testing import assert_within

from .machine import Machine
from .ops import Variant, named, time_variants
from .roofline import Work
from .shapes import PRECISIONS, learned

RECIPE = "aiqvit-w4a4"
FOCUS = FocusSpec(4, 0.01, 0.3)
OURS = "ours"


def quantizer(machine: Machine, m: int, k: int) -> dict[str, Variant]:
    """A static 4-bit quantizer of [M, K] and its derivative, as they are learned."""
    g, device = torch.Generator(device=machine.device).manual_seed(m + k), machine.device
    x, upstream = (torch.randn(m, k, generator=g, device=device) for _ in range(2))
    inputs = {"x": x, "upstream": upstream, "scale": torch.full((1,), 0.3, device=device)}

    def ours(x: Tensor, scale: Tensor) -> Tensor:
        return learning.fake_quantize(x, scale, None, -7, 7)

    def composed(x: Tensor, scale: Tensor) -> Tensor:
        within = (x / scale).clamp(-7.0, 7.0)
        return (within + (within.round() - within).detach()) * scale

    def check(got: tuple[Tensor, ...]) -> None:
        wide = [v.double().requires_grad_() for v in (x, inputs["scale"])]
        bounds = (x.new_tensor(v, dtype=torch.float64) for v in (0.0, -7.0, 7.0))
        with torch.enable_grad():
            want = oracle.defined_fake_quantize(*wide, *bounds, None, torch.tensor(True, device=device))
            gradients = oracle.gradients(want, upstream.double(), *wide)
        for name, actual, exact in zip(("values", "gradient", "scale's gradient"), got, (want.detach(), *gradients)):
            _expect(actual, exact, 1e-4, name)

    work = Work(bytes=(2 + 3) * 4 * m * k)
    return {"torch": _forth_and_back(composed, inputs), OURS: replace(_forth_and_back(ours, inputs, work), check=check)}


def softmax(machine: Machine, b: int, h: int, n: int) -> dict[str, Variant]:
    """The softmax of scores [B, H, N, N], its quantizer of a fixed interval and their derivative, beside a softmax."""
    g, device = torch.Generator(device=machine.device).manual_seed(n), machine.device
    scores, upstream = (torch.randn(b, h, n, n, generator=g, device=device) for _ in range(2))
    interval = [torch.tensor(v, dtype=torch.float64) for v in (FOCUS.b1, FOCUS.b2)]

    def ours(scores: Tensor) -> Tensor:
        return learning.focused_softmax(scores, *interval, FOCUS)[0]

    def check(got: tuple[Tensor, ...]) -> None:
        head = scores[:1, :1].cpu()
        wide = head.double().flatten(0, 2).requires_grad_()
        with torch.enable_grad():
            want, _ = oracle.defined_focused_softmax(wide, *interval, FOCUS, torch.tensor(True))
            level, gradient = (v[:1, :1].cpu().double().flatten(0, 2) for v in got)
            # A float32 position beside a tie takes the other code.
            rows = ((level - want).abs() < 0.5).all(1)
            (expected,) = oracle.gradients(want, upstream[:1, :1].cpu().double().flatten(0, 2), wide)
        if int((~rows).sum()) > 1 + len(rows) // 50:
            at = int((~rows).nonzero()[0])
            raise AssertionError(f"levels of {int((~rows).sum())} of {len(rows)} rows are wrong; first in row {at}")
        _expect(gradient[rows], expected[rows], 2e-4, "gradient")

    inputs = {"x": scores, "upstream": upstream}
    work = Work(bytes=(3 + 3) * 4 * scores.numel(), exp2=scores.numel())
    return {
        "torch": _forth_and_back(lambda x: x.softmax(-1), inputs),
        OURS: replace(_forth_and_back(ours, inputs, work), check=check),
    }


def _expect(actual: Tensor, exact: Tensor, error: float, name: str) -> None:
    """``error``: relative to the largest, because sums of many terms are compared."""
    assert_within(actual, exact, error * float(exact.abs().max() + 1e-6), name)


def _forth_and_back(fn, inputs: dict[str, Tensor], work: Work | None = None) -> Variant:
    """``fn`` of all inputs but "upstream", and its gradients: (y, of each of them)."""

    def run(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [v.detach().requires_grad_() for name, v in t.items() if name != "upstream"]
            y = fn(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, t["upstream"])

    return Variant(run, inputs, work)


def rows(machine: Machine) -> Iterator[dict[str, Any]]:
    """One row per quantizer and shape."""
    for what, make in (("quantizer", quantizer), ("softmax", softmax)):
        for shape in learned(machine.dry)[what]:
            with named(f"learned {what} of {shape}"):
                row = time_variants(machine, make(machine, *shape), ["triton"])
            yield {"what": what, "shape": "x".join(map(str, shape)), **row}


def steps(machine: Machine) -> Iterator[dict[str, Any]]:
    """A row per precision of learning: milliseconds of a step by method, measured and as ``bench.calibration_cost``
    estimates them, and the minutes that a ViT-S of 12 blocks takes."""
    # Recipes need pydantic, which nothing else of the check does.
    from vitq.recipes import load_recipe, parse

    from bench.calibration_cost import measure

    for precision in PRECISIONS:
        recipe = load_recipe(RECIPE).plain() | {"learning": precision}
        architecture, lengths, images, kwargs = "vit_small_patch16_224", (1, 33), 48, {}
        if machine.dry:
            lengths, images, kwargs = (1, 2), 2, {"img_size": 16, "patch_size": 8, "embed_dim": 32, "num_heads": 1}
            for stage in ("allocate", "reconstruct"):
                recipe[stage] = [step | {"batch": images} for step in recipe[stage]]
        with torch.enable_grad():
            found = measure(architecture, parse(recipe), lengths, machine.device, images, **kwargs)["rows"]
        machine.release()
        yield {
            "recipe": RECIPE,
            "learning": precision,
            "ms": {row["method"]: row["here_ms"] for row in found},
            "estimated_ms": {row["method"]: row[f"h200_ms_{precision}"] for row in found},
            "steps": {row["method"]: row["steps"] for row in found},
            "minutes": sum(row["here_ms"] * row["steps"] for row in found) / 6e4,
        }
