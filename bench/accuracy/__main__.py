"""Run models x variants x recipes x seeds and keep the figures: `python -m bench.accuracy`.

    python -m bench.accuracy --models vit swin --recipes repq-vit erq vitq --bits w4a4 w3a3
    python -m bench.accuracy --data /data/imagenet --models deit_tiny_patch16_224 --recipes aiqvit-w4a4 --variants plain

Without --data, models are those of `bench.models`, each on its own images. With an image folder they are timm names,
with timm's weights or those in a folder; published figures stand beside ours where `papers.yaml` has them. What is
finished is kept and not run again unless recipe, weights, images, seed or code changed; an interrupted run goes on by
the same command. Each case runs in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vitq.bench.environment import environment
from vitq.recipes import load_recipe
from vitq.sources import ModelSource

from bench.accuracy import code, report
from bench.accuracy.case import VARIANTS, Case
from bench.models import MODELS

ROOT = Path(__file__).resolve().parents[2]
CLOSED_FORMS = (
    "minmax", "percentile", "mse", "bias-correction", "ptq4vit", "ptq4vit-tables", "repq-vit", "repq-vit-tables",
    "erq", "erq-tables", "adalog", "adalog-tables", "mptq-vit", "lrp-qvit", "mix-qvit", "lampq",
)  # fmt: skip
LEARNED = ("brecq", "qdrop", "is-vit", "aphq-vit", "fima-q", "pack-ptq", "aiqvit")
#: What the table holds: every method at W4A4, a few at the other widths.
RECIPES = (
    "vitq-w4a4", "vitq-strict-w4a4", "vitq-mixed", "pmq-mixed", *(f"{name}-w4a4" for name in CLOSED_FORMS),
    *(f"{name}-{bits}" for bits in ("w3a3", "w6a6", "w8a8", "w4a8", "w2a4") for name in (
        "vitq", "vitq-strict", "minmax", "repq-vit-tables", "erq-tables"
    )),
    *(f"{name}-w4a4" for name in LEARNED), "pack-ptq-mixed", "cptv-w4a8", "cptv-w8a8",
)  # fmt: skip
#: Images per split; of others all count.
LIMITS = {"contours": 1000}


def cases(args: argparse.Namespace) -> list[Case]:
    """Every combination. Raises: ValueError for an unknown model or recipe, before anything has run."""
    own = args.data is None
    found = []
    for seed, recipe_name, bits, variant, name in itertools.product(
        range(args.seeds), args.recipes, args.bits or [None], args.variants, args.models or list(MODELS)
    ):
        source, data = _model(name, args.data, args.weights)
        source = replace(source, outlier=variant == "outlier")
        recipe = recipe_name if bits is None else f"{recipe_name}-{bits}"
        recipe = load_recipe(recipe, fast=own if args.fast is None else args.fast)
        limit = LIMITS.get(data) if args.limit is None else args.limit
        found.append(Case.of(name, source, data, recipe, seed, limit, args.threads, str(args.cache)))
    return found


def _model(name: str, data: str | None, weights: Path | None) -> tuple[ModelSource, str]:
    if data is None:
        if name not in MODELS:
            raise ValueError(f"--models has {name!r}, expected some of {', '.join(MODELS)}, or --data and timm names")
        return MODELS[name].source, MODELS[name].data
    if weights is None:
        return ModelSource(name), data
    files = [path for path in sorted(weights.glob(f"{name}.*")) if path.suffix in (".safetensors", ".pth", ".bin")]
    if not files:
        raise ValueError(f"--weights is '{weights}', expected a folder with {name}.safetensors, .pth or .bin")
    return ModelSource(name, weights=str(files[0])), data


def perform(case: Case) -> list[dict[str, Any]]:
    """The rows of `case`, from a process of its own. Raises: RuntimeError with what it wrote to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.json"
        path.write_text(json.dumps(asdict(case)))
        search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-m", "bench.accuracy.case", str(path)],
            env=os.environ | {"PYTHONPATH": search},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:] or f"exit status {done.returncode}")
        return json.loads(path.read_text())


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Atomically, in a stable order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    rows = sorted(rows, key=lambda row: [str(row[k]) for k in (*KEY, "split")])
    partial.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    os.replace(partial, path)


KEY = ("data", "model", "variant", "recipe", "seed")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help=f"of {', '.join(MODELS)} (default: all); timm names with --data")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--recipes", nargs="+", default=list(RECIPES), help="shipped or YAML files (default: the table's)"
    )
    parser.add_argument("--bits", nargs="+", metavar="w4a4", help="every recipe at these bits (default: its own)")
    parser.add_argument("--seeds", type=int, default=3, help="so many: 0, 1, ... (default: 3)")
    parser.add_argument("--data", help="digits, contours or an image folder (default: what the model was trained on)")
    parser.add_argument("--weights", type=Path, help="folder with <model>.safetensors, .pth or .bin; with --data")
    parser.add_argument("--limit", type=int, help=f"images per split (default: {LIMITS}, others all)")
    parser.add_argument(
        "--fast", action=argparse.BooleanOptionalAction, help="the recipes' reduced iterations (default: if no --data)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--threads", type=int, default=1, help="torch threads per case")
    parser.add_argument("--output", type=Path, default=report.RESULTS)
    parser.add_argument("--keep", action="store_true", help="what is finished stays, though the code has changed since")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "accuracy", help="keeps float logits")
    args = parser.parse_args(argv)
    try:
        wanted = {case.digest(): case for case in cases(args)}
    except ValueError as error:
        parser.error(str(error))
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    finished = {row["digest"] for row in rows if args.keep or row["code"] == code.digest()}
    missing = {digest: case for digest, case in wanted.items() if digest not in finished}
    print(f"{len(wanted)} cases, {len(wanted) - len(missing)} of them finished", flush=True)
    failures = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(perform, case): case for case in missing.values()}
        for count, future in enumerate(as_completed(futures), 1):
            case = futures[future]
            title = " ".join(str(case.key[k]) for k in KEY)
            try:
                new = future.result()
            except RuntimeError as error:
                failures += 1
                print(f"{count}/{len(missing)} {title} FAILED\n{error}", flush=True)
                continue
            rows = [row for row in rows if any(row[k] != case.key[k] for k in KEY)] + new
            write(args.output, rows)
            figures = ", ".join(f"{r['split']} {r['top1_simulated']:.2f} % ({r['top1_float']:.2f})" for r in new)
            print(f"{count}/{len(missing)} {title}: {figures}, {new[0]['calibration_s']:.0f} s", flush=True)
    print(report.tables([row for row in rows if row["digest"] in wanted]))
    if failures:
        print(f"{failures} cases failed; the same command tries them again", file=sys.stderr)
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
