"""Tables and pictures of a result file of ``bench.run``, for docs/cpu.md and the README."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from vitq import plots
from vitq.plots import Axis, Picture, Series

from . import RESULTS
from .tables import table

EAGER = "torch eager fp32"
AHEAD_OF_TIME = "AOTInductor"


def newest(isa: str | None = None) -> dict[str, Any]:
    """The newest complete result file, or that of a run held to ``isa``."""
    records = []
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or "absent" not in record or "rows" not in record:
            continue
        if not record["quick"] and "missing" not in record:
            about = record["environment"]
            if (about["cpu_isa"] == isa) if isa else about["cpu_isa"] != "avx2":
                records.append(record)
    return max(records, key=lambda record: record["environment"]["date"])


def contenders(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row per model, threads and contender: float32 eager, ours, then peers, each against float32 eager.

    A peer's time is that of its own process; its speed-up is over the float model in that process.
    """
    rows = [row for row in record["rows"] if row["bench"] == "model"]
    for case, threads in dict.fromkeys((row["case"], row["threads"]) for row in rows):
        mine = [row for row in rows if (row["case"], row["threads"]) == (case, threads)]
        key = {"case": case, "threads": threads}

        def side(row: dict[str, Any], which: str, ratio: float, key=key) -> dict[str, Any]:
            names = {"ms": f"{which}_ms", "sqnr_db": f"{which}_sqnr_db", "agreement": f"{which}_agreement"}
            figures = {name: row.get(column) for name, column in names.items()}
            return {**key, "who": row[which], "speedup": ratio, "mb": row.get(f"{which}_mb"), **figures}

        own = [row for row in mine if row["baseline"] == EAGER]
        if own:
            yield side(own[0], "baseline", 1.0)
        for row in own:
            yield side(row, "ours", row["ratio"])
        for name in dict.fromkeys(row["baseline"] for row in mine if row["baseline"] != EAGER):
            row = next(row for row in mine if row["baseline"] == name)
            yield side(row, "baseline", row["baseline_speedup"])


def models_table(record: dict[str, Any]) -> str:
    columns = {"case": "model, batch", "threads": "threads", "who": "what", "ms": "ms", "speedup": "speed-up",
               "sqnr_db": "logit SQNR dB", "agreement": "= float", "mb": "MB"}  # fmt: skip
    return table(list(contenders(record)), columns)


# What the kernels were built to reach: benchmark, form of ours, least ratio to torch's float32.
GOALS_AVX2 = (
    ("linear", "w4a8", 3.0),
    ("linear", "w8a8", 1.5),
    ("model", "W4A8 static", 2.0),
    ("model", "W8A8 static", 1.4),
    ("model", "W8A8 static, AOTInductor", 1.4),
)
GOAL_MODELS = ("ViT-S/16", "DeiT-T/16")
RANK_COST = 10.0  # percent, of a branch of rank 32


def goals_table(record: dict[str, Any], held: dict[str, Any]) -> str:
    """Every goal beside what was measured: the ratios on AVX2 of ``held``, the peers of ``record``."""
    rows = []

    def add(what: str, goal: float, found: list[float], unit: str, more_is_better: bool = True) -> None:
        if found:
            met = sum((f >= goal) if more_is_better else (f <= goal) for f in found)
            spread = " / ".join(f"{f:.2f}" for f in (min(found), median(found), max(found)))
            rows.append({"what": what, "goal": f"{'≥' if more_is_better else '≤'} {goal:g} {unit}", "found": spread,
                         "met": f"{met} of {len(found)}"})  # fmt: skip

    for bench, form, goal in GOALS_AVX2:
        mine = [row for row in held["rows"] if (row["bench"], row["ours"]) == (bench, form)]
        mine = [row for row in mine if row["baseline"] in (EAGER, "F.linear")]
        for name in GOAL_MODELS if bench == "model" else ("",):
            found = [row["ratio"] for row in mine if not name or row["case"].startswith(f"{name} b")]
            add(f"AVX2, {name or bench}, {form}", goal, found, "×")
    for about, rows_of in (("AVX2", held["rows"]), (record["environment"]["cpu_isa"], record["rows"])):
        times = {(r["case"], r["threads"], r["ours"]): r["ours_ms"] for r in rows_of if r["bench"] == "linear"}
        for form in ("w4a8", "w8a8"):
            cost = [
                100 * (ms / times[(*key[:2], form)] - 1) for key, ms in times.items() if key[2] == f"{form}, rank 32"
            ]
            add(f"{about}, {form}, a branch of rank 32 more", RANK_COST, cost, "%", more_is_better=False)
    for about, source in (("AVX2", held), (record["environment"]["cpu_isa"], record)):
        beside, apart = ([ratios[i] for ratios in nearest_peers(source)] for i in range(2))
        add(f"{about}, ours beside the fastest peer, in its process", 1.0, beside, "×")
        if beside and not any(
            row["ours"].endswith(AHEAD_OF_TIME) for row in source["rows"] if "baseline_speedup" in row
        ):
            add(f"{about}, the same by times of two processes, {AHEAD_OF_TIME} too", 1.0, apart, "×")
        if not beside:
            rows.append({"what": f"{about}, ours beside the fastest peer", "goal": "≥ 1 ×", "met": "not timed"})
    columns = {"what": "what", "goal": "goal", "found": "least / median / most", "met": "met"}
    return table(rows, columns)


def nearest_peers(record: dict[str, Any]) -> Iterator[tuple[float, float, str]]:
    """Per model, batch and threads: how many times as fast as the peer that is hardest to beat ours are, and who it is.

    First of those that took turns with it in its process, then with the times of all of ours. Speed-ups over float32
    eager are not compared: eager's own time is another beside other processes' contenders.
    """
    rows = [row for row in record["rows"] if row["bench"] == "model"]
    for key in dict.fromkeys((row["case"], row["threads"]) for row in rows):
        mine = [row for row in rows if (row["case"], row["threads"]) == key]
        fastest = min(row["ours_ms"] for row in mine if row["baseline"] == EAGER)
        peers = {row["baseline"]: row["baseline_ms"] for row in mine if row["baseline"] != EAGER}
        beside = {peer: max(row["ratio"] for row in mine if row["baseline"] == peer) for peer in peers}
        if peers:
            hardest = min(beside, key=beside.get)
            yield beside[hardest], min(peers.values()) / fastest, hardest


def ops_table(record: dict[str, Any], bench: str) -> str:
    """A row per case and threads, the ratio of every form of ours in a column."""
    rows = [row for row in record["rows"] if row["bench"] == bench]
    names = list(dict.fromkeys(row["ours"] for row in rows))
    lines: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        base = {"case": row["case"], "threads": row["threads"], "ms": row["baseline_ms"]}
        lines.setdefault((row["case"], row["threads"]), base)[row["ours"]] = row["ratio"]
    baseline = rows[0]["baseline"] if rows else "baseline"
    columns = {"case": bench, "threads": "threads", "ms": f"{baseline} ms", **{n: f"{n} ×" for n in names}}
    return table(list(lines.values()), columns)


def ranges(record: dict[str, Any], held: dict[str, Any]) -> str:
    """The tables of single layers and attention in two sentences."""

    def of(rows: list[dict[str, Any]], bench: str, form: str, least_tokens: int = 0) -> str:
        mine = [row for row in rows if (row["bench"], row["ours"]) == (bench, form)]
        found = [row["ratio"] for row in mine if int(row["case"].split("x")[-1]) >= least_tokens]
        return f"{min(found):.1f} to {max(found):.1f}"

    rows, avx2 = record["rows"], held["rows"]
    counts = sorted({row["threads"] for row in rows})
    return (
        f"Over the layers of ViT-S and ViT-B, batch 1 and 8, {' and '.join(map(str, counts))} threads, W4A8 runs at "
        f"{of(rows, 'linear', 'w4a8')} times float32 and W8A8 at {of(rows, 'linear', 'w8a8')} times "
        f"({record['environment']['cpu_isa'].replace('_', '-').upper()}), attention at "
        f"{of(rows, 'attention', '8 bits, row anchor', 197)} times `scaled_dot_product_attention` from 197 tokens on. "
        f"With both sides held to AVX2, W4A8 runs at {of(avx2, 'linear', 'w4a8')} times float32 and W8A8 at "
        f"{of(avx2, 'linear', 'w8a8')} times."
    )


def absent_list(record: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {reason}" for name, reason in record["absent"].items()) or "Nothing was absent."


def instructions_table(record: dict[str, Any]) -> str:
    rows = [{"kernel": k, "instructions": f"{n:,}"} for k, n in record["instructions"].items()]
    return table(rows, {"kernel": "kernel", "instructions": "instructions of a call"})


def profile_table(record: dict[str, Any]) -> str:
    """The operators of the profiled models."""
    rows = []
    for who, profile in record.get("profiles", {}).items():
        if who != "ceilings":
            rows += [
                {"who": who, **row, "share": f"{row['share']:.0%}"} for row in profile["ops"] if row["share"] > 0.01
            ]
    columns = {"who": "model", "name": "operator", "calls": "calls", "ms": "ms", "share": "share", "gb_s": "GB/s",
               "gop_s": "Gop/s", "floor_ms": "floor ms", "of_floor": "floor / time", "bound": "bound by"}  # fmt: skip
    return table(rows, columns)


def pictures(record: dict[str, Any]) -> dict[str, Picture]:
    """Name → picture, of those that the record has the figures for."""
    drawn = {
        "latency": latency_over_batch(record),
        "layers": speedup_per_layer(record),
        "accuracy": accuracy_over_latency(record),
        "roofline": roofline(record),
    }
    return {name: picture for name, picture in drawn.items() if picture is not None}


def latency_over_batch(record: dict[str, Any]) -> Picture | None:
    """Milliseconds per image over the batch, one thread, a panel per model with several batch sizes."""
    panels = []
    rows = [row for row in contenders(record) if row["threads"] == 1]
    for name in dict.fromkeys(row["case"].rpartition(" b")[0] for row in rows):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            model, _, batch = row["case"].rpartition(" b")
            if model == name:
                lines.setdefault(row["who"], []).append((int(batch), row["ms"] / int(batch)))
        series = [Series(who, points) for who, points in lines.items() if len(points) > 1]
        if series:
            batches = sorted({p[0] for s in series for p in s.points})
            x, y = Axis("batch", log=True), Axis("ms per image", low=0.0)
            ticks = [(b, str(b)) for b in batches]
            panels.append(plots.stack([plots.plot(series, x, y, f"{name}: latency over batch", ticks=ticks)], name))
    return plots.stack(panels) if panels else None


def speedup_per_layer(record: dict[str, Any]) -> Picture | None:
    """Ratio to ``F.linear`` of plain W4A8 and W8A8 at every shape, one thread."""
    rows = [row for row in record["rows"] if row["bench"] == "linear" and row["threads"] == 1]
    names = [name for name in ("w4a8", "w8a8") if any(row["ours"] == name for row in rows)]
    if not names:
        return None
    bars: dict[str, list[float | None]] = {}
    for row in rows:
        if row["ours"] in names:
            bars.setdefault(row["case"], [None] * len(names))[names.index(row["ours"])] = row["ratio"]
    return plots.bars(bars, names, "Speed-up of every layer over F.linear", "×")


def accuracy_over_latency(record: dict[str, Any]) -> Picture | None:
    """Logit SQNR over the time as a share of float32 eager's, batch 1 and one thread, a panel per model.

    Whoever computes in float32 is left out: beyond 100 dB there is nothing to weigh.
    """
    panels = []
    rows = [row for row in contenders(record) if row["threads"] == 1 and row["case"].endswith(" b1")]
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case and (row["sqnr_db"] or 100) < 100]
        series = [Series(row["who"], [(1 / row["speedup"], row["sqnr_db"])], line=False) for row in mine]
        if series:
            x, y = Axis("time / float32 eager", log=True), Axis("logit SQNR, dB")
            panels.append(plots.stack([plots.plot(series, x, y, f"{case}: accuracy over latency")], case))
    return plots.stack(panels) if panels else None


def roofline(record: dict[str, Any]) -> Picture | None:
    """Operators that multiply under the ceilings of the machine."""
    profiles = {who: p for who, p in record.get("profiles", {}).items() if who != "ceilings" and p["host"]}
    if not profiles:
        return None
    found = next(iter(profiles.values()))["host"]
    points = {
        f"{row['name']} ({who})": (row["gop"] / row["mb"] * 1e3, row["gop_s"])
        for who, profile in profiles.items()
        for row in profile["ops"]
        if row["gop"]
    }
    low, high = min(x for x, _ in points.values()) / 2, max(x for x, _ in points.values()) * 2
    rate = max(found["bandwidth"].values()) / 1e9
    ceilings = []
    for operand, color in (("int4", plots.GREY), ("int8", plots.GREY), ("float32", plots.LIGHT)):
        peak = found["peak"][operand] / 1e9
        knee = min(max(peak / rate, low), high)
        line = [(low, min(rate * low, peak)), (knee, min(rate * knee, peak)), (high, min(rate * high, peak))]
        ceilings.append(Series(f"ceiling {operand}", line, dots=False, color=color))
    dots = [Series(name, [point], line=False) for name, point in points.items()]
    x, y = Axis("operations per byte", log=True), Axis("Gop/s", log=True)
    return plots.plot([*ceilings, *dots], x, y, "Operators under the ceilings of the machine", height=3.0)


def write_pictures(record: dict[str, Any], folder: Path, check: bool) -> list[Path]:
    """Files of ``folder`` that are not of the record; unless ``check``, they are afterwards.

    A file names the digest of its record: matplotlib's versions draw the same figures a little differently.
    """
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
    stamp = f"<!-- of figures {digest} -->\n"
    wanted = {folder / f"cpu-{name}.svg": picture for name, picture in pictures(record).items()}
    stale = [path for path in wanted if not path.exists() or not path.read_text().startswith(stamp)]
    left = [path for path in folder.glob("cpu-*.svg") if path not in wanted]
    if not check:
        folder.mkdir(parents=True, exist_ok=True)
        for path in stale:
            path.write_text(stamp + wanted[path].svg())
        for path in left:
            path.unlink()
    return stale + left
