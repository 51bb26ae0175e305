"""Write the measured tables into the documentation: every figure there comes from a file that a command made. Of what
was measured on GPUs, write the tables by which the back ends of a GPU are chosen, too.

python bench/update_docs.py [--demo build/demo/summary.json] [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
sys.path.insert(0, str(ROOT))  # for who runs this file itself

from vitq import recipes  # noqa: E402

from bench import pages as cpu  # noqa: E402
from bench.accuracy import report as accuracy  # noqa: E402
from bench.gpu import report  # noqa: E402
from bench.tables import table  # noqa: E402
from vitq_kernels.tuning import serving, slug  # noqa: E402


def replace(text: str, name: str, body: str) -> str:
    """``text`` with what stands between the markers of table ``name`` replaced. Raises: ValueError without markers."""
    pattern = re.compile(rf"(<!-- table {name}:[^>]*-->\n).*?(<!-- end -->)", re.S)
    if not pattern.search(text):
        raise ValueError(f"there are no markers of table {name!r}")
    return pattern.sub(lambda m: m.group(1) + body + "\n" + m.group(2), text)


def demo_table(summary: dict) -> str:
    """One row per recipe and model variant, the two splits side by side."""
    rows: dict[tuple[str, str], dict] = {}
    for run in summary["runs"]:
        row = rows.setdefault((run["variant"], run["recipe"]), {"variant": run["variant"], "recipe": run["recipe"]})
        split = run["split"]
        row[f"{split}_top1"] = f"{run['top1_integer']:.2f} ({run['top1_float']:.2f})"
        row[f"{split}_sqnr"] = run["logit_sqnr_db"]
        row["parity"] = min(row.get("parity", 1.0), run["agreement_simulated_integer"])
        row["mb"] = f"{run['size_bytes_integer'] / 1e6:.2f} ({run['size_bytes_float'] / 1e6:.2f})"
        row["speedup"] = run["speedup"]
    columns = {
        "variant": "model",
        "recipe": "recipe",
        "test_top1": "clean top-1 (float)",
        "test_sqnr": "SQNR dB",
        "hard_top1": "hard top-1 (float)",
        "hard_sqnr": "SQNR dB ",
        "parity": "simulated = integer",
        "mb": "MB (float)",
        "speedup": "speed-up b1",
    }
    return table(list(rows.values()), columns)


def readme_table(record: dict) -> str:
    """ViT-S/16 on one thread, without peers."""
    rows = [row for row in cpu.contenders(record) if row["case"].startswith("ViT-S") and row["threads"] == 1]
    ours = [row for row in rows if row["who"] == cpu.EAGER or row["mb"] is not None]
    columns = {"case": "model, batch", "who": "what", "ms": "ms", "speedup": "speed-up", "mb": "MB"}
    return table(ours, columns)


def cpu_page(text: str) -> str:
    """docs/cpu.md of the newest results."""
    record, held = cpu.newest(), cpu.newest("avx2")
    links = [f"![{picture.label}](figures/cpu-{name}.svg)" for name, picture in cpu.pictures(record).items()]
    for name, body in (
        ("goals", cpu.goals_table(record, held)),
        ("models", cpu.models_table(record)),
        ("models-avx2", cpu.models_table(held)),
        ("absent", cpu.absent_list(record)),
        ("pictures", "\n\n".join(links)),
        ("linear", cpu.ops_table(record, "linear")),
        ("linear-avx2", cpu.ops_table(held, "linear")),
        ("attention", cpu.ops_table(record, "attention")),
        ("profile", cpu.profile_table(record)),
        ("instructions", cpu.instructions_table(json.loads((RESULTS / "instructions.json").read_text()))),
    ):
        text = replace(text, name, body)
    return text


def methods_table() -> str:
    """One row per shipped recipe, from the recipes themselves."""
    rows = []
    for name in recipes.names():
        recipe = recipes.load_recipe(name)
        steps = ", ".join(f"{stage}.{method.name}" for stage, method, _ in recipe.steps())
        integer = "no" if recipe.refusal else "yes"
        rows.append({"name": name, "what": recipe.summary, "source": recipe.source, "steps": steps, "integer": integer})
    columns = {"name": "recipe", "what": "what", "source": "source", "steps": "steps", "integer": "integer"}
    return table(rows, columns)


def calibration_table(record: dict) -> str:
    """One row per learning method, and what all its steps are estimated to take on an H200."""
    rows = []
    for row in record["rows"]:
        minutes = {k: row["steps"] * row[f"h200_ms_{k}"] / 6e4 for k in ("float32", "bfloat16")}
        rows.append({**row, **{f"minutes_{k}": v for k, v in minutes.items()}})
    columns = {"method": "method", "batch": "images", "steps": "steps", "operators": "operators a step",
               "gflop": "Gflop", "gbytes": "GB", "here_ms": "ms here, one thread", "h200_ms_float32": "ms, H200",
               "minutes_float32": "minutes, H200", "minutes_bfloat16": "minutes, bfloat16"}  # fmt: skip
    total = sum(row["minutes_float32"] for row in rows)
    return f"{table(rows, columns)}\n\n{record['recipe']}, 12 blocks: {total:.1f} minutes on one H200."


def gap_table(record: dict) -> str:
    """One row per model and recipe: means over the seeds."""
    rows = []
    for model, recipe in dict.fromkeys((row["model"], row["recipe"]) for row in record["rows"]):
        mine = [row for row in record["rows"] if (row["model"], row["recipe"]) == (model, recipe)]
        mean = {k: fmean(row[k] for row in mine) for k in ("start", "last", "claimed", "worth", "seconds")}
        mean |= {"evaluations": mine[0]["evaluations"], "images": mine[0]["images"]}
        rows.append({"model": model, "recipe": recipe, **mean, "gap": mean["claimed"] - mean["worth"]})
    columns = {"model": "model", "recipe": "recipe", "start": "start", "last": "last pass",
               "claimed": "best pass claims", "worth": "and is worth", "gap": "leak", "evaluations": "evaluations",
               "images": "images", "seconds": "seconds"}  # fmt: skip
    return table(rows, columns)


def serving_pages(text: str, record: dict) -> str:
    """docs/serving.md with its tables: load, overhead per request, faults."""
    load = {"who": "who", "model": "model", "single": "images/s, batch 1", "capacity": "batched", "gain": "gain",
            "processor_ms": "processor ms/image", "rate": "requests/s", "p50": "p50 ms", "p95": "p95 ms",
            "p99": "p99 ms", "refused": "refused"}  # fmt: skip
    overhead = {"who": "who", "ms": "ms", "over_ms": "over the engine", "processor_ms": "processor ms",
                "over_processor_ms": "over the engine "}  # fmt: skip
    faults = record["faults"]
    kinds = [{"what": k, "n": n} for k, n in sorted(faults["malformed"].items())]
    memory = faults["resident_mb"]
    line = (
        f"{faults['requests']} requests, {sum(faults['malformed'].values())} of them malformed: "
        f"{len(faults['wrong'])} wrong answers or statuses; statuses "
        + ", ".join(f"{status}: {n}" for status, n in faults["statuses"].items())
        + f"; resident memory {memory[0]:.0f} MB at first, {memory[len(memory) // 2]:.0f} MB halfway, "
        f"{memory[-1]:.0f} MB at the end."
    )
    scaled = record["scaling"]
    scaling = "Ray was not installed."
    if scaled is not None:
        scaling = (
            f"`--max-replicas {scaled['replicas']} --target {scaled['target']}`, {scaled['clients']} requests under "
            f"way at any time: the second replica answered after {scaled['seconds']:.0f} s; {scaled['answers']} "
            "requests until then and in the 10 s after, none refused, none answered wrongly."
        )
    about = record["environment"]
    busy = f"{about['cores']} cores, {about['threads']} thread a model; load average of the minute before: "
    busy += f"{record['load_average']:.1f}, of what else ran."
    tables = {"serving-load": f"{table(record['rows'], load)}\n\n{busy}",
              "serving-overhead": table(record["overhead"], overhead),
              "serving-scaling": scaling,
              "serving-faults": f"{line}\n\n{table(kinds, {'what': 'malformed', 'n': 'requests'})}"}  # fmt: skip
    for name, body in tables.items():
        text = replace(text, name, body)
    return text


def onnx_table(record: dict) -> str:
    """One row per model, recipe and split."""
    rows = [{**row, "onnx_mb": row["onnx_bytes"] / 1e6, "ours_mb": row["checkpoint_bytes"] / 1e6,
             "int": f"{row['int4']} / {row['int8']}", "same": 100 * row["agreement"]}
            for row in record["rows"]]  # fmt: skip
    columns = {"model": "model", "recipe": "recipe", "split": "split", "top1_integer": "top-1, ours",
               "top1_onnx": "ONNX Runtime", "same": "same class %", "sqnr_db": "dB",
               "sqnr_float64_db": "yardstick",
               "quantize": "Q", "dequantize": "DQ", "products": "MatMulInteger", "int": "INT4 / INT8 weights",
               "onnx_mb": "MB", "ours_mb": "checkpoint MB", "float_ms": "float ms", "integer_ms": "ours ms",
               "onnx_ms": "ONNX Runtime ms"}  # fmt: skip
    host = record["environment"]
    note = f"Batch {rows[0]['batch']}, one thread of {host['cpu']}, ONNX Runtime {host['onnxruntime']}."
    floats = {name: [row["float_ms"] for row in record["rows"] if row["model"] == name] for name in
              dict.fromkeys(row["model"] for row in record["rows"])}  # fmt: skip
    apart = max(max(ms) / min(ms) for ms in floats.values())
    note += (
        f" Milliseconds compare within a row: the same float model took {apart:.1f} times as long in one as in another."
    )
    return f"{table(rows, columns)}\n\n{note}"


def models_table(record: dict, library: str) -> str:
    """One row per class of models with the same verdict for the same reasons."""
    groups: dict[tuple, list[dict]] = {}
    for row in record["models"]:
        if row["library"] == library:
            key = (row["kind"], row["verdict"], round(row["attention"], 2), tuple(row["reasons"]))
            groups.setdefault(key, []).append(row)
    order = ("integer", "partly", "refused")
    rows = []
    for (kind, verdict, attention, reasons), members in sorted(
        groups.items(), key=lambda item: (order.index(item[0][1]), item[0][0], -len(item[1]))
    ):
        names = ", ".join(f"`{row['name']}`" for row in members[:2]) + (", …" if len(members) > 2 else "")
        why = "<br>".join(reason.replace("|", "\\|").replace("*", "\\*") for reason in reasons)
        rows.append({"kind": kind, "n": len(members), "names": names, "verdict": verdict,
                     "attention": None if verdict == "refused" else f"{attention:.0%}", "why": why})  # fmt: skip
    columns = {"kind": "class", "n": "models", "names": "such as", "verdict": "verdict",
               "attention": "integer attention", "why": "what stays float, and why"}  # fmt: skip
    count = {v: sum(r["verdict"] == v for r in record["models"] if r["library"] == library) for v in order}
    total = ", ".join(f"{n} {verdict}" for verdict, n in count.items())
    return f"{library} {record['versions'][library]}: {total}.\n\n{table(rows, columns)}"


def tasks_table(rows: list[dict]) -> str:
    """A table per task: recipes down, splits and metrics across; the float model's first."""
    tables = []
    for task in dict.fromkeys(row["task"] for row in rows):
        lines: dict[str, dict] = {"float": {"recipe": "float"}}
        columns = {"recipe": task}
        for row in (row for row in rows if row["task"] == task):
            line = lines.setdefault(row["recipe"], {"recipe": row["recipe"]})
            key = f"{row['split']} {row['metric']}"
            columns[key] = key
            lines["float"][key] = row["float"]
            line[key] = _metric(row)
            line.setdefault("sqnr", {})[row["split"]] = f"{row['sqnr_db']:.1f}"
            line["same"] = None if row["identical"] is None else "yes" if row["identical"] else "no"
        for line in lines.values():
            line["sqnr"] = " / ".join(line["sqnr"].values()) if "sqnr" in line else None
        columns |= {"sqnr": "SQNR dB by split", "same": "identical"}
        tables.append(table(list(lines.values()), columns))
    return "\n\n".join(tables)


def ordering_table(rows: list[dict]) -> str:
    """Where AIQViT is at least what min-max and RepQ-ViT are, by bit-width: of all tasks' splits and metrics."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        name, _, bits = row["recipe"].rpartition("-")
        name = "aiqvit" if name.startswith("aiqvit") else name
        found.setdefault((bits, row["task"], row["split"], row["metric"]), {})[name] = row
    lines: dict[str, dict] = {}
    columns = {"bits": "AIQViT at"}
    for other, title in (("minmax", "min-max"), ("repq-vit", "RepQ-ViT")):
        columns |= {f"{other} metric": f"metric ≥ {title}", f"{other} sqnr": f"SQNR ≥ {title}"}
        for bits in dict.fromkeys(key[0] for key in found):
            pairs = [(case["aiqvit"], case[other]) for key, case in found.items()
                     if key[0] == bits and {"aiqvit", other} <= set(case)]  # fmt: skip
            metric = sum(_metric(own) >= _metric(theirs) for own, theirs in pairs)
            sqnr = {(a["task"], a["split"]): a["sqnr_db"] >= b["sqnr_db"] for a, b in pairs}
            line = lines.setdefault(bits, {"bits": bits.upper()})
            line[f"{other} metric"] = f"{metric} of {len(pairs)}"
            line[f"{other} sqnr"] = f"{sum(sqnr.values())} of {len(sqnr)}"
    return table(list(lines.values()), columns)


def _metric(row: dict) -> float:
    return row["simulated"] if row["integer"] is None else row["integer"]


def gpu_records() -> list[dict]:
    """The results of ``make gpu-check``, the newest first."""
    files = [path for path in RESULTS.glob("*.json") if not path.stem.endswith((".wrong", ".partial"))]
    records = [record for path in files if "peaks" in (record := json.loads(path.read_text()))]
    return sorted(records, key=lambda record: record["date"], reverse=True)


def serving_tables() -> dict[Path, str]:
    """The files of vitq_kernels/tuning/serving.py, of every GPU that was measured."""
    return {
        serving.FOLDER / f"{slug(record['environment']['gpu'])}{serving.ENDING}": text
        for record in reversed(gpu_records())
        if (text := report.serving_table(record))
    }


def pages() -> dict[Path, str]:
    """Page, or table of a GPU → its text made anew."""
    readme = (ROOT / "README.md").read_text()
    readme = replace(readme, "demo", demo_table(json.loads((RESULTS / "demo.json").read_text())))
    readme = replace(readme, "bench", readme_table(cpu.newest()))
    readme = replace(readme, "ranges", cpu.ranges(cpu.newest(), cpu.newest("avx2")))
    gpu, record = (ROOT / "docs" / "gpu.md").read_text(), next(iter(gpu_records()), None)
    for name, body in (
        ("roofline", report.roofline_table()),
        ("goals", report.goal_table(record)),
        ("results", report.results(record)),
    ):
        gpu = replace(gpu, name, body)
    rows = json.loads(accuracy.RESULTS.read_text())["rows"]
    tables = replace((ROOT / "docs" / "accuracy.md").read_text(), "accuracy", accuracy.tables(rows))
    tables = replace(tables, "leaders", accuracy.leaders(rows))
    methods = replace((ROOT / "docs" / "methods.md").read_text(), "methods", methods_table())
    cost = calibration_table(json.loads((RESULTS / "calibration_cost.json").read_text()))
    methods = replace(methods, "calibration", cost)
    for bench in ("learning", "learning_softmax"):
        methods = replace(methods, bench, cpu.ops_table(cpu.newest(), bench))
    methods = replace(methods, "leak", gap_table(json.loads((RESULTS / "evolution_gap.json").read_text())))
    record = json.loads((RESULTS / "models.json").read_text())
    models = (ROOT / "docs" / "models.md").read_text()
    for library in ("timm", "transformers"):
        models = replace(models, library, models_table(record, library))
    tasks = json.loads((RESULTS / "tasks.json").read_text())["rows"]
    text = replace((ROOT / "docs" / "tasks.md").read_text(), "tasks", tasks_table(tasks))
    tasks = replace(text, "ordering", ordering_table(tasks))
    texts = {"cpu.md": cpu_page((ROOT / "docs" / "cpu.md").read_text())}
    serving_page = (ROOT / "docs" / "serving.md").read_text()
    onnx = onnx_table(json.loads((RESULTS / "onnx.json").read_text()))
    texts["deploy.md"] = replace((ROOT / "docs" / "deploy.md").read_text(), "onnx", onnx)
    texts["serving.md"] = serving_pages(serving_page, json.loads((RESULTS / "serving.json").read_text()))
    texts |= {"tasks.md": tasks, "models.md": models, "gpu.md": gpu, "accuracy.md": tables, "methods.md": methods}
    texts = {ROOT / "docs" / name: text for name, text in texts.items()}
    return {ROOT / "README.md": readme} | texts | serving_tables()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="summary.json of make demo; kept as bench/results/demo.json")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page is out of date")
    args = parser.parse_args()
    if args.demo:
        shutil.copy(args.demo, RESULTS / "demo.json")
    stale = {path: text for path, text in pages().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        if args.check:
            print(f"{path.relative_to(ROOT)} is out of date: run bench/update_docs.py")
        else:
            path.write_text(text)
    drawn = cpu.write_pictures(cpu.newest(), ROOT / "docs" / "figures", args.check)
    if args.check:
        for path in drawn:
            print(f"{path.relative_to(ROOT)} is out of date: run bench/update_docs.py")
    raise SystemExit(int(args.check and bool(stale or drawn)))


if __name__ == "__main__":
    main()
