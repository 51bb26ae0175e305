"""Integer linear layers on the CPU against torch's float32 ``F.linear``, as ratios of one run.

    python bench/bench_qlinear.py [--threads 1 2] [--isa auto] [--shapes 197,384,1536 ...] [--seconds 1.0] [--json PATH]

A shape is timed only after every variant agrees with the float64 oracle; then all of them and ``F.linear`` alternate,
and the ratio is that of the medians. On an AVX-512 machine ``ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2
ONEDNN_MAX_CPU_ISA=AVX2 … --isa avx2`` stands in for an AVX2 one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from vitq.bench.latency import compare, threads

import vitq_kernels as vk
from vitq_kernels import _native
from vitq_kernels.packing import unpack_weight
from vitq_kernels.testing import assert_codes_match, assert_within, cpu_isa, gamma

WIDTHS = {384: (384, 1152, 1536), 768: (768, 2304, 3072), 1536: (384,), 3072: (768,)}  # K → N of ViT-S and ViT-B
SHAPES = [(m, k, n) for m in (197, 1576) for k, widths in WIDTHS.items() for n in widths]
RANK = 32


def variants(m: int, k: int, n: int) -> dict:
    """F.linear and every integer form of one layer, checked against each other's float64 oracle."""
    g = torch.Generator().manual_seed(0)
    x, w, bias = torch.randn(m, k, generator=g), torch.randn(n, k, generator=g), torch.randn(n, generator=g)
    codes = vk.quantize(x, vk.ActQuant())
    side = vk.QTensor(codes.q, codes.scale, 0, torch.randn(m, RANK, generator=g))
    up = torch.randn(n, RANK, generator=g)
    calls = {"float32": lambda: torch.nn.functional.linear(x, w, bias)}
    for name, bits, layout in (("w8a8", 8, "int8_n16k4"), ("w4a8", 4, "int4_n16k4")):
        top = 2 ** (bits - 1) - 1
        scale = w.abs().amax(1) / top
        weight = vk.pack_weight(torch.round(w / scale[:, None]).to(torch.int8), bits, layout)
        plain = (weight, scale, bias)
        calls[name] = lambda a=plain: vk.qlinear(codes, *a)
        calls[f"{name} rank {RANK}"] = lambda a=plain: vk.qlinear(side, *a, lora_up=up)
        calls[f"{name} gelu+quantize"] = lambda a=plain: vk.qlinear_quantize(
            codes, *a, activation="gelu_erf", out=vk.ActQuant()
        )
        check(calls, name, codes, side, plain, up)
    calls["w4 weight-only"] = lambda: vk.qlinear_weight_only(x, *plain)
    exact = (x.double() @ unpack_weight(weight).double().T) * scale.double() + bias.double()
    terms = (x.double().abs() @ unpack_weight(weight).double().abs().T) * scale.double() + bias.double().abs()
    assert_within(calls["w4 weight-only"](), exact, gamma(k + 3) * terms)
    return calls


def check(calls: dict, name: str, codes, side, plain, up) -> None:
    weight, scale, bias = plain
    total = codes.q.double() @ unpack_weight(weight).double().T
    product = total * codes.scale.double() * scale.double()
    exact, terms = product + bias.double(), product.abs() + bias.double().abs()
    assert_within(calls[name](), exact, gamma(4) * terms, name)
    low_rank, low_rank_terms = side.t.double() @ up.double().T, side.t.double().abs() @ up.double().abs().T
    bound = gamma(RANK + 5) * (terms + low_rank_terms)
    assert_within(calls[f"{name} rank {RANK}"](), exact + low_rank, bound, f"{name} rank")
    fused = calls[f"{name} gelu+quantize"]()
    y = torch.nn.functional.gelu(exact) / fused.scale.double()
    error = (1.13 * gamma(4) * terms + gamma(8) * exact.abs()) / fused.scale.double()
    assert_codes_match(fused.q, y, error + gamma(3) * y.abs(), -127, 127)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--shapes", nargs="+", help="M,K,N ...; default: the layers of ViT-S and ViT-B, batch 1 and 8")
    parser.add_argument("--seconds", type=float, default=1.0, help="per variant and shape")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    if reason := _native.unavailable("cpu"):
        raise SystemExit(f"nothing to time: {reason}")
    shapes = [tuple(map(int, s.split(","))) for s in args.shapes] if args.shapes else SHAPES
    rows = []
    with cpu_isa(args.isa), vk.backend("cpu"):
        isa = _native.extension().cpu_isa()
        for count in args.threads:
            for m, k, n in shapes:
                with threads(count):
                    timings = compare(variants(m, k, n), args.seconds)
                row = {"M": m, "K": k, "N": n, "threads": count}
                for name, t in timings.items():
                    row[name] = {**t.record(), "speedup": timings["float32"].median / t.median}
                rows.append(row)
                figures = "  ".join(f"{name} ×{row[name]['speedup']:.2f}" for name in list(timings)[1:])
                base = timings["float32"]
                spread = f"{base.median:.2f} ms ({base.p20:.2f}–{base.p80:.2f})"
                print(f"{count} thread(s) {isa} {m}×{k}×{n}  float32 {spread}  {figures}", flush=True)
    if args.json:
        info = {"isa": isa, "torch": torch.__version__}
        args.json.write_text(json.dumps({"environment": info, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
