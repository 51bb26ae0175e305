"""Integer attention on the CPU against torch's float32 ``scaled_dot_product_attention``, as ratios of one run.

    python bench/bench_qattention.py [--threads 1 2] [--isa auto avx2 ...] [--focus row8] [--seconds 1.0] [--json PATH]

Both sides take strided [B, H, N, d] views of a fused QKV result and return [B, N, H·d]. A shape is timed only after its
result agrees with ``ref`` (up to the rare code on a tie); then both sides alternate, and the ratio is that of their
medians. On an AVX-512 machine ``ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ... --isa avx2`` stands in for an
AVX2 one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F

from vitq_kernels import _native, backend
from vitq_kernels.formats import ActQuant, FocusSpec
from vitq_kernels.ops import qattention, qattention_quantize

SHAPES = [  # B, H, N
    (b, h, n) for n in (197, 65, 1025) for b in (1, 8) for h in (3, 6, 12) if not (n == 1025 and b * h > 24)
]
FOCUSES = {
    "dfq8": FocusSpec(),
    "dfq4": FocusSpec(bits=4, b1=0.01, b2=0.15),
    "row4": FocusSpec(bits=4, power=2.0, anchor="row"),
    "row8": FocusSpec(power=2.0, anchor="row"),
    "row8_renorm": FocusSpec(power=2.0, anchor="row", renormalize=True),
}


def operands(b: int, h: int, n: int, d: int):
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(b, n, 3, h, d, generator=g)
    scale = qkv.abs().amax() / 127
    codes = torch.round(qkv / scale).clamp(-127, 127).to(torch.int8)
    views = qkv.permute(2, 0, 3, 1, 4), codes.permute(2, 0, 3, 1, 4)
    return (*(x.unbind(0) for x in views), scale.reshape(1))


def timed(fns: dict, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every function, called in turns for ``seconds`` (at least 15 rounds)."""
    times = {name: [] for name in fns}
    for fn in fns.values():
        fn()
    end = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < 15 or time.perf_counter() < end:
        for name, fn in fns.items():
            start = time.perf_counter()
            fn()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def measure(b: int, h: int, n: int, d: int, focus: FocusSpec, isas: list[str], seconds: float) -> dict:
    (q, k, v), codes, scale = operands(b, h, n, d)
    extension = _native.extension()

    def sdpa():
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, h * d)

    def integer(isa):
        extension.set_cpu_isa(isa)
        return qattention(*codes, scale, scale, scale, focus=focus)

    def quantized(isa):
        extension.set_cpu_isa(isa)
        return qattention_quantize(*codes, scale, scale, scale, focus=focus, out=ActQuant())

    with backend("ref"):
        want = integer("auto")
    for isa in isas:
        error = float((integer(isa) - want).norm() / want.norm())
        if not error < 1e-2:  # one code in 10^4 on a tie moves by a level: about 1e-3
            raise SystemExit(f"B={b} H={h} N={n} {isa}: relative error {error:.4f} against ref")
    fns = {"sdpa": sdpa}
    for isa in isas:
        fns[isa] = lambda isa=isa: integer(isa)
    fns[f"{isas[0]}+quantize"] = lambda: quantized(isas[0])
    times = timed(fns, seconds)
    extension.set_cpu_isa("auto")
    row = {"B": b, "H": h, "N": n, "d": d, "threads": torch.get_num_threads()}
    for name, t in times.items():
        p20, median, p80 = (statistics.quantiles(t, n=10)[i] for i in (1, 4, 7))
        row[name] = {"median_ms": median, "p20_ms": p20, "p80_ms": p80}
        row[name]["speedup"] = row["sdpa"]["median_ms"] / median
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", nargs="+", default=["auto"])
    parser.add_argument("--focus", choices=FOCUSES, default="row8")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--shapes", nargs="+", help="B,H,N ...; default: ViT-T/S/B at 197, 65 and 1025 tokens")
    parser.add_argument("--json", help="write all figures here")
    args = parser.parse_args()
    reason = _native.unavailable("cpu")
    if reason:
        raise SystemExit(f"nothing to time: {reason}")
    shapes = [tuple(map(int, s.split(","))) for s in args.shapes] if args.shapes else SHAPES
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for shape in shapes:
            row = measure(*shape, args.head_dim, FOCUSES[args.focus], args.isa, args.seconds)
            rows.append(row)
            timed_rows = ((name, v) for name, v in row.items() if isinstance(v, dict))
            figures = "  ".join(f"{name} {v['median_ms']:.3f} ms ×{v['speedup']:.2f}" for name, v in timed_rows)
            print(f"{threads} thread(s)  B={row['B']} H={row['H']:2} N={row['N']:4}  {figures}", flush=True)
    if args.json:
        info = {"isa": _native.extension().cpu_isa(), "torch": torch.__version__, "focus": args.focus}
        with open(args.json, "w") as file:
            json.dump({"environment": info, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
