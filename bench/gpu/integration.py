"""Converted models under what deployment does to them: 16-bit inputs, streams, CUDA graphs, compile, export."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import minmax
import torch
from torch import Tensor, nn
from vitq.bench.latency import compare_models
from vitq.convert import to_integer

from . import models, ops
from .machine import Machine

ROUNDS = 20
"""Calls per stream while two run at once: a race shows in some of them."""


def _model(machine: Machine, dtype: torch.dtype, backend: str) -> tuple[nn.Module, Tensor]:
    """Two blocks with dynamic scales and a branch: every kernel that has a workspace."""
    size = {} if machine.dry else {"img_size": 224, "patch_size": 16, "embed_dim": 384, "num_heads": 6, "mlp_ratio": 4}
    model = minmax.vit(depth=1 if machine.dry else 2, **size).to(machine.device)
    images = models.images_of(machine, model, 2)
    state = models.random_state(model, images, 4, True, 8, "error")
    return to_integer(model, state, backend).to(dtype), images.to(dtype)


def _same(want: Tensor, got: Tensor, what: str) -> None:
    if want.dtype != got.dtype or want.shape != got.shape:
        expected = f"{tuple(want.shape)} {want.dtype}"
        raise AssertionError(f"{what}: result is {tuple(got.shape)} {got.dtype}, expected {expected}")
    if not torch.equal(want, got):
        at = tuple((want != got).nonzero()[0].tolist())
        raise AssertionError(f"{what}: first difference at {at}: {got[at].item():.9g}, expected {want[at].item():.9g}")


def _near(want: Tensor, got: Tensor, what: str) -> None:
    """Up to codes at ties."""
    db = models.sqnr_db(want, got)
    if not db >= models.LEAST_DB["simulated"]:  # NaN, too
        at_least = f"expected at least {models.LEAST_DB['simulated']:g}"
        raise AssertionError(f"{what}: {db:.1f} dB from eager, {at_least}; {models.first_difference(want, got)}")


def _repeat(machine: Machine, model: nn.Module, images: Tensor) -> None:
    want = model(images)
    if not want.isfinite().all():
        at = tuple((~want.isfinite()).nonzero()[0].tolist())
        raise AssertionError(f"logits are not finite; first at {at}")
    for _ in range(1 if machine.dry else 10):
        _same(want, model(images), "the same call again")


def _streams(machine: Machine, model: nn.Module, images: Tensor) -> None:
    """Two streams at once, each with inputs of its own."""
    inputs = [images, images.flip(0) * 0.5]
    wanted = [model(x) for x in inputs]
    machine.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results: list[list[Tensor]] = [[], []]
    for _ in range(ROUNDS):
        for stream, x, into in zip(streams, inputs, results):
            with torch.cuda.stream(stream):
                into.append(model(x))
    machine.synchronize()
    for i, (want, got) in enumerate(zip(wanted, results)):
        for result in got:
            _same(want, result, f"stream {i} of two at once")


def _graph(machine: Machine, model: nn.Module, images: Tensor) -> None:
    want, fresh = model(images), images.flip(0) * 0.5
    want_fresh = model(fresh)
    static = images.clone()
    graph = machine.capture(lambda: model(static))
    for x, expected in ((images, want), (fresh, want_fresh), (images, want)):
        static.copy_(x)
        graph.outputs.fill_(float("nan"))
        graph.replay()
        machine.synchronize()
        _same(expected, graph.outputs, "CUDA graph")


def _graph_beside(machine: Machine, model: nn.Module, images: Tensor) -> None:
    """A graph replayed while the same kernels run outside of it: what blocks count and leave to each other is apart."""
    want = model(images)
    graph, other = machine.capture(lambda: model(images)), torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    results = []
    for _ in range(ROUNDS):
        with torch.cuda.stream(other):
            graph.replay()
        results.append(model(images))
    machine.synchronize()
    _same(want, graph.outputs, "CUDA graph beside eager calls")
    for result in results:
        _same(want, result, "eager beside a CUDA graph")


def _buckets(machine: Machine, model: nn.Module, images: Tensor) -> None:
    from vitq_kernels import graphs

    served = graphs.capture(model, images, batch_sizes=(len(images), 2 * len(images)))
    _same(model(images), served(images), "vitq_kernels.graphs")
    for x in (images[:1], torch.cat([images] * 3)):  # padded and split: other tiles, which may round otherwise
        _near(model(x), served(x), f"vitq_kernels.graphs with {len(x)} images")


def _compile(machine: Machine, model: nn.Module, images: Tensor) -> None:
    """Bit for bit where only the graph is taken; up to codes at ties where the float parts between the ops are, too."""
    want = model(images)
    _same(want, torch.compile(model, fullgraph=True, backend="aot_eager")(images), "torch.compile, aot_eager")
    torch._dynamo.reset()
    _near(want, torch.compile(model, fullgraph=True)(images), "torch.compile")
    torch._dynamo.reset()
    in_graphs = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # warm-up, capture, replays
        _near(want, in_graphs(images).clone(), "torch.compile, reduce-overhead")


def _export(machine: Machine, model: nn.Module, images: Tensor) -> None:
    _same(model(images), torch.export.export(model, (images,)).module()(images), "torch.export")


def _timed(machine: Machine, model: nn.Module, images: Tensor) -> None:
    (row,) = compare_models({"model": model}, images, 1, 0.05)
    if not (row["device"] == "cuda" and row["latency_ms"] > 0.0 and row["activation_peak_bytes"] > 0):
        raise AssertionError(f"vitq bench: {row}")


CHECKS: dict[str, tuple[Callable[[Machine, nn.Module, Tensor], None], bool]] = {
    "the same bits in every call": (_repeat, False),
    "two streams at once": (_streams, True),
    "CUDA graph equals eager": (_graph, True),
    "CUDA graph beside eager calls": (_graph_beside, True),
    "vitq_kernels.graphs equals eager": (_buckets, True),
    "vitq bench times it": (_timed, True),
    "torch.compile(fullgraph=True) equals eager": (_compile, True),
    "torch.export equals eager": (_export, True),
}
"""Name → (check, whether it needs a GPU)."""


def run(machine: Machine) -> Iterator[tuple[str, str]]:
    """(check, "ok" or why it was left out), as they finish. Raises: AssertionError for a wrong result."""
    cases = [(dtype, "triton") for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    cases += [(torch.bfloat16, backend) for backend in ops.served(machine)[1:]]
    for dtype, backend in cases[:1] + cases[3:] if machine.dry else cases:
        model, images = _model(machine, dtype, backend)
        for name, (check, needs_gpu) in CHECKS.items():
            label = f"{name}, {str(dtype).removeprefix('torch.')}{ops.SUFFIX[backend]}"
            if needs_gpu and machine.dry:
                yield label, "missing: needs a GPU"
            else:
                with torch.no_grad():
                    check(machine, model, images)
                yield label, "ok"
