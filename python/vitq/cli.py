"""The ``vitq`` command: quantize, eval, bench, warmup, export, serve, report, info, list-models, demo."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from typing import Any, NoReturn


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _key_value(text: str) -> tuple[str, Any]:
    key, eq, value = text.partition("=")
    if not eq or not key:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")


def _milliseconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of milliseconds, at least 0")


def _port(text: str) -> int:
    if not text.isdecimal() or len(text) > 5 or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, expected 0 to 65535")
    return int(text)


def _positives(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", metavar="FILE", help="local state dict (.safetensors, .pth) instead of timm's")
    parser.add_argument("--random-weights", action="store_true", help="no weights at all (latency only)")
    parser.add_argument("--outlier", action="store_true", help="the function-preserving outlier variant of the model")
    parser.add_argument(
        "--model-arg", type=_key_value, action="append", default=[], metavar="K=V", help="argument of timm.create_model"
    )


def _set_threads(args: argparse.Namespace) -> None:
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)


def parser() -> argparse.ArgumentParser:
    """The command line, as argparse sees it."""
    top = _Parser(prog="vitq", description="Quantize vision transformers and run them on integer kernels.")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="figures as JSON on stdout")
        sub.add_argument("--threads", type=_positive, help="torch threads (default: torch's own choice)")
        return sub

    from . import commands as run

    data = (
        "an image folder, digits, contours; clouds or boxes: docs/tasks.md (default: that of a model shipped with vitq)"
    )
    p = command("quantize", run.quantize, "Calibrate a float model; write, evaluate and time its integer form.")
    p.add_argument("model", help="timm architecture")
    p.add_argument("output", help="checkpoint folder to write")
    _model_arguments(p)
    p.add_argument("--recipe", default="vitq-w4a8", help="a shipped recipe (see vitq info) or a YAML file")
    p.add_argument(
        "--set",
        dest="overrides",
        type=_key_value,
        action="append",
        default=[],
        metavar="K=V",
        help="override a field; JSON if nested",
    )
    p.add_argument(
        "--budget",
        type=_key_value,
        action="append",
        default=[],
        metavar="K=V",
        help="of a mixed-precision recipe, as a fraction of float32: size=0.2, bitops=0.03, latency=0.6",
    )
    p.add_argument("--data", help=data)
    p.add_argument("--images", type=_positive, help="calibration images (default: the recipe's)")
    p.add_argument("--eval-images", type=_positive, help="evaluate on so many test images (default: all)")
    p.add_argument("--no-eval", action="store_true", help="write the checkpoint only")
    p.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    p.add_argument("--work-dir", help="keeps progress, so that an interrupted run resumes (default: OUTPUT.work)")
    p.add_argument("--fast", action="store_true", help="the recipe's reduced iterations, as the demo uses them")
    p.add_argument("--force", action="store_true", help="replace an existing checkpoint")

    p = command("eval", run.evaluate, "Top-1, agreement and SQNR of the float, simulated and integer model.")
    p.add_argument("checkpoint")
    p.add_argument("--data", help=data)
    p.add_argument("--split", default="test", help="test (default), hard (digits, contours, primitives), train")
    p.add_argument("--modes", default="float,simulated,integer", help="which of them, comma-separated")
    p.add_argument("--backend", help="run the integer model on this back end (see vitq info)")
    p.add_argument("--limit", type=_positive, help="so many images only")
    p.add_argument("--batch-size", type=_positive, default=64)
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")

    p = command("bench", run.bench, "Latency, throughput, memory and size against the float model.")
    p.add_argument("model", help="checkpoint folder, or timm architecture (quantized with --recipe on random images)")
    _model_arguments(p)
    p.add_argument("--recipe", default="vitq-w4a8,vitq-w8a8", help="comma-separated; for a timm architecture")
    p.add_argument("--batch", type=_positives, default=[1, 8], metavar="B,B", help="batch sizes (default: 1,8)")
    p.add_argument("--bench-threads", type=_positives, metavar="T,T", help="thread counts (default: torch's choice)")
    p.add_argument("--seconds", type=_seconds, default=3.0, help="per model and setting (default: 3)")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ... (in CUDA graphs, as it is served)")
    p.add_argument("--dtype", default="float32", help=f"of the images: {', '.join(run.DTYPES)} (default: float32)")
    p.add_argument(
        "--profile", action="store_true", help="also time per layer and operator beside what the machine can do"
    )

    p = command("warmup", run.warmup, "Compile the Triton kernels of a checkpoint before its first request.")
    p.add_argument("checkpoint")
    p.add_argument("--batch", type=_positives, default=[1, 8, 64], metavar="B,B", help="batch sizes (default: 1,8,64)")
    p.add_argument("--dtype", default="float16", metavar="D,D", help=f"of {', '.join(run.DTYPES)} (default: float16)")
    p.add_argument(
        "--gpu", action="append", default=[], help='such as sm_90 or "NVIDIA H200"; repeatable (default: the one here)'
    )

    p = command("export", run.export, "Write the integer model for torch without vitq, ONNX or Triton.")
    p.add_argument("checkpoint")
    p.add_argument("--output", required=True, metavar="FILE", help="file to write, *.pt2 or *.onnx; or folder")
    p.add_argument("--format", default="exported", help=f"{', '.join(run.FORMATS)} (default: exported)")
    p.add_argument("--batch", type=_positive, help="fix the batch size (default: any)")
    p.add_argument("--dtype", default="float32", help=f"of the images: {', '.join(run.DTYPES)} (default: float32)")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    p.add_argument("--force", action="store_true", help="replace an existing file")

    p = command("serve", run.serve, "Answer requests over HTTP: Open Inference Protocol v2, images, a page, metrics.")
    p.add_argument("checkpoint")
    p.add_argument("--name", help="of the model in URLs (default: the checkpoint folder's)")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    p.add_argument("--port", type=_port, default=8000, help="0 takes a free one (default: 8000)")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    p.add_argument("--dtype", default="float32", help=f"of activations: {', '.join(run.DTYPES)} (default: float32)")
    p.add_argument("--backend", help="pin the integer modules to this back end (see vitq info)")
    p.add_argument("--engine", choices=("local", "ray"), default="local", help="this process (default) or Ray Serve")
    p.add_argument("--replicas", type=_positive, default=1, help="workers, each with --threads torch threads")
    p.add_argument("--max-replicas", type=_positive, help="with --engine ray: as many at most, by load")
    p.add_argument("--target", type=float, help="with --max-replicas: requests in progress for each (default: 32)")
    p.add_argument("--max-batch", type=_positive, default=32, help="images of a request and of a batch (default: 32)")
    p.add_argument(
        "--max-delay", type=_milliseconds, default=1.0, metavar="MS", help="wait for company (default: 1 ms)"
    )
    p.add_argument("--max-queue", type=_positive, default=256, help="images that may wait (default: 256)")
    p.add_argument("--max-pending", type=_positive, default=1024, help="requests in progress (default: 1024)")
    p.add_argument("--max-bytes", type=_positive, default=20, metavar="MIB", help="of a body (default: 20 MiB)")
    p.add_argument(
        "--max-pixels", type=_positive, default=50_000_000, help="of an image, resized too (default: 50 million)"
    )
    p.add_argument(
        "--body-timeout", type=_seconds, default=10.0, metavar="S", help="for a body to arrive (default: 10)"
    )
    p.add_argument("--timeout", type=_seconds, default=30.0, metavar="S", help="for its answer (default: 30)")
    p.add_argument("--token-file", metavar="FILE", help="bearer token that requests need (or VITQ_TOKEN)")
    p.add_argument("--tls-cert", metavar="FILE", help="certificate chain, PEM")
    p.add_argument("--tls-key", metavar="FILE", help="private key, PEM")
    p.add_argument("--float", action="store_true", help="also load the float model, for comparison on the page")
    p.add_argument("--log-level", choices=("debug", "info", "warning"), default="info", help="info logs requests")

    p = command("report", run.report, "Write what a checkpoint is as one HTML page without references.")
    p.add_argument("checkpoint")
    p.add_argument("-o", "--output", required=True, metavar="FILE", help="page to write, *.html")
    p.add_argument("--force", action="store_true", help="replace an existing file")

    p = command("info", run.info, "What is built, what is live, and why not; or what a checkpoint holds.")
    p.add_argument("checkpoint", nargs="?")

    p = command(
        "list-models", run.list_models, "Vision transformers that can be quantized, how far, and why not further."
    )
    p.add_argument("pattern", nargs="?", default="*", help="architectures, such as 'vit_*' (default: all; minutes)")

    p = command("demo", run.demo, "The main job on the shipped models: real handwriting, or another task.")
    p.add_argument("--output", default="build/demo")
    tasks = "image-classification, cloud-classification, part-segmentation, detection or instance-segmentation"
    p.add_argument("--task", help=f"{tasks} (default: handwritten digits)")
    p.add_argument("--recipes", type=lambda text: text.split(","), help="of a task: only these, comma-separated")
    p.add_argument("--limit", type=_positive, help="of a task: so many samples per split")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 with one line on stderr for bad input, 130 when interrupted."""
    args = parser().parse_args(argv)
    try:
        _set_threads(args)
        args.run(args)
    except KeyboardInterrupt as stop:
        print("; ".join(("vitq: interrupted", *map(str, stop.args))), file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        if args.debug:
            raise
        print(f"vitq: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
