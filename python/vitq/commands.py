"""What the subcommands of ``vitq`` do. Heavy imports live here, behind the parser."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import nn
from torch.utils.data import Dataset

from vitq_kernels import _native, backends
from vitq_kernels.triton import host as triton_host
from vitq_kernels.triton import warmup as warm

from . import checkpoint, console, devices, jobs, parallel, plots, qdq, recipes, tasks
from . import export as exporting
from . import report as reporting
from .allocation.plot import draw_frontier, draw_packs
from .bench import host
from .bench import profile as profiling
from .bench.environment import environment
from .bench.latency import threads
from .convert import to_integer
from .data import BUNDLED, clouds, coco, load_data, refuse_leak, splits
from .data.coco import DetectionData
from .detect import KINDS, as_tensor, precisions
from .evaluate import agreement, sqnr_db, top1
from .files import write_text
from .models import adapter_for
from .models import support as supported
from .restore import to_simulated
from .sources import ModelSource, load_float

MODES = ("float", "simulated", "integer")
DTYPES = ("float32", "float16", "bfloat16")
RESUMES = "the same command resumes where it stopped"
FORMATS = (*exporting.FORMATS, "onnx", "triton")
RUN_COLUMNS = {
    "split": "split",
    "top1_float": "float top-1 %",
    "top1_simulated": "simulated %",
    "top1_integer": "integer %",
    "agreement_simulated_integer": "sim = int",
    "logit_sqnr_db": "SQNR dB",
}
DETECTION_COLUMNS = {
    "split": "split",
    **{f"{name} {kind}": f"{name} {kind}" for name in KINDS for kind in ("float", "simulated", "integer")},
    "identical": "sim = int",
}
BENCH_COLUMNS = {
    "model": "model",
    "batch": "batch",
    "threads": "threads",
    "latency_ms": "ms",
    "p20": "p20",
    "p80": "p80",
    "images_per_second": "images/s",
    "speedup": "speed-up",
    "peak_mb": "peak MB",
    "model_mb": "model MB",
}
SUPPORT_COLUMNS = {
    "name": "model",
    "kind": "class",
    "verdict": "verdict",
    "attention": "integer attention",
    "weights": "integer weights",
    "reasons": "what stays float, and why",
}
PROFILE_COLUMNS = {
    "name": "what",
    "calls": "calls",
    "ms": "ms",
    "share": "share",
    "gb_s": "GB/s",
    "gop_s": "Gop/s",
    "floor_ms": "floor ms",
    "of_floor": "floor / time",
    "bound": "bound by",
}
WARMUP_COLUMNS = {
    "gpu": "GPU",
    "dtype": "dtype",
    "batch": "batch",
    "launches": "launches",
    "kernels": "kernels",
    "seconds": "s",
}


def _emit(args: argparse.Namespace, record: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps(record, indent=2))


def _refuse_existing(target: Path, args: argparse.Namespace) -> None:
    if target.exists() and not args.force:
        raise ValueError(f"'{target}' exists already; give --force to replace it")


def _source(args: argparse.Namespace) -> ModelSource:
    if args.weights and args.random_weights:
        raise ValueError("--weights and --random-weights are both given, expected at most one")
    # Absolute, so that vitq eval finds it from anywhere.
    weights = args.weights and os.path.abspath(args.weights)
    return ModelSource(args.model, not args.random_weights, weights, args.outlier, dict(args.model_arg))


def _data(given: str | None, architecture: str) -> str:
    """``--data``, by default what a model that ships with vitq was trained on."""
    own = {task.source.name: task.data for task in tasks.TASKS.values()}
    source = own.get(architecture) if given is None else given
    if source is None:
        raise ValueError(
            f"--data is missing, expected the data of {architecture}: an image folder, or see docs/tasks.md"
        )
    known = source in BUNDLED or clouds.is_source(source) or coco.is_source(source)
    if not known and not Path(source).is_dir():
        raise ValueError(f"--data is {source!r}, expected an image folder, {', '.join(BUNDLED)}, or see docs/tasks.md")
    return source


def _check_backend(name: str | None) -> None:
    if name is not None and name not in backends.NAMES:
        raise ValueError(f"--backend is {name!r}, expected one of {', '.join(backends.NAMES)}")


@contextmanager
def _interruptible(then: str) -> Iterator[None]:
    """``then``: what an interruption here leaves, for its message."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(then) from error


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar that calibration's progress callback moves; of several processes the first shows it."""
    with console.progress(disable=parallel.rank() > 0) as bar:
        task = bar.add_task("calibrating", total=None)
        yield lambda step, done, total: bar.update(task, description=step, completed=done, total=total)


def _splits(data: str, model: nn.Module, limit: int | None) -> dict[str, Any]:
    return {name: load_data(data, name, model, limit) for name in splits(data)}


def _refuse(recipe: recipes.Recipe) -> None:
    """Before a calibration that ends in nothing. Raises: ValueError for a recipe without an integer form."""
    if recipe.refusal:
        raise ValueError(
            f"recipe {recipe.name} exists in simulation only: {recipe.refusal}; vitq.calibrate.calibrate gives its "
            "simulated model"
        )


def quantize(args: argparse.Namespace) -> None:
    out = console.make(args.json)
    recipe = recipes.load_recipe(args.recipe, fast=args.fast, **dict(args.overrides))
    if args.budget:
        recipe = recipe.with_budget(dict(args.budget))
    _refuse(recipe)
    if args.images:
        recipe = recipe.model_copy(
            update={"calibration": recipe.calibration.model_copy(update={"images": args.images})}
        )
    target = Path(args.output)
    _refuse_existing(target, args)
    # Before hours of calibration rather than after them.
    checkpoint.check_target(target, args.force)
    source = _source(args)
    model = load_float(source)
    adapter_for(model)
    data = _data(args.data, source.name)
    if args.images and data in BUNDLED and args.images > (most := BUNDLED[data].counts["train"]):
        raise ValueError(f"--images is {args.images}, expected 1 to {most}, the training images of the {data}")
    if not args.no_eval:
        refuse_leak(data, model)
    splits = {} if args.no_eval else _splits(data, model, args.eval_images)
    work = Path(args.work_dir) if args.work_dir else target.with_name(target.name + ".work")
    with _interruptible(RESUMES), parallel.launched() as device, _progress() as progress:
        done = jobs.quantize(
            model, source, recipe, data, seed=args.seed, work_dir=work, progress=progress, device=device
        )
        if parallel.rank():
            return
    metrics = done.state.metrics | {"calibration_s": done.seconds}
    frontier = metrics.get("frontier")
    if frontier is not None:
        # The other points, hundreds to thousands, are a file beside the checkpoint's own.
        metrics["frontier"] = frontier | {"points": [frontier["points"][frontier["picked"]]], "picked": 0}
    with _interruptible(RESUMES):
        checkpoint.save(target, replace(done.state, metrics=metrics), overwrite=args.force)
    _write_allocation(out, target, frontier, metrics.get("packs"), f"{source.name}, {recipe.name}")
    reporting.write_evaluation(target, None)
    if not args.work_dir:
        shutil.rmtree(work, ignore_errors=True)
    record: dict[str, Any] = {"checkpoint": str(target), "recipe": recipe.name, "calibration_s": done.seconds}
    out.print(f"{target}: {recipe.name}, calibrated in {done.seconds:.1f} s, {_reasons(done.integer)}")
    if splits:
        with _interruptible(f"the checkpoint is written: vitq eval {target} evaluates it"):
            for each in (model, done.calibrated.sim, done.integer):
                each.to(device)
            rows = jobs.evaluate(jobs.predict_splits(model, splits), done.calibrated.sim, done.integer, splits)
            times = jobs.time_models({"float": model, "integer": done.integer}, [1], 1.0)
        record["runs"] = jobs.summarize(recipe, done, model, checkpoint.disk_bytes(target), rows, times)
        reporting.write_evaluation(target, record["runs"])
        console.print_rows(out, f"{source.name}, {recipe.name}", record["runs"], _columns(record["runs"]))
        run = record["runs"][0]
        where = f"{run['threads']} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
        out.print(
            f"batch 1, {where}: float {run['latency_ms_float']:.2f} ms, integer "
            f"{run['latency_ms_integer']:.2f} ms ({run['speedup']:.2f}x); "
            f"{run['size_bytes_float'] / 1e6:.2f} MB -> {run['size_bytes_integer'] / 1e6:.2f} MB"
        )
    _emit(args, record)


def _columns(runs: list[dict[str, Any]]) -> dict[str, str]:
    """Of rows of ``jobs.evaluate``; masks only where there are any."""
    columns = RUN_COLUMNS if "top1_float" in runs[0] else DETECTION_COLUMNS
    return {name: title for name, title in columns.items() if runs[0].get(name) is not None or name == "identical"}


def _write_allocation(
    out: Console, folder: Path, frontier: dict[str, Any] | None, packs: list[Any] | None, title: str
) -> None:
    """``frontier.json`` and, where matplotlib is there, the pictures; those of an earlier checkpoint go."""
    data = folder / reporting.FRONTIER
    data.unlink(missing_ok=True)
    if frontier is not None:
        write_text(data, json.dumps(frontier, indent=1) + "\n")
    for name, draw, record in (("frontier.png", draw_frontier, frontier), ("packs.png", draw_packs, packs)):
        (folder / name).unlink(missing_ok=True)
        if record is not None and find_spec("matplotlib"):
            draw(record, title).png(folder / name)
        elif record is not None:
            out.print(f"no {name}: {plots.NEEDED}")


def _reasons(integer: nn.Module) -> str:
    report = integer.vitq_report
    return f"{len(report.integer)} integer sites, {len(report.floating)} float modules (vitq info lists them)"


def evaluate(args: argparse.Namespace) -> None:
    out = console.make(args.json)
    modes = args.modes.split(",")
    if unknown := [m for m in modes if m not in MODES]:
        raise ValueError(f"--modes has {unknown[0]!r}, expected a selection of {', '.join(MODES)}")
    _check_backend(args.backend)
    device = _device(args.device)
    state, config = checkpoint.load_state(args.checkpoint)
    source = _data(args.data, config.architecture)
    skeleton = checkpoint.build_float(Path(args.checkpoint), config)
    build = {
        "float": lambda: load_float(_recorded_source(config)),
        "simulated": lambda: to_simulated(skeleton, state),
        "integer": lambda: to_integer(skeleton, state, args.backend),
    }
    models = {mode: build[mode]().to(device) for mode in modes}
    data = load_data(source, args.split, skeleton, args.limit)
    outputs: dict[str, jobs.Prediction] = {}
    # The simulated model, too, takes its float stages from the back end.
    pin = contextlib.nullcontext() if args.backend is None else backends.backend(args.backend)
    with pin, console.progress() as bar:
        task = bar.add_task("evaluating", total=len(data) * len(models))
        for mode, model in models.items():
            outputs[mode] = jobs.predictions(model, data, args.batch_size, lambda n: bar.advance(task, n))
    rows = [_evaluation(mode, outputs, data) for mode in modes]
    columns = {
        "mode": "mode",
        "top1": "top-1 %",
        **{name: name for name in KINDS},
        "sqnr_db": "SQNR to float dB",
        "agreement_float": "= float",
        "agreement_simulated": "= simulated",
    }
    columns = {name: title for name, title in columns.items() if name in rows[0]}
    console.print_rows(out, f"{args.checkpoint} on {source}/{args.split}, {len(data)} images", rows, columns)
    _emit(args, {"checkpoint": args.checkpoint, "split": args.split, "images": len(data), "rows": rows})


def _recorded_source(config: checkpoint.Config) -> ModelSource:
    try:
        return ModelSource(**config.source)
    except TypeError as error:
        raise ValueError("the checkpoint does not say where its float model came from; leave float out") from error


def _evaluation(mode: str, outputs: dict[str, jobs.Prediction], data: Dataset) -> dict[str, Any]:
    if isinstance(data, DetectionData):
        pair = [as_tensor(outputs[name]) for name in (mode, "simulated") if name in outputs]
        same = torch.equal(*pair) if "simulated" in outputs else None
        return {"mode": mode, **precisions(outputs[mode], data), "agreement_simulated": same}
    logits = {name: logits for name, (logits, _) in outputs.items()}
    row: dict[str, Any] = {"mode": mode, "top1": top1(*outputs[mode])}
    for other in ("float", "simulated"):
        row[f"agreement_{other}"] = agreement(logits[other], logits[mode]) if other in logits else None
    reference = logits.get("float")
    row["sqnr_db"] = None if reference is None or mode == "float" else sqnr_db(reference, logits[mode])
    return row


def bench(args: argparse.Namespace) -> None:
    out = console.make(args.json)
    dtype, device = _dtype(args.dtype), _device(args.device)
    if args.profile and device.type != "cpu":
        raise ValueError(f"--profile is given with --device {args.device}, expected cpu: it measures a processor")
    if not Path(args.model).exists() and os.sep in args.model:
        raise ValueError(f"model is {args.model!r}, where nothing is; expected a checkpoint folder, or an architecture")
    if Path(args.model).exists():
        state, config = checkpoint.load_state(args.model)
        model = checkpoint.build_float(Path(args.model), config)
        models = {args.dtype: model, config.recipe.get("name", "integer"): to_integer(model, state)}
    else:
        models = _calibrated_on_noise(args)
    models = {name: model.to(device, dtype) for name, model in models.items()}
    rows: list[dict[str, Any]] = []
    for n in args.bench_threads or [torch.get_num_threads()]:
        with threads(n):
            rows += jobs.time_models(models, args.batch, args.seconds)
    for row in rows:
        peak = row["activation_peak_bytes"]
        row["peak_mb"] = None if peak is None else peak / 1e6
        row["model_mb"] = row["model_bytes"] / 1e6
    record: dict[str, Any] = {"model": args.model, "environment": environment(), "rows": rows}
    if device.type == "cuda":
        record["environment"]["gpu"] = torch.cuda.get_device_name(device)
    where = record["environment"].get("gpu", record["environment"]["cpu"])
    console.print_rows(out, f"{args.model} on {where}", rows, BENCH_COLUMNS)
    if args.profile:
        record["profiles"] = _profiles(args, models, out)
    _emit(args, record)


def _profiles(args: argparse.Namespace, models: dict[str, nn.Module], out: Console) -> dict[str, Any]:
    """Model → profile at the first batch size and number of threads."""
    n = (args.bench_threads or [torch.get_num_threads()])[0]
    try:
        ceilings = host.measure(n)
        peaks = ", ".join(f"{operand} {rate / 1e9:.0f} Gop/s" for operand, rate in ceilings.peak.items())
        rates = ", ".join(f"{size >> 10} KiB {rate / 1e9:.1f} GB/s" for size, rate in ceilings.bandwidth.items())
        out.print(f"ceilings of {n} threads, {ceilings.isa}: {peaks}; copies within {rates}")
    except host.Unmeasured as error:
        ceilings = None
        out.print(f"no ceilings: {error}")
    found = {}
    images = jobs.random_images(models, args.batch[0])
    for name, model in models.items():
        found[name] = profile = profiling.profile(model, images, n, ceilings)
        share = f"{profile['ms']:.2f} ms, {profile['recorded_ms']:.2f} ms in operators"
        title = f"{name}, batch {profile['batch']}, {n} threads: {share}"
        for what, most in (("ops", 12), ("layers", 16)):
            rest = "" if len(profile[what]) <= most else f" (the longest {most} of {len(profile[what])})"
            console.print_rows(out, f"{title}; {what}{rest}", profile[what][:most], PROFILE_COLUMNS)
    return found


def _calibrated_on_noise(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The float model and its integer forms; latency does not depend on what the images show."""
    source = _source(args)
    model = load_float(source)
    images = jobs.random_images({args.dtype: model}, 8)
    models: dict[str, nn.Module] = {args.dtype: model}
    with _progress() as progress:
        for name in args.recipe.split(","):
            recipe = recipes.load_recipe(name, fast=True)
            _refuse(recipe)
            models[recipe.name] = jobs.quantize(model, source, recipe, images, progress=progress).integer
    return models


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"--dtype has {name!r}, expected one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def _device(name: str) -> torch.device:
    device = devices.checked(name, "--device")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}, expected cpu, cuda or cuda:<index>")
    return device


def warmup(args: argparse.Namespace) -> None:
    out = console.make(args.json)
    dtypes = {name: _dtype(name) for name in args.dtype.split(",")}
    gpus = [warm.find_gpu(name) for name in args.gpu] or [warm.present()]
    if None in gpus:
        raise ValueError("there is no CUDA device here; say for which to compile with --gpu (sm_90, h200, ...)")
    if not triton_host.INSTALLED:
        raise ValueError("triton is not installed, so there is nothing to compile")
    model = checkpoint.load(args.checkpoint)
    size = model.vitq_config.data.input_size
    rows = []
    every: set[str] = set()
    for gpu, dtype, batch in itertools.product(gpus, dtypes, args.batch):
        row = {"gpu": gpu.name or f"sm_{gpu.capability}", "dtype": dtype, "batch": batch}
        start = time.perf_counter()
        with console.progress() as bar:
            task = bar.add_task(f"{row['gpu']}, {dtype}, batch {batch}", total=None)
            launches = warm.record(model, [(batch, *size)], gpu, dtypes[dtype])
            kernels = warm.compile_launches(launches, gpu, partial(_advance, bar, task))
        row |= {"launches": len(launches), "kernels": len(kernels), "seconds": time.perf_counter() - start}
        rows.append(row)
        every |= kernels
    console.print_rows(out, f"{args.checkpoint}: compiled kernels", rows, WARMUP_COLUMNS)
    out.print(f"{len(every)} kernels in {warm.cache_folder()}")
    _emit(args, {"checkpoint": args.checkpoint, "cache": warm.cache_folder(), "kernels": len(every), "rows": rows})


def _advance(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


def export(args: argparse.Namespace) -> None:
    out = console.make(args.json)
    target = Path(args.output)
    _refuse_existing(target, args)
    if args.format == "triton":
        from .serving import triton

        _dtype(args.dtype)
        triton.write(args.checkpoint, target, args.device, args.dtype, overwrite=args.force)
        out.print(f"{target}: a model of the Triton model repository '{target.parent}'")
        _emit(args, {"output": str(target), "format": args.format})
        return
    if args.format not in FORMATS:
        raise ValueError(f"format is {args.format!r}, expected one of {', '.join(FORMATS)}")
    if args.format == "onnx":
        _export_onnx(args, target, out)
        return
    dtype, device = _dtype(args.dtype), _device(args.device)
    exporting.check_target(target, exporting.SUFFIX, overwrite=True)
    model = checkpoint.load(args.checkpoint, device).to(dtype)
    size = model.vitq_config.data.input_size
    start = time.perf_counter()
    exporting.write(model, target, size, args.format, args.batch, overwrite=args.force)
    seconds, size = time.perf_counter() - start, target.stat().st_size
    out.print(f"{target}: {args.format}, {size / 1e6:.2f} MB, in {seconds:.1f} s")
    _emit(args, {"output": str(target), "format": args.format, "bytes": size, "seconds": seconds})


def _export_onnx(args: argparse.Namespace, target: Path, out: Console) -> None:
    if (args.dtype, args.device) != ("float32", "cpu"):
        raise ValueError(f"dtype and device are {args.dtype} and {args.device}, of ONNX expected float32 and cpu")
    exporting.check_target(target, qdq.SUFFIX, overwrite=True)
    start = time.perf_counter()
    state, config = checkpoint.load_state(args.checkpoint)
    sim = to_simulated(checkpoint.build_float(Path(args.checkpoint), config), state)
    written = qdq.write(sim, target, config.data.input_size, args.batch, overwrite=args.force)
    seconds = time.perf_counter() - start
    out.print(
        f"{target}: onnx, {written.bytes / 1e6:.2f} MB, {written.quantize} QuantizeLinear, {written.dequantize} "
        f"DequantizeLinear, {written.products} MatMulInteger, {written.int4} weights in int4 and {written.int8} in "
        f"int8, in {seconds:.1f} s"
    )
    _emit(args, {"output": str(target), "format": args.format, "seconds": seconds, **asdict(written)})


def report(args: argparse.Namespace) -> None:
    out = console.make(args.json)
    target = Path(args.output)
    _refuse_existing(target, args)
    figures = reporting.collect(Path(args.checkpoint))
    page = reporting.render(figures)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, page)
    out.print(f"{target}: {target.stat().st_size / 1e3:.0f} kB")
    _emit(args, {"output": str(target), "page_bytes": target.stat().st_size, "figures": figures})


def info(args: argparse.Namespace) -> None:
    out = console.make(args.json)
    if args.checkpoint:
        _describe_checkpoint(args, out)
        return
    extension = _native.extension()
    live = {name: reason or "live" for name, reason in backends.status().items()}
    record = {
        "environment": environment(),
        "backends": live,
        "build": None if extension is None else extension.build_info(),
        "cpu_features": None if extension is None else list(extension.cpu_features()),
        "recipes": recipes.names(),
    }
    rows = [{"name": k, "value": v} for k, v in record["environment"].items()]
    rows += [{"name": f"back end {k}", "value": v} for k, v in live.items()]
    rows += [{"name": k, "value": str(record[k])} for k in ("build", "cpu_features")]
    rows.append({"name": "recipes", "value": ", ".join(record["recipes"])})
    console.print_rows(out, "vitq", rows, {"name": "", "value": "what"})
    _emit(args, record)


def _describe_checkpoint(args: argparse.Namespace, out: Console) -> None:
    model = checkpoint.load(args.checkpoint)
    report, config = model.vitq_report, model.vitq_config
    rows = [{"path": k, "how": v} for k, v in report.integer.items()]
    rows += [{"path": k, "how": f"float: {v}"} for k, v in report.floating.items()]
    size = checkpoint.disk_bytes(args.checkpoint)
    sizes = f"{size / 1e6:.2f} MB (float {config.float_bytes / 1e6:.2f})"
    title = f"{config.architecture}, {config.recipe.get('name')}, {sizes}"
    console.print_rows(out, title, rows, {"path": "", "how": "what"})
    record = {"architecture": config.architecture, "recipe": config.recipe, "source": config.source, "bytes": size}
    _emit(args, {**record, "float_bytes": config.float_bytes, "integer": report.integer, "float": report.floating})


def recorded_source(path: str) -> ModelSource:
    """Where the float model of the checkpoint at ``path`` came from. Raises: ValueError if it does not say."""
    return _recorded_source(checkpoint.read_config(path))


def serve(args: argparse.Namespace) -> None:
    dtype, device = _dtype(args.dtype), _device(args.device)
    _check_backend(args.backend)
    try:
        from .serving import command

        if args.engine == "ray":
            from .serving import cluster  # noqa: F401
    except ModuleNotFoundError as error:
        extra = "ray" if error.name == "ray" else "serve"
        raise ImportError(f"serving needs {error.name}: pip install 'vitq-kernels[{extra}]'") from error
    command.serve(args, dtype, device)


def list_models(args: argparse.Namespace) -> None:
    out = console.make(args.json)
    found = []
    with console.progress() as bar:
        task = bar.add_task("trying", total=None)
        for one in supported.support(args.pattern):
            found.append(one)
            bar.update(task, description=one.name)
    if not found:
        raise ValueError(f"pattern is {args.pattern!r}, which no vision transformer of timm or transformers matches")
    rows = [asdict(one) | {"reasons": "; ".join(one.reasons)} for one in found]
    console.print_rows(out, "vision transformers", rows, SUPPORT_COLUMNS)
    _emit(args, {"versions": supported.versions(), "models": [asdict(one) for one in found]})


def _demo_of_task(args: argparse.Namespace) -> None:
    out, output = console.make(args.json), Path(args.output)
    if args.task not in tasks.TASKS:
        raise ValueError(f"--task is {args.task!r}, expected {' or '.join(tasks.TASKS)}")
    task = tasks.TASKS[args.task]
    floating = task.evaluate(task.load(), args.limit)
    rows: list[dict[str, Any]] = []
    with _progress() as progress:
        for name in args.recipes or task.recipes:
            rows += tasks.run(task, task.recipe(name), output / name, floating, progress, args.limit)
    summary = {"task": task.name, "environment": environment(), "rows": rows}
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    console.print_rows(out, task.name, rows, {k: v for k, v in tasks.COLUMNS.items() if k != "task"})
    out.print(f"figures: {output / 'summary.json'}")
    _emit(args, summary)


def demo(args: argparse.Namespace) -> None:
    if args.task is not None:
        _demo_of_task(args)
        return
    from . import demo as job

    out = console.make(args.json)
    output = Path(args.output)
    with _progress() as progress:
        summary = job.run(output, progress)
    console.print_rows(out, f"{job.NAME} on handwritten digits", summary["runs"], job.COLUMNS)
    out.print(f"figures: {output / 'summary.json'}   picture: {output / 'demo.png'}")
    _emit(args, summary)
