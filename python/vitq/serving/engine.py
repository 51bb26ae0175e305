"""A checkpoint behind a bounded queue: requests are batched as they come, workers run the batches."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vitq_kernels import graphs

from .. import checkpoint as checkpoints
from ..bench.environment import cores
from ..checkpoint import DataConfig
from ..data.coco import is_detector
from ..devices import checked
from ..models import state_data

BUCKETS = (1, 2, 4, 8, 16, 32)
ATTEMPTS = 2
"""How often a request may be in a batch whose worker dies: it may be what kills them."""
KEPT = 4096
"""Answers that percentiles are taken over."""

log = logging.getLogger("vitq.serving")
T = TypeVar("T")
_counting = threading.Lock()


class Overloaded(RuntimeError):
    """The queue is full. ``retry_after``: seconds in which what waits now will have been answered, by estimate."""

    def __init__(self, waiting: int, most: int, retry_after: float) -> None:
        super().__init__(f"the queue holds {waiting} images, expected room in {most}; retry in {retry_after:.1f} s")
        self._given = waiting, most, retry_after
        self.retry_after = retry_after

    def __reduce__(self):
        return type(self), self._given


class DeadlineExceeded(TimeoutError):
    """A request was not begun within its timeout."""


class Closed(RuntimeError):
    """The engine takes no more requests."""


class WorkerFailed(RuntimeError):
    """The workers that a request was given to died."""


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Args:
        logits: [b, classes] float32, on the CPU.
        version: 1 for the checkpoint that the engine started with, one more after every swap.
        batch: images that were computed together.
        queued_s, run_s: seconds in the queue and in the model.
    """

    logits: Tensor
    version: int
    batch: int
    queued_s: float
    run_s: float


@dataclass(frozen=True)
class Snapshot:
    """The engine at one moment; counts are since it started, percentiles over the last 4096 answers (None before any).

    Args:
        queue_depth: images that wait. running: batches in the workers now.
        overloaded, expired, failed: requests refused by a full queue, past their deadline, ended by an exception.
        restarts: workers that died and were replaced.
        latency_ms: p50, p95, p99 from submission to answer; queue_ms: of it until a worker took the request.
    """

    version: int
    queue_depth: int
    running: int
    requests: int
    images: int
    batches: int
    overloaded: int
    expired: int
    failed: int
    restarts: int
    latency_ms: dict[str, float] | None
    queue_ms: dict[str, float] | None


@dataclass(eq=False)
class _Request:
    images: Tensor
    deadline: float
    future: Future = field(default_factory=Future)
    submitted: float = field(default_factory=time.perf_counter)
    attempts: int = 0


@dataclass(frozen=True)
class Served:
    """A loaded model: what it is, and a function of [b, C, H, W] float32 images for every worker.

    Args:
        name: its architecture; recipe, digest: of its checkpoint, empty for a model that is in none.
        invariant: an image's logits are the same bits in every batch, as checked on random images in all buckets.
    """

    version: int
    name: str
    recipe: str
    digest: str
    data: DataConfig
    invariant: bool
    runners: tuple[Callable[[Tensor], Tensor], ...]


class Engine:
    """Answers requests with the logits of a checkpoint, in batches, from any thread.

    A worker takes what waits, up to the largest bucket, as soon as that is full or its oldest request is ``max_delay``
    old. On a GPU each worker has a stream and a CUDA graph per bucket, filled up with zeros; on a CPU a batch runs as
    it is, since padding would cost what images cost, and buckets are the sizes that are warmed up. Logits of integer
    models do not depend on the batch, bit for bit (every dynamic scale is a row's own), which is checked at start
    (``served.invariant``); those of float models do.

    Args:
        checkpoint: folder that ``vitq quantize`` wrote; or a timm model in eval mode, such as the float one.
        device, dtype, backend: where, in which dtype, on which back end (see ``vitq.load``) the model runs.
        replicas: workers. threads: torch threads of each on the CPU, default a fair share of the cores; with several
            replicas each is pinned to cores of its own.
        keep_threads: False ends the torch threads of a CPU batch with it, for a model that is asked rarely beside one
            that is busy: OpenMP threads that are more than the cores hinder each other, even where some are idle.
        buckets: batch sizes to warm up; the largest bounds requests and batches.
        max_delay: seconds that a request may wait for others to share its batch.
        max_queue: images that may wait.
    Raises: CheckpointError; ValueError, TypeError: an argument that cannot be.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike | nn.Module,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
        replicas: int = 1,
        threads: int | None = None,
        keep_threads: bool = True,
        buckets: Iterable[int] = BUCKETS,
        max_delay: float = 0.001,
        max_queue: int = 256,
    ) -> None:
        self.buckets = tuple(sorted(set(buckets)))
        counts = [("replicas", replicas), ("max_queue", max_queue), ("threads", threads or 1)]
        for name, value in (*counts, *(("buckets", b) for b in self.buckets)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} has {value!r}, expected positive ints")
        if not self.buckets or self.buckets[-1] > max_queue:
            raise ValueError(f"buckets is {self.buckets} with max_queue={max_queue}, expected a queue that holds each")
        if not 0 <= max_delay < math.inf:
            raise ValueError(f"max_delay is {max_delay}, expected seconds, at least 0")
        self.device, self.dtype, self.backend = checked(device), dtype, backend
        self.max_batch, self.max_delay, self.max_queue = self.buckets[-1], max_delay, max_queue
        self.threads = threads or max(1, cores() // replicas)
        self.replicas, self.keep_threads = replicas, keep_threads
        self._queue: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._swapping = threading.Lock()
        self._batches: list[list[_Request]] = [[] for _ in range(replicas)]
        self._waiting = 0
        self._closing = self._paused = False
        counted = ("requests", "images", "batches", "overloaded", "expired", "failed", "restarts")
        self._counts = dict.fromkeys(counted, 0)
        self._latencies: deque[tuple[float, float]] = deque(maxlen=KEPT)
        self._image_s = 0.0
        #: The model that answers now.
        self.served = self._apart(lambda: self._prepare(*self._load(checkpoint), 1))
        before, ready = torch.get_num_threads(), threading.Barrier(replicas + 1)
        self._workers = [threading.Thread(target=self._live, args=(i, ready), daemon=True) for i in range(replicas)]
        for worker in self._workers:
            worker.start()
        ready.wait()
        _use_threads(before)  # theirs would be the default of threads to come

    # Requests

    def submit(self, images: Tensor, timeout: float | None = None) -> Future[Answer]:
        """A future of the answer for ``images``, which are not written to until then. Does not block.

        Args:   images ([b, C, H, W] float32 on the CPU, 1 ≤ b ≤ the largest bucket): preprocessed, finite.
                timeout: seconds within which a worker has to begin.
        Raises: Overloaded, Closed; TypeError: not a tensor; ValueError: another shape or dtype, or NaN or Inf among the
                values, which static quantizers would turn into ordinary codes. The future raises DeadlineExceeded,
                WorkerFailed, or what the model raised.
        """
        check_images(images, self.served.data.input_size, self.max_batch)
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout is {timeout}, expected seconds above 0, or None")
        request = _Request(images, math.inf if timeout is None else time.perf_counter() + timeout)
        b = len(images)
        with self._changed:
            if self._closing:
                raise Closed("the engine is closed, expected an open one")
            if self._waiting + b > self.max_queue:
                self._expire()  # workers that are busy have not looked
            if self._waiting + b > self.max_queue:
                self._counts["overloaded"] += 1
                raise Overloaded(self._waiting, self.max_queue, self._waiting * self._image_s / self.replicas)
            self._queue.append(request)
            self._waiting += b
            self._changed.notify()
        return request.future

    def __call__(self, images: Tensor, timeout: float | None = None) -> Tensor:
        """The logits [b, classes] of ``images``; waits for them. See :meth:`submit`."""
        return self.submit(images, timeout).result().logits

    def snapshot(self) -> Snapshot:
        """Counts and percentiles; cheap enough for a scrape, not for every request."""
        with self._changed:
            now = {
                "version": self.served.version,
                "queue_depth": self._waiting,
                "running": sum(map(bool, self._batches)),
            }
            counts, latencies = dict(self._counts), list(self._latencies)
        total, queued = (percentiles(values) for values in zip(*latencies)) if latencies else (None, None)
        return Snapshot(**now, **counts, latency_ms=total, queue_ms=queued)

    # Life

    def swap(self, checkpoint: str | os.PathLike | nn.Module) -> None:
        """Answer with another checkpoint from now on. No request is dropped: the old one answers until the new one is
        loaded and warmed up. On a GPU, whose graphs are captured undisturbed, requests wait meanwhile.

        Raises: what the constructor raises; ValueError if images or classes of the new one differ. The old one stays.
        """
        with self._swapping:
            model, data, about = self._apart(lambda: self._load(checkpoint))
            was = self.served.data
            for name in ("input_size", "num_classes"):
                if getattr(data, name) != getattr(was, name):
                    raise ValueError(
                        f"checkpoint has {name} {getattr(data, name)}, expected {getattr(was, name)}, which is served"
                    )
            try:
                self._pause()
                self.served = self._apart(lambda: self._prepare(model, data, about, self.served.version + 1))
            finally:
                with self._changed:
                    self._paused = False
                    self._changed.notify_all()

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, answer those that were accepted, end the workers. May be called again.

        Args: timeout: seconds after which what still waits is given up (:class:`Closed`).
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.join(None if timeout is None else max(0.0, end - time.monotonic()))
        with self._changed:
            left = list(self._queue)
            self._queue.clear()
            self._waiting = 0
        for request in left:
            _fail(request, Closed("the engine was closed before the request's turn"))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # Models

    def _load(self, checkpoint: str | os.PathLike | nn.Module) -> tuple[nn.Module, DataConfig, tuple[str, str, str]]:
        if isinstance(checkpoint, nn.Module):
            if checkpoint.training:
                raise ValueError("checkpoint is a model in training mode, expected model.eval()")
            data = DataConfig(**state_data(checkpoint))
            name = checkpoint.pretrained_cfg.get("architecture", type(checkpoint).__name__)
            _check_classifier(checkpoint, data)
            return checkpoint.to(self.device, self.dtype), data, (name, "", "")
        model = checkpoints.load(Path(checkpoint), self.device, self.backend).to(self.dtype)
        config = model.vitq_config
        _check_classifier(model, config.data)
        return model, config.data, (config.architecture, config.recipe.get("name", ""), config.digest)

    def _prepare(self, model: nn.Module, data: DataConfig, about: Sequence[str], version: int) -> Served:
        """Warms up every bucket, and compares what it makes of the same images."""
        runners = tuple(self._runner(model, data.input_size) for _ in range(self.replicas))
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.max_batch, *data.input_size, generator=generator)
        logits = [runners[0](images[:b]) for b in self.buckets]
        want = (self.max_batch, data.num_classes)
        if tuple(logits[-1].shape) != want:
            raise ValueError(f"the model gives {tuple(logits[-1].shape)}, expected logits {want}")
        invariant = all(torch.equal(part, logits[-1][: len(part)]) for part in logits)
        return Served(version, *about, data, invariant, runners)

    def _runner(self, model: nn.Module, size: tuple[int, int, int]) -> Callable[[Tensor], Tensor]:
        """[b, C, H, W] float32 to logits [b, classes] float32, both on the CPU."""
        if self.device.type != "cuda":

            @torch.inference_mode()
            def run(images: Tensor) -> Tensor:
                return model(images.to(self.dtype)).float()

            return run if self.keep_threads else lambda images: self._apart(lambda: run(images))
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            example = torch.zeros(1, *size, dtype=self.dtype, device=self.device)
            graphed = graphs.capture(model, example, self.buckets)

        def replay(images: Tensor) -> Tensor:
            with torch.cuda.stream(stream):
                there = images.pin_memory().to(self.device, non_blocking=True)
                return graphed(there.to(self.dtype)).float().cpu()

        return replay

    def _pause(self) -> None:
        """On a GPU, waits until no worker uses it: nobody else may allocate there while a graph is captured."""
        if self.device.type == "cuda":
            with self._changed:
                self._paused = True
                self._changed.wait_for(lambda: not any(self._batches))

    def _apart(self, do: Callable[[], T]) -> T:
        """``do()``, on a CPU in a thread that ends, and its OpenMP threads with it. They would stay with the caller,
        and where those of a process are more than the cores, libgomp lets none of them spin: at every parallel loop
        the workers' would have to be woken, and a small model would take twice its time.
        """
        if self.device.type != "cpu":
            return do()
        before = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(1, initializer=_use_threads, initargs=(self.threads,)) as thread:
                return thread.submit(do).result()
        finally:
            _use_threads(before)

    # Workers

    def _pin(self, replica: int) -> None:
        """To its share of the cores, if workers have all of them: of some, another engine would take the same."""
        whole = sorted(os.sched_getaffinity(0))
        if self.replicas * self.threads != len(whole):
            return
        own = whole[replica * self.threads : (replica + 1) * self.threads]
        try:
            os.sched_setaffinity(0, own)  # of this thread, and of the OpenMP threads that it starts
        except OSError as error:  # a sandbox may forbid it, and who made the engine waits for this thread
            log.warning("worker %d is not pinned to cores %s: %s", replica, own, error)

    def _live(self, replica: int, ready: threading.Barrier) -> None:
        """A worker's thread: whatever ends the worker, requests that it held go back to the front of the queue."""
        if self.device.type == "cpu":
            _use_threads(self.threads)
            if self.replicas > 1 and hasattr(os, "sched_setaffinity"):
                self._pin(replica)
        ready.wait()
        batch, death = self._batches[replica], None
        while True:
            try:
                if death is not None:
                    self._recover(batch)
                    log.error("a worker died; another takes its place", exc_info=death)
                    death = None
                while self._take(batch):
                    self._answer(batch, replica)
                    self._done(batch)
                return
            except BaseException as error:
                death = error  # and no more: what comes here while it is dealt with has to be dealt with, too

    def _take(self, batch: list[_Request]) -> bool:
        """Moves the next batch from the queue; False when the engine is closed and all is answered."""
        with self._changed:
            while True:
                self._expire()
                if self._queue and not self._paused:
                    left = self._queue[0].submitted + self.max_delay - time.perf_counter()
                    if left <= 0 or self._waiting >= self.max_batch or self._closing:
                        break
                    self._changed.wait(left)
                elif self._closing and not self._queue:
                    return False
                else:
                    self._changed.wait()
            size = 0
            while self._queue and size + len(self._queue[0].images) <= self.max_batch:
                batch.append(self._queue[0])
                size += len(self._queue.popleft().images)
            self._waiting -= size
            if self._queue:
                self._changed.notify()
        return True

    def _expire(self) -> None:
        """Drops requests past their deadlines, or cancelled by their owners."""
        now = time.perf_counter()
        gone = [r for r in self._queue if r.deadline <= now or r.future.cancelled()]
        for request in gone:
            self._queue.remove(request)
            self._waiting -= len(request.images)
            if request.deadline <= now:  # an owner who waited no longer than that has cancelled it, too
                self._counts["expired"] += 1
                _fail(request, DeadlineExceeded(f"not begun within {request.deadline - request.submitted:.3f} s"))

    def _answer(self, batch: list[_Request], replica: int) -> None:
        served, start = self.served, time.perf_counter()
        images = batch[0].images if len(batch) == 1 else torch.cat([request.images for request in batch])
        try:
            logits = served.runners[replica](images)
        except Exception as error:
            if len(batch) > 1:  # one request's fault is not its neighbours'
                for request in batch:
                    self._answer([request], replica)
                return
            log.exception("the model failed on a request")
            with self._changed:
                self._counts["failed"] += 1
            _fail(batch[0], error)
            return
        end = time.perf_counter()
        with self._changed:  # first: who has an answer finds it counted
            self._counts["requests"] += len(batch)
            self._counts["images"] += len(images)
            self._counts["batches"] += 1
            self._latencies.extend((end - request.submitted, start - request.submitted) for request in batch)
            self._image_s += 0.1 * ((end - start) / len(images) - self._image_s)
        for request, part in zip(batch, logits.split([len(request.images) for request in batch])):
            answer = Answer(part, served.version, len(images), start - request.submitted, end - start)
            _resolve(request.future.set_result, answer)

    def _done(self, batch: list[_Request]) -> None:
        with self._changed:
            batch.clear()
            if self._paused:
                self._changed.notify_all()

    def _recover(self, batch: list[_Request]) -> None:
        with self._changed:
            self._counts["restarts"] += 1
            left = [request for request in batch if not request.future.done() and request not in self._queue]
            for request in reversed(left):
                request.attempts += 1
                if request.attempts < ATTEMPTS:
                    self._queue.appendleft(request)
                else:
                    self._counts["failed"] += 1
                    _fail(request, WorkerFailed(f"{ATTEMPTS} workers died with the request in their batch"))
            self._waiting = sum(len(request.images) for request in self._queue)
        self._done(batch)


def _check_classifier(model: nn.Module, data: DataConfig) -> None:
    """ValueError for a model that does not give logits of images."""
    takes = "clouds" if len(data.input_size) != 3 else "images and finds boxes" if is_detector(model) else None
    if takes is not None:
        name = type(model).__name__
        raise ValueError(f"checkpoint is of a {name}, which takes {takes}, expected a model of images to class logits")


def check_images(images: Tensor, size: tuple[int, int, int], most: int) -> None:
    """Raises TypeError, ValueError for what :meth:`Engine.submit` refuses."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images is {type(images).__name__}, expected a torch.Tensor")
    if images.dtype != torch.float32 or images.device.type != "cpu":
        raise ValueError(f"images has dtype {images.dtype} on {images.device}, expected torch.float32 on the cpu")
    if images.dim() != 4 or tuple(images.shape[1:]) != size or not 1 <= len(images) <= most:
        want = ", ".join(map(str, (f"1..{most}", *size)))
        raise ValueError(f"images has shape {tuple(images.shape)}, expected ({want})")
    if not np.isfinite(images.detach().numpy()).all():  # torch would use the caller's OpenMP threads
        raise ValueError("images has NaN or Inf, expected finite values")


def freeze() -> None:
    """Spares Python's collector all that is loaded by now: it would look through it every so often, which the slowest
    percent of answers showed. ``gc.unfreeze`` before the end: libraries complain of objects that are not freed.
    """
    gc.collect()
    gc.freeze()


def _use_threads(count: int) -> None:
    """Torch threads of this thread, and the default of those that have not asked."""
    with _counting:
        torch.set_num_threads(count)
        torch.get_num_threads()  # a thread's first look takes the default of that moment, over what was set


def buckets_up_to(most: int) -> tuple[int, ...]:
    """Powers of two, and ``most``."""
    return (*(1 << i for i in range((most - 1).bit_length())), most)


def _fail(request: _Request, error: Exception) -> None:
    _resolve(request.future.set_exception, error)


def _resolve(set: Callable, value: object) -> None:
    with contextlib.suppress(InvalidStateError):  # its owner has cancelled it
        set(value)


def percentiles(seconds: Iterable[float]) -> dict[str, float]:
    """p50, p95, p99 in milliseconds: the smallest value that so many percent do not exceed."""
    ordered = sorted(seconds)
    return {f"p{p}": ordered[math.ceil(p / 100 * len(ordered)) - 1] * 1e3 for p in (50, 95, 99)}
