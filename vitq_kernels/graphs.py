"""CUDA graphs of a whole model: one recorded graph per batch size, replayed for any request.

At small batches a model is bound by its launches; a replay is one launch for all of them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

WARMUP_RUNS = 3
"""Runs before a capture: kernels are compiled and loaded, libraries have their workspaces."""


class Graph:
    """One captured batch size.

    Attributes: input [B, ...]: what a replay reads; output [B, ...]: what it writes.
    """

    def __init__(self, model: nn.Module, input: Tensor, pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
        self.input = input
        self._graph = torch.cuda.CUDAGraph()
        # torch's own capture stream belongs to the device that was current when it was first used.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream):
            self.output = model(input)

    def replay(self) -> None:
        self._graph.replay()


class _InOrder:
    """Makes callers on any thread and any stream take turns: on the host by a lock, on the device by an event."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._lock, self._done = device, threading.Lock(), torch.cuda.Event()

    @contextlib.contextmanager
    def __call__(self):
        with self._lock, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)


class GraphedModel:
    """Runs requests of any size in graphs of a few: build with :func:`capture`.

    A request of b images runs in the smallest graph that holds it, filled up with zeros; one larger than the largest
    is split. Results are new tensors, which no later call writes to. Calls from several threads and streams are safe
    and take turns: the graphs share their buffers and one memory pool. For concurrency, capture once per stream.

    Attributes:
        model: the captured model, kept because the graphs read its weights where they are. Values that are copied
            into its tensors count from the next call on; a tensor that is replaced (``.to``, ``setattr``) does not.
        batch_sizes: ascending.
    """

    def __init__(self, model: nn.Module, graphs: Iterable[Graph], in_order: Callable[[], AbstractContextManager]):
        self.model = model
        self._graphs = sorted(graphs, key=lambda graph: graph.input.shape[0])
        self.batch_sizes = tuple(graph.input.shape[0] for graph in self._graphs)
        self._in_order = in_order

    def __call__(self, x: Tensor) -> Tensor:
        """The model's output for x [b, ...], b ≥ 0: new, on the caller's current stream.

        Raises: TypeError, ValueError: x differs from the example in dtype, shape beyond the batch, or device.
        """
        example = self._graphs[0].input
        if not isinstance(x, Tensor):
            raise TypeError(f"x is {type(x).__name__}, expected a torch.Tensor")
        if x.dtype != example.dtype:
            raise TypeError(f"x has dtype {x.dtype}, expected {example.dtype}, which was captured")
        if x.dim() != example.dim() or x.shape[1:] != example.shape[1:]:
            want = ", ".join(map(str, ("any", *example.shape[1:])))
            raise ValueError(f"x has shape {tuple(x.shape)}, expected ({want}), which was captured")
        if x.device != example.device:
            raise ValueError(f"x is on {x.device}, expected {example.device}")
        largest = self.batch_sizes[-1]
        with self._in_order(), torch.no_grad():
            parts = [self._replay(part) for part in x.split(largest)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _replay(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        graph = next(graph for graph in self._graphs if graph.input.shape[0] >= b)
        graph.input[:b].copy_(x)
        if b < graph.input.shape[0]:
            graph.input[b:].zero_()
        graph.replay()
        return graph.output[:b].clone()


def capture(model: nn.Module, example: Tensor, batch_sizes: Iterable[int] = (1, 8, 32, 64)) -> GraphedModel:
    """``model`` recorded as CUDA graphs, one per batch size, on the device of ``example``.

    Captures before anything else uses the device: other threads may not allocate on it meanwhile.

    Args:   model: in eval mode, all on one CUDA device; maps [B, ...] to one [B, ...] tensor, image by image.
            example ([B, ...]): dtype and shape of requests; its values and B do not matter.
            batch_sizes: those to record; fewer save memory for inputs and outputs, more save padding.
    Raises: TypeError, ValueError: a model in training mode or not on a CUDA device, an example elsewhere, no or
            non-positive batch sizes, a model whose output is no tensor of B rows.
    """
    sizes = list(batch_sizes)
    _check(model, example, sizes)
    device = example.device
    graphs = []
    # Not in a caller's inference mode: what graphs read is written to in later calls.
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        for size in sorted(set(sizes), reverse=True):  # the largest first: the others then fit into its memory
            input = torch.zeros(size, *example.shape[1:], dtype=example.dtype, device=device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_RUNS):
                    _check_output(model(input), size)
            graphs.append(Graph(model, input, pool, stream))
    return GraphedModel(model, graphs, _InOrder(device))


def _check(model: nn.Module, example: Tensor, sizes: list[int]) -> None:
    if not sizes or any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in sizes):
        raise ValueError(f"batch_sizes is {sizes}, expected positive ints")
    if not isinstance(example, Tensor):
        raise TypeError(f"example is {type(example).__name__}, expected a torch.Tensor")
    if example.device.type != "cuda":
        raise ValueError(f"example is on {example.device}, expected a CUDA device")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"model is in training mode ({name or 'the model itself'}), expected model.eval()")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != example.device:
            raise ValueError(f"model has {name} on {tensor.device}, expected {example.device} like the example")


def _check_output(y: Tensor, b: int) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"model returns {type(y).__name__}, expected one torch.Tensor")
    if y.dim() == 0 or y.shape[0] != b:
        raise ValueError(f"model returns shape {tuple(y.shape)} for {b} images, expected ({b}, ...)")
