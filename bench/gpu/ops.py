"""Single kernels on every back end: each result is checked against its oracle, then timed beside what torch has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import attention_oracle
import test_layer_norm_quantize as layer_norm_oracle
import test_qlinear as linear_oracle
import torch
import torch.nn.functional as F
from rows_oracle import assert_quantized
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitq_kernels as vk
from vitq_kernels import backends
from vitq_kernels.formats import ActQuant, FocusSpec, PackedWeight, QTensor
from vitq_kernels.ops._schema import Epilogue
from vitq_kernels.ops.qlinear import PreparedLinear

from . import roofline, shapes
from .goals import ALONE, SUFFIX, WHOLE
from .machine import Machine
from .roofline import Work
from .shapes import RANK

BF16, F16 = torch.bfloat16, torch.float16
FOCUS = FocusSpec(power=2.0, anchor="row")
EPS = 1e-6


@dataclass(frozen=True)
class Variant:
    """One way to compute a layer.

    Args: run: of its input tensors.
          work: of our kernels, which run on every back end that serves; None for what torch has.
          call: op, weight layout and sizes as ``backends.resolve`` takes them; None for several launches.
          timed: False where only the result matters.
    """

    run: Callable[[dict[str, Tensor]], Any]
    inputs: dict[str, Tensor]
    work: Work | None = None
    check: Callable[[Any], None] | None = None
    call: tuple[str, str, tuple[int, ...]] | None = None
    timed: bool = True

    def run_once(self) -> Any:
        return self.run(self.inputs)


def served(machine: Machine) -> list[str]:
    """The back ends that are checked and timed beside one another: the C++ kernels only where they were built."""
    cuda = backends.table()["qlinear"]["cuda"]
    return ["triton"] + ["cuda"] * (cuda.unavailable(machine.device.type) is None)


def on_back_ends(machine: Machine, variants: dict[str, Variant], names: list[str] | None = None) -> dict[str, Variant]:
    """Those of torch once, ours by every back end (default: all that serve), under their names and ``SUFFIX``."""
    found = {}
    for name, variant in variants.items():
        if variant.work is None:
            found[name] = variant
            continue
        for backend in served(machine) if names is None else names:
            check = None if variant.check is None else _pinned(variant.check, backend)
            found[name + SUFFIX[backend]] = replace(variant, run=_pinned(variant.run, backend), check=check)
    return found


def _pinned(fn: Callable, backend: str) -> Callable:
    def call(argument):
        with vk.backend(backend):
            return fn(argument)

    return call


def check(variants: dict[str, Variant]) -> Iterator[str]:
    """Names, as their results are found right. Raises: AssertionError, naming the variant, for a wrong one."""
    for name, variant in variants.items():
        if variant.check is not None:
            try:
                variant.check(variant.run_once())
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
            yield name


def time_variants(machine: Machine, variants: dict[str, Variant], names: list[str] | None = None) -> dict[str, Any]:
    """Checks every variant on every back end, or those named, then times them; ``calls``: what a figure is about."""
    variants = on_back_ends(machine, variants, names)
    for _ in check(variants):
        pass
    row: dict[str, Any] = {"ms": {}, "p20": {}, "p80": {}, "of_floor": {}, "calls": {}}
    for name, variant in variants.items():
        if not variant.timed:
            continue
        timing = machine.time(variant.run, variant.inputs)
        row["ms"][name], row["p20"][name], row["p80"][name] = timing.median, timing.p20, timing.p80
        if variant.work is not None:
            row["of_floor"][name] = variant.work.floor(machine.peaks) / timing.median * 1e3
        if variant.call is not None:
            row["calls"][name] = variant.call
    machine.release()
    return row


def _generator(machine: Machine, seed: int) -> torch.Generator:
    return torch.Generator(device=machine.device).manual_seed(seed)


FORMATS = {"w8": (8, "int8", 8), "w4": (4, "int4_k64x2", 8), "w4a4": (4, "int4_k64x2_s4", 4)}
"""Weight bits, layout, bits of the activations: int4 by int4 is the C++ kernels' own, by way of int8 elsewhere."""


def product_variants(machine: Machine, m: int, k: int, n: int) -> dict[str, Variant]:
    """A layer of per-token activations in bf16 and 8 and 4 bits, with and without a rank-32 branch, and what a block
    fuses with a layer of its shape."""
    g, device = _generator(machine, m + k + n), machine.device
    x, bias = torch.randn(m, k, generator=g, device=device).to(BF16), torch.randn(n, generator=g, device=device)
    up = torch.randn(n, RANK, generator=g, device=device).to(F16)
    down = (torch.randn(RANK, k, generator=g, device=device) * k**-0.5).to(F16)
    w_scale = torch.rand(n, generator=g, device=device) * 1e-3 + 1e-4
    float_weight = torch.randn(n, k, generator=g, device=device).to(BF16) * k**-0.5
    int_weight = torch.randint(-127, 128, (n, k), generator=g, device=device, dtype=torch.int8)
    coded = {bits: vk.quantize(x, ActQuant(qmin=1 - (1 << bits - 1), qmax=(1 << bits - 1) - 1, lora_down=down))
             for bits in (8, 4)}  # fmt: skip
    variants = {
        "bf16": Variant(lambda t: F.linear(t["x"], t["w"], t["b"]), {"x": x, "w": float_weight, "b": bias.to(BF16)}),
    }
    int_mm = Variant(lambda t: torch._int_mm(t["x"], t["w"].T), {"x": coded[8].q, "w": int_weight})
    try:
        int_mm.run_once()
        variants["_int_mm"] = int_mm
    except RuntimeError:  # it does not take every shape
        pass
    for name, (bits, layout, act_bits) in FORMATS.items():
        top = 1 << bits - 1
        codes = torch.randint(-top, top, (n, k), generator=g, device=device, dtype=torch.int8)
        layer = vk.pack_weight(codes, bits, layout), w_scale, bias
        variants[f"{name} rank {RANK}"] = product(coded[act_bits], *layer, up, native(machine, layout))
        if name == "w4a4":
            continue
        variants[name] = product(coded[8], *layer, None)
        if name == "w8":
            variants[WHOLE] = _whole(x, down, *layer, up)
        if n == 4 * k:
            variants[f"{name} rank {RANK}, GELU + quantize"] = _gelu_quantize(machine, coded[8], *layer, up)
        if n == k:
            variants[f"{name} rank {RANK}, LayerNorm + quantize"] = _norm_quantize(machine, coded[8], *layer, up)
    return variants


def native(machine: Machine, layout: str) -> bool:
    """Whether hardware multiplies such weights as they are: else the C++ kernels are right, but no gain."""
    return layout in backends.table()["qlinear"]["cuda"].served(machine.device)


def _layer(
    weight: PackedWeight, w_scale: Tensor, bias: Tensor, up: Tensor | None
) -> tuple[dict[str, Tensor], Callable]:
    """Tensors of a layer, and the layer prepared from such tensors."""
    tensors = {"w": weight.data, "sum": weight.col_sum, "s": w_scale, "b": bias}
    if up is not None:
        tensors["up"] = up

    def prepare(t: dict[str, Tensor]) -> PreparedLinear:
        return PreparedLinear(replace(weight, data=t["w"], col_sum=t["sum"]), t["s"], t["b"], t.get("up"))

    return tensors, prepare


def _exact(x: QTensor, weight: PackedWeight, w_scale: Tensor, kw: dict) -> tuple[Tensor, Tensor]:
    """float64 result and its bound; a branch multiplies in the dtype of lora_up."""
    if "lora_up" in kw:
        x = replace(x, t=x.t.to(kw["lora_up"].dtype).float())
    return linear_oracle.exact_qlinear(x, weight, w_scale, kw)


def _check_product(x: QTensor, weight: PackedWeight, w_scale: Tensor, **kw) -> Callable:
    kw = {"activation": "none"} | {name: value for name, value in kw.items() if value is not None}

    def check(got: Tensor) -> None:
        y, bound = _exact(x, weight, w_scale, kw)
        linear_oracle.assert_within(got, y, linear_oracle.round_to(y, bound, got.dtype))

    return check


def product(
    x: QTensor, weight: PackedWeight, w_scale: Tensor, bias: Tensor, up: Tensor | None, timed: bool = True
) -> Variant:
    tensors, prepare = _layer(weight, w_scale, bias, up)
    tensors |= {"q": x.q, "scale": x.scale} | ({} if up is None else {"t": x.t})
    m, k = x.q.shape
    work = roofline.linear(m, weight.n, k, 0 if up is None else RANK, bits=weight.bits)
    if weight.layout == "int4_k64x2_s4":
        work = replace(work, int8=work.int8 // 2)  # as many int4 products take half the time

    def run(t: dict[str, Tensor]) -> Tensor:
        return prepare(t).qlinear(QTensor(t["q"], t["scale"], 0, t.get("t")), out_dtype=BF16)

    check = _check_product(x, weight, w_scale, bias=bias, lora_up=up)
    return Variant(run, tensors, work, check, ("qlinear", weight.layout, (m, weight.n, k)), timed)


def _whole(x: Tensor, down: Tensor, weight: PackedWeight, w_scale: Tensor, bias: Tensor, up: Tensor) -> Variant:
    """The product behind the launch that quantizes its input and computes t."""
    tensors, prepare = _layer(weight, w_scale, bias, up)
    m, k = x.shape
    work = roofline.quantize(m, k, RANK) + roofline.linear(m, weight.n, k, RANK)

    def quantized(t: dict[str, Tensor]) -> QTensor:
        return vk.quantize(t["x"], ActQuant(lora_down=t["down"]))

    def check(got: Tensor) -> None:
        _check_product(quantized({"x": x, "down": down}), weight, w_scale, bias=bias, lora_up=up)(got)

    inputs = {**tensors, "x": x, "down": down}
    return Variant(lambda t: prepare(t).qlinear(quantized(t), out_dtype=BF16), inputs, work, check)


def _next(machine: Machine, n: int) -> tuple[Tensor, Tensor]:
    """Scale and lora_down of a layer behind."""
    down = torch.randn(RANK, n, generator=_generator(machine, n), device=machine.device) * n**-0.5
    return torch.tensor([0.03], device=machine.device), down.to(F16)


def _gelu_quantize(
    machine: Machine, x: QTensor, weight: PackedWeight, w_scale: Tensor, bias: Tensor, up: Tensor
) -> Variant:
    """fc1: its result is written as the codes, and the t, of the next layer."""
    tensors, prepare = _layer(weight, w_scale, bias, up)
    scale, down = _next(machine, weight.n)
    tensors |= {"q": x.q, "scale": x.scale, "t": x.t, "q_scale": scale, "down": down}
    m, k = x.q.shape
    work = roofline.linear(m, weight.n, k, RANK, out_bytes=1, rank_down=RANK)

    def run(t: dict[str, Tensor]) -> QTensor:
        out = Epilogue(ActQuant(scale=t["q_scale"], lora_down=t["down"]))
        return prepare(t).qlinear_quantize(QTensor(t["q"], t["scale"], 0, t["t"]), out, "gelu_erf")

    def check(got: QTensor) -> None:
        exact = _exact(x, weight, w_scale, {"activation": "gelu_erf", "bias": bias, "lora_up": up})
        assert_quantized(got, *exact, ActQuant(scale=scale, lora_down=down))

    return Variant(run, tensors, work, check, ("qlinear_quantize", weight.layout, (m, weight.n, k)))


def _norm_quantize(
    machine: Machine, x: QTensor, weight: PackedWeight, w_scale: Tensor, bias: Tensor, up: Tensor
) -> Variant:
    """proj: with the residual sum it is the input of the next LayerNorm, whose codes and t come with it."""
    tensors, prepare = _layer(weight, w_scale, bias, up)
    (m, k), n = x.q.shape, weight.n
    g, (scale, down) = _generator(machine, m), _next(machine, n)
    residual = torch.randn(m, n, generator=g, device=machine.device).to(BF16)
    gamma, beta = torch.randn(2, n, generator=g, device=machine.device).unbind(0)
    tensors |= {"q": x.q, "scale": x.scale, "t": x.t, "q_scale": scale, "down": down}
    tensors |= {"residual": residual, "gamma": gamma, "beta": beta}
    work = roofline.linear(m, n, k, RANK, residual_bytes=2, rank_down=RANK, norm=True)

    def run(t: dict[str, Tensor]) -> tuple[Tensor, QTensor]:
        out, coded = Epilogue(ActQuant(scale=t["q_scale"], lora_down=t["down"])), QTensor(t["q"], t["scale"], 0, t["t"])
        return prepare(t).qlinear_norm_quantize(coded, t["gamma"], t["beta"], EPS, out, t["residual"], BF16)

    def check(got: tuple[Tensor, QTensor]) -> None:
        _check_product(x, weight, w_scale, bias=bias, lora_up=up, residual=residual)(got[0])
        exact = layer_norm_oracle.exact_layer_norm(got[0], gamma, beta, EPS, "triton")
        assert_quantized(got[1], *exact, ActQuant(scale=scale, lora_down=down))

    return Variant(run, tensors, work, check, ("qlinear_norm_quantize", weight.layout, (m, n, k)))


def products(machine: Machine) -> Iterator[dict[str, Any]]:
    """One row per (M, K, N); ``kernels``: what torch launched for bf16, then for ``_int_mm``."""
    for m, k, n in shapes.products(machine.dry):
        variants = product_variants(machine, m, k, n)
        with named(f"product of M={m}, K={k}, N={n}"):
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

    def variant(norm: bool, **quant: Tensor) -> Variant:
        def run(t: dict[str, Tensor]) -> QTensor:
            a = ActQuant(**{name: t[name] for name in quant})
            return vk.layer_norm_quantize(t["x"], t["g"], t["b"], EPS, a) if norm else vk.quantize(t["x"], a)

        def check(got: QTensor) -> None:
            exact = x.double(), 0.0
            if norm:
                exact = layer_norm_oracle.exact_layer_norm(x, gamma, beta, EPS, "triton")
            assert_quantized(got, *exact, ActQuant(**quant))

        inputs = {"x": x, **quant} | ({"g": gamma, "b": beta} if norm else {})
        rank, dynamic = RANK if "lora_down" in quant else 0, "scale" not in quant
        work = roofline.quantize(m, k, rank, dynamic=dynamic, norm=norm)
        return Variant(run, inputs, work, check, ("layer_norm_quantize" if norm else "quantize", "", (m, k)))

    return {
        "quantize": variant(False),
        "quantize, t": variant(False, lora_down=down),
        "LayerNorm + quantize, static": variant(True, scale=scale),
        "LayerNorm + quantize, t": variant(True, lora_down=down),
        "LayerNorm in bf16": Variant(
            lambda t: F.layer_norm(t["x"], (k,), t["g"], t["b"]),
            {"x": x, "g": gamma.to(BF16), "b": beta.to(BF16)},
        ),
    }


def rows(machine: Machine) -> Iterator[dict[str, Any]]:
    """One row per (M, K): achieved bandwidth of the quantizing passes."""
    for m, k in shapes.rows(machine.dry):
        variants = row_variants(machine, m, k)
        with named(f"rows of M={m}, K={k}"):
            row = time_variants(machine, variants)
        works = {name: v.work for name, v in on_back_ends(machine, variants).items() if v.work is not None}
        row["gb_per_s"] = {name: work.bytes / row["ms"][name] * 1e-6 for name, work in works.items()}
        yield {"M": m, "K": k, **row}


def _additive(machine: Machine, h: int, n: int, groups: int) -> tuple[Tensor | None, Tensor | None]:
    """A relative bias and the masks of ``groups`` windows, or neither."""
    if not groups:
        return None, None
    g, device = _generator(machine, h), machine.device
    mask = torch.where(torch.rand(groups, n, n, generator=g, device=device) < 0.8, 0.0, -100.0)
    return torch.randn(h, n, n, generator=g, device=device), mask


def attention(machine: Machine, b: int, h: int, n: int, d: int, groups: int, quantized: bool = False) -> Variant:
    """Integer attention over views of a fused QKV result, to floats or to the codes of a projection."""
    device, (bias, mask) = machine.device, _additive(machine, h, n, groups)
    g = _generator(machine, n)
    codes = torch.randint(-127, 128, (b, n, 3, h, d), generator=g, device=device, dtype=torch.int8)
    scale, out = torch.full((1,), 1.5 / 73, device=device), ActQuant(scale=torch.tensor([0.01], device=device))
    rest = {"bias": bias, "mask": mask}

    def floats(codes: Tensor, dtype: torch.dtype) -> Tensor:
        q, k, v = codes.permute(2, 0, 3, 1, 4).unbind(0)
        return vk.qattention(q, k, v, scale, scale, scale, focus=FOCUS, out_dtype=dtype, **rest)

    def run(t: dict[str, Tensor]) -> Tensor:
        return floats(t["codes"], BF16)

    def check(got: Tensor) -> None:
        q, k, v = codes[: groups or 1].permute(2, 0, 3, 1, 4).unbind(0)
        part = got[: groups or 1]
        oracle = (q, k, v, scale, scale, scale, FOCUS, d**-0.5)
        attention_oracle.assert_attention(part, *oracle, **rest, out_unit=2.0**-8, vacuous=1.0)
        if not torch.equal(part, run({"codes": codes[: groups or 1]})):
            raise AssertionError("image 0 alone and within its batch differ")

    def run_quantized(t: dict[str, Tensor]) -> QTensor:
        q, k, v = t["codes"].permute(2, 0, 3, 1, 4).unbind(0)
        return vk.qattention_quantize(q, k, v, scale, scale, scale, focus=FOCUS, out=out, **rest)

    def check_quantized(got: QTensor) -> None:
        differ = got.q != vk.quantize(floats(codes, torch.float32), out).q
        if differ.any():
            raise AssertionError(f"codes are not those of the floats; first at {tuple(differ.nonzero()[0].tolist())}")

    op = "qattention_quantize" if quantized else "qattention"
    work = roofline.attention(b, h, n, d, out_bytes=1 if quantized else 2, bias=bias is not None, mask=groups)
    run, check = (run_quantized, check_quantized) if quantized else (run, check)
    return Variant(run, {"codes": codes}, work, check, (op, "", (b * h, n, d)))


def attention_variants(machine: Machine, b: int, h: int, n: int, d: int, groups: int) -> dict[str, Variant]:
    """Integer attention, and every SDPA back end that takes the shape."""
    bias, mask = _additive(machine, h, n, groups)
    fused = torch.randn(b, n, 3, h, d, generator=_generator(machine, n), device=machine.device)
    kinds = {"int8": False, "int8 + quantize": True}
    variants = {name: attention(machine, b, h, n, d, groups, quantized) for name, quantized in kinds.items()}
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
        with named(f"attention of B={b}, H={h}, N={n}, d={d}"):
            row = time_variants(machine, attention_variants(machine, b, h, n, d, groups))
        row["ms"]["sdpa"] = min(ms for name, ms in row["ms"].items() if name.startswith("sdpa"))
        yield {"B": b, "H": h, "N": n, "d": d, **row}


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Puts ``what`` in front of an AssertionError's message."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}, {error}") from error
