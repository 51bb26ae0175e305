"""Single kernels: each result is checked against its oracle, then timed beside what torch has for the same layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import attention_oracle
import test_layer_norm_quantize as layer_norm_oracle
import test_qlinear as linear_oracle
import test_quantize as quantize_oracle
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitq_kernels as vk
from vitq_kernels import backends
from vitq_kernels.formats import ActQuant, FocusSpec, PackedWeight, QTensor

from . import roofline, shapes
from .goals import ALONE, WHOLE
from .machine import Machine
from .roofline import Work
from .shapes import RANK

BF16, F16 = torch.bfloat16, torch.float16
FOCUS = FocusSpec(power=2.0, anchor="row")


@dataclass(frozen=True)
class Variant:
    """One way to compute a layer: ``run`` of its input tensors, and its work if it is one of our kernels."""

    run: Callable[[dict[str, Tensor]], Any]
    inputs: dict[str, Tensor]
    work: Work | None = None
    check: Callable[[Any], None] | None = None

    def run_once(self) -> Any:
        return self.run(self.inputs)


def time_variants(machine: Machine, variants: dict[str, Variant]) -> dict[str, Any]:
    """Checks every variant, then times them. Raises: AssertionError, naming the variant, for a wrong result."""
    for name, variant in variants.items():
        if variant.check is not None:
            try:
                variant.check(variant.run_once())
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
    row: dict[str, Any] = {"ms": {}, "p20": {}, "p80": {}, "of_floor": {}}
    for name, variant in variants.items():
        timing = machine.time(variant.run, variant.inputs)
        row["ms"][name], row["p20"][name], row["p80"][name] = timing.median, timing.p20, timing.p80
        if variant.work is not None:
            row["of_floor"][name] = variant.work.floor(machine.peaks) / timing.median * 1e3
    machine.release()
    return row


def _generator(machine: Machine, seed: int) -> torch.Generator:
    return torch.Generator(device=machine.device).manual_seed(seed)


def product_variants(machine: Machine, m: int, k: int, n: int) -> dict[str, Variant]:
    """A layer of per-token activations in bf16, 8- and 4-bit weights, with and without a rank-32 branch."""
    g, device = _generator(machine, m + k + n), machine.device
    x, bias = torch.randn(m, k, generator=g, device=device).to(BF16), torch.randn(n, generator=g, device=device)
    up = torch.randn(n, RANK, generator=g, device=device).to(F16)
    down = (torch.randn(RANK, k, generator=g, device=device) * k**-0.5).to(F16)
    w_scale = torch.rand(n, generator=g, device=device) * 1e-3 + 1e-4
    coded = vk.quantize(x, ActQuant(lora_down=down))
    weights = {}
    for bits, layout in ((8, "int8"), (4, "int4_k64x2")):
        top = 2 ** (bits - 1)
        codes = torch.randint(-top, top, (n, k), generator=g, device=device, dtype=torch.int8)
        weights[bits] = vk.pack_weight(codes, bits, layout)
    float_weight = torch.randn(n, k, generator=g, device=device).to(BF16) * k**-0.5
    int_weight = torch.randint(-127, 128, (n, k), generator=g, device=device, dtype=torch.int8)
    variants = {
        "bf16": Variant(lambda t: F.linear(t["x"], t["w"], t["b"]), {"x": x, "w": float_weight, "b": bias.to(BF16)}),
    }
    int_mm = Variant(lambda t: torch._int_mm(t["x"], t["w"].T), {"x": coded.q, "w": int_weight})
    try:
        int_mm.run_once()
        variants["_int_mm"] = int_mm
    except RuntimeError:  # it does not take every shape
        pass
    for bits, weight in weights.items():
        for rank in (0, RANK):
            name = f"w{bits}" + (f" rank {RANK}" if rank else "")
            for backend in served():
                arguments = coded, weight, w_scale, bias, up if rank else None
                variants[name + SUFFIX[backend]] = product(*arguments, backend)
    variants[WHOLE] = _whole(x, down, weights[8], w_scale, bias, up)
    return variants


def _layer(
    weight: PackedWeight, w_scale: Tensor, bias: Tensor, up: Tensor | None
) -> tuple[dict[str, Tensor], Callable]:
    """Tensors of a layer, and the layer of such tensors."""
    tensors = {"w": weight.data, "sum": weight.col_sum, "s": w_scale, "b": bias}
    if up is not None:
        tensors["up"] = up

    def run(x: QTensor, t: dict[str, Tensor]) -> Tensor:
        packed = replace(weight, data=t["w"], col_sum=t["sum"])
        return vk.qlinear(x, packed, t["s"], t["b"], lora_up=t.get("up"), out_dtype=BF16)

    return tensors, run


def _check_product(x: QTensor, weight: PackedWeight, w_scale: Tensor, bias: Tensor, up: Tensor | None) -> Callable:
    kw = {"activation": "none", "bias": bias} | ({} if up is None else {"lora_up": up})
    if up is not None:
        x = replace(x, t=x.t.to(up.dtype).float())  # Triton's branch multiplies in the dtype of lora_up

    def check(got: Tensor) -> None:
        y, bound = linear_oracle.exact_qlinear(x, weight, w_scale, kw)
        linear_oracle.assert_within(got, y, linear_oracle.round_to(y, bound, got.dtype))

    return check


SUFFIX = {"triton": "", "cuda": " cuda"}


def served() -> list[str]:
    """The back ends that are timed beside one another: the C++ kernels only where they were built."""
    return ["triton"] + ["cuda"] * (backends.status()["cuda"] is None)


def product(
    x: QTensor, weight: PackedWeight, w_scale: Tensor, bias: Tensor, up: Tensor | None, backend: str = "triton"
) -> Variant:
    tensors, layer = _layer(weight, w_scale, bias, up)
    tensors |= {"q": x.q, "scale": x.scale} | ({} if up is None else {"t": x.t})
    m, k = x.q.shape
    work = roofline.linear(m, weight.n, k, 0 if up is None else RANK, bits=weight.bits)
    check = _check_product(x, weight, w_scale, bias, up)

    def run(t: dict[str, Tensor]) -> Tensor:
        with vk.backend(backend):
            return layer(QTensor(t["q"], t["scale"], 0, t.get("t")), t)

    return Variant(run, tensors, work, check)


def _whole(x: Tensor, down: Tensor, weight: PackedWeight, w_scale: Tensor, bias: Tensor, up: Tensor) -> Variant:
    """The product behind the launch that quantizes its input and computes t."""
    tensors, layer = _layer(weight, w_scale, bias, up)
    m, k = x.shape
    work = roofline.quantize(m, k, RANK) + roofline.linear(m, weight.n, k, RANK)
    quantized = vk.quantize(x, ActQuant(lora_down=down))
    check = _check_product(quantized, weight, w_scale, bias, up)

    def run(t: dict[str, Tensor]) -> Tensor:
        return layer(vk.quantize(t["x"], ActQuant(lora_down=t["down"])), t)

    return Variant(run, {**tensors, "x": x, "down": down}, work, check)


def products(machine: Machine) -> Iterator[dict[str, Any]]:
    """One row per (M, K, N); ``kernels``: what torch launched for bf16, then for ``_int_mm``."""
    for m, k, n in shapes.products(machine.dry):
        variants = product_variants(machine, m, k, n)
        with _named(f"product of M={m}, K={k}, N={n}"):
            row = time_variants(machine, variants)
        names = machine.kernels([variants[x] for x in ("bf16", "_int_mm") if x in variants])
        tops = 2e-9 * m * k * n / row["ms"][ALONE]
        yield {"M": m, "K": k, "N": n, **row, "kernels": names, "tops": tops}


def row_variants(machine: Machine, m: int, k: int) -> dict[str, Variant]:
    """The quantizing passes over bf16 rows."""
    g, device = _generator(machine, m + k), machine.device
    x = torch.randn(m, k, generator=g, device=device).to(BF16)
    gamma, beta = torch.randn(2, k, generator=g, device=device).unbind(0)
    down = (torch.randn(RANK, k, generator=g, device=device) * k**-0.5).to(F16)
    scale = torch.tensor([0.03], device=device)
    plain, with_t = {"x": x}, {"x": x, "d": down, "g": gamma, "b": beta}

    def norm(t: dict[str, Tensor], a: ActQuant) -> QTensor:
        return vk.layer_norm_quantize(t["x"], t["g"], t["b"], 1e-6, a)

    def checked(check: Callable, *arguments) -> Callable:
        return lambda _: check(*arguments)

    a, s, d = ActQuant(), ActQuant(scale=scale), ActQuant(lora_down=down)
    return {
        "quantize": Variant(
            lambda t: vk.quantize(t["x"], a), plain, roofline.quantize(m, k), checked(quantize_oracle.check, x, a)
        ),
        "quantize, t": Variant(
            lambda t: vk.quantize(t["x"], ActQuant(lora_down=t["d"])), {"x": x, "d": down},
            roofline.quantize(m, k, RANK), _check_codes_and_t(x, d),
        ),
        "LayerNorm + quantize, static": Variant(
            lambda t: norm(t, s), {k: t for k, t in with_t.items() if k != "d"},
            roofline.quantize(m, k, dynamic=False, norm=True),
            checked(layer_norm_oracle.check, x, gamma, beta, s, "triton"),
        ),
        "LayerNorm + quantize, t": Variant(
            lambda t: norm(t, ActQuant(lora_down=t["d"])), with_t, roofline.quantize(m, k, RANK, norm=True)
        ),
        "LayerNorm in bf16": Variant(
            lambda t: F.layer_norm(t["x"], (k,), t["g"], t["b"]),
            {"x": x, "g": gamma.to(BF16), "b": beta.to(BF16)},
        ),
    }  # fmt: skip


def _check_codes_and_t(x: Tensor, a: ActQuant) -> Callable:
    """As the tests' checker, for a lora_down in 16 bits: t is within the rounding of x to that dtype."""

    def check(got: QTensor) -> None:
        plain = vk.quantize(x, replace(a, lora_down=None))
        quantize_oracle.check(x, replace(a, lora_down=None))
        if not torch.equal(got.q, plain.q):
            at = tuple((got.q != plain.q).nonzero()[0].tolist())
            raise AssertionError(f"codes with t differ from those without; first at {at}")
        rounded = x.to(a.lora_down.dtype).double()
        t = rounded @ a.lora_down.double().T
        terms = rounded.abs() @ a.lora_down.double().abs().T
        linear_oracle.assert_within(got.t, t, linear_oracle.gamma(x.shape[1] + 1) * terms, "t")

    return check


def rows(machine: Machine) -> Iterator[dict[str, Any]]:
    """One row per (M, K): achieved bandwidth of the quantizing passes."""
    for m, k in shapes.rows(machine.dry):
        variants = row_variants(machine, m, k)
        with _named(f"rows of M={m}, K={k}"):
            row = time_variants(machine, variants)
        row["gb_per_s"] = {x: v.work.bytes / row["ms"][x] * 1e-6 for x, v in variants.items() if v.work is not None}
        yield {"M": m, "K": k, **row}


def attention_missing() -> str | None:
    return None if "triton" in backends.table()["qattention"] else "triton has no qattention"


def _additive(machine: Machine, h: int, n: int, groups: int) -> tuple[Tensor | None, Tensor | None]:
    """A relative bias and the masks of ``groups`` windows, or neither."""
    if not groups:
        return None, None
    g, device = _generator(machine, h), machine.device
    mask = torch.where(torch.rand(groups, n, n, generator=g, device=device) < 0.8, 0.0, -100.0)
    return torch.randn(h, n, n, generator=g, device=device), mask


def attention(machine: Machine, b: int, h: int, n: int, d: int, groups: int) -> Variant:
    """Integer attention over views of a fused QKV result."""
    device, (bias, mask) = machine.device, _additive(machine, h, n, groups)
    g = _generator(machine, n)
    codes = torch.randint(-127, 128, (b, n, 3, h, d), generator=g, device=device, dtype=torch.int8)
    scale = torch.full((1,), 1.5 / 73, device=device)
    rest = {"bias": bias, "mask": mask}

    def run(t: dict[str, Tensor]) -> Tensor:
        q, k, v = t["codes"].permute(2, 0, 3, 1, 4).unbind(0)
        return vk.qattention(q, k, v, scale, scale, scale, focus=FOCUS, out_dtype=BF16, **rest)

    def check(got: Tensor) -> None:
        q, k, v = codes[: groups or 1].permute(2, 0, 3, 1, 4).unbind(0)
        part = got[: groups or 1]
        oracle = (q, k, v, scale, scale, scale, FOCUS, d**-0.5)
        attention_oracle.assert_attention(part, *oracle, **rest, out_unit=2.0**-8, vacuous=1.0)
        if not torch.equal(part, run({"codes": codes[: groups or 1]})):
            raise AssertionError("image 0 alone and within its batch differ")

    work = roofline.attention(b, h, n, d, bias=bias is not None, mask=groups)
    return Variant(run, {"codes": codes}, work, check)


def attention_variants(machine: Machine, b: int, h: int, n: int, d: int, groups: int) -> dict[str, Variant]:
    """Integer attention, and every SDPA back end that takes the shape."""
    bias, mask = _additive(machine, h, n, groups)
    fused = torch.randn(b, n, 3, h, d, generator=_generator(machine, n), device=machine.device)
    variants = {"int8": attention(machine, b, h, n, d, groups)}
    added = None if bias is None else (bias + mask.repeat(b // groups, 1, 1).unsqueeze(1)).to(BF16)

    def sdpa(t: dict[str, Tensor], backend: SDPBackend) -> Tensor:
        q, k, v = t["qkv"].permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=added)

    for backend in _sdpa_backends():
        inputs = {"qkv": fused.to(BF16)}
        try:
            sdpa(inputs, backend)
        except RuntimeError:  # this back end does not take the shape or the mask
            continue
        variants[f"sdpa {backend.name.lower()}"] = Variant(lambda t, backend=backend: sdpa(t, backend), inputs)
    return variants


def _sdpa_backends() -> list[SDPBackend]:
    return [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attentions(machine: Machine) -> Iterator[dict[str, Any]]:
    """One row per shape; "sdpa" is the fastest back end of scaled_dot_product_attention."""
    for b, h, n, d, groups in shapes.attentions(machine.dry):
        with _named(f"attention of B={b}, H={h}, N={n}, d={d}"):
            row = time_variants(machine, attention_variants(machine, b, h, n, d, groups))
        row["ms"]["sdpa"] = min(ms for name, ms in row["ms"].items() if name.startswith("sdpa"))
        yield {"B": b, "H": h, "N": n, "d": d, **row}


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Puts ``what`` in front of an AssertionError's message."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}, {error}") from error
