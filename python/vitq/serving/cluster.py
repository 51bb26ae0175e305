"""The same service on Ray Serve: gateways that speak HTTP in front of replicas with an engine each, on any number of
machines. ``vitq serve --engine ray``, or :func:`application` in a Serve config file (``deploy/ray-serve.yaml``).

A replica that dies loses no request: inference changes nothing, so the gateway gives it to another one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import ray
import torch
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from ..bench.environment import cores
from .engine import (
    KEPT,
    Answer,
    Closed,
    DeadlineExceeded,
    Engine,
    Overloaded,
    Served,
    Snapshot,
    WorkerFailed,
    buckets_up_to,
    check_images,
    freeze,
    percentiles,
)
from .server import Limits, Server, check_token, log

Count = Annotated[int, Field(ge=1)]
APPLICATION = "vitq"
REFUSALS = (ValueError, Overloaded, DeadlineExceeded, Closed, WorkerFailed)
"""What an engine may raise for a request, sent as values: Ray wraps exceptions in ones of its own."""


class Options(BaseModel):
    """What is deployed; the arguments of a Serve config file.

    Args:
        checkpoint: folder, at the same path on every node. name: of the model in URLs, default the folder's.
        device, dtype, backend, threads, max_batch, max_delay_ms, max_queue: of each replica's engine.
        replicas: at first and at least; max_replicas: at most, by load: ``target`` requests in progress for each.
        cpus, gpus: that Ray keeps for a replica; default its threads, and 1 if it runs on a GPU.
        gateways: processes that read requests, check them and decode images.
        attempts: replicas that a request may be given to when they die.
        limits: of requests, see ``vitq.serving.server.Limits``. The bearer token is VITQ_TOKEN where it
            is deployed from, else that of the gateways' nodes.
    """

    model_config = ConfigDict(extra="forbid")

    checkpoint: str
    name: str | None = None
    device: str = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    backend: str | None = None
    threads: Count = 1
    max_batch: Count = 32
    max_delay_ms: Annotated[float, Field(ge=0)] = 1.0
    max_queue: Count = 256
    replicas: Count = 1
    max_replicas: Count | None = None
    target: Annotated[float, Field(gt=0)] = 32
    cpus: Annotated[float, Field(ge=0)] | None = None
    gpus: Annotated[float, Field(ge=0)] | None = None
    gateways: Count = 1
    attempts: Count = 3
    limits: Limits = Limits()

    @property
    def model(self) -> str:
        """What it is called in URLs."""
        return self.name or Path(self.checkpoint).name


class Replica:
    """An engine in a process of its own."""

    def __init__(self, options: Options) -> None:
        self._engine = Engine(
            options.checkpoint,
            device=options.device,
            dtype=getattr(torch, options.dtype),
            backend=options.backend,
            threads=options.threads,
            buckets=buckets_up_to(options.max_batch),
            max_delay=options.max_delay_ms / 1e3,
            max_queue=options.max_queue,
        )
        freeze()

    def about(self) -> dict[str, Any]:
        """Fields of :class:`Served`, as values."""
        served = self._engine.served
        fields = {name: getattr(served, name) for name in ("version", "name", "recipe", "digest", "invariant")}
        return fields | {"data": served.data}

    async def infer(self, images: np.ndarray, timeout: float | None) -> dict[str, Any] | Exception:
        """Fields of the :class:`Answer`, logits as an array; or why there is none."""
        try:
            # A copy: what comes through shared memory may not be written to, which torch warns of.
            answer = await asyncio.wrap_future(self._engine.submit(torch.from_numpy(images.copy()), timeout))
        except REFUSALS as error:
            return error
        return {**vars(answer), "logits": answer.logits.numpy()}


class Remote:
    """Replicas behind a handle, as the server sees an engine; counts are this gateway's."""

    def __init__(self, handle: DeploymentHandle, about: dict[str, Any], options: Options) -> None:
        self.served, self.max_batch = Served(runners=(), **about), options.max_batch
        self._handle, self._attempts = handle, options.attempts
        self._counts: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=KEPT)

    def submit(self, images: Tensor, timeout: float | None = None) -> asyncio.Task[Answer]:
        """As :meth:`Engine.submit`, on the running event loop; a full queue is reported by the task."""
        check_images(images, self.served.data.input_size, self.max_batch)
        return asyncio.get_running_loop().create_task(self._ask(images, timeout))

    async def _ask(self, images: Tensor, timeout: float | None) -> Answer:
        start = time.perf_counter()
        self._counts["waiting"] += len(images)
        try:
            found = await self._first_alive(images.numpy(), timeout)
        finally:
            self._counts["waiting"] -= len(images)
        if isinstance(found, Exception):
            kinds = {Overloaded: "overloaded", DeadlineExceeded: "expired"}
            self._counts[kinds.get(type(found), "failed")] += 1
            raise found
        self._latencies.append(time.perf_counter() - start)
        self._counts.update(requests=1, images=len(images))
        return Answer(**found | {"logits": torch.from_numpy(found["logits"].copy())})

    async def _first_alive(self, images: np.ndarray, timeout: float | None) -> dict[str, Any] | Exception:
        for _ in range(self._attempts):
            try:
                return await self._handle.infer.remote(images, timeout)
            except RayActorError:
                self._counts["restarts"] += 1
        return WorkerFailed(f"{self._attempts} replicas died with the request")

    def snapshot(self) -> Snapshot:
        """``queue_depth``: images sent and not answered; ``restarts``: requests taken from a replica that died."""
        names = ("requests", "images", "overloaded", "expired", "failed", "restarts")
        counts = {name: self._counts[name] for name in names}
        latency = percentiles(self._latencies) if self._latencies else None
        return Snapshot(
            version=self.served.version, queue_depth=self._counts["waiting"], running=0, batches=0,
            latency_ms=latency, queue_ms=None, **counts,
        )  # fmt: skip


@serve.ingress()
class Gateway:
    """The server of ``vitq serve`` in front of replicas."""

    def __init__(self, options: Options, handle: DeploymentHandle, token: str | None = None) -> None:
        self._options, self._handle, self._token = options, handle, token

    async def __serve_build_asgi_app__(self) -> Server:
        torch.set_num_threads(1)
        freeze()
        about = await self._handle.about.remote()
        engine = Remote(self._handle, about, self._options)
        token = self._token or os.environ.get("VITQ_TOKEN")
        check_token(token)
        return Server(engine, self._options.model, limits=self._options.limits, token=token)


def application(arguments: Options | dict[str, Any]) -> serve.Application:
    """The Serve application of :class:`Options`. Raises: pydantic.ValidationError (a ValueError) for wrong ones."""
    options = Options.model_validate(arguments)
    gpus = float(options.device.startswith("cuda")) if options.gpus is None else options.gpus
    scaling: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None:
        bounds = {"min_replicas": options.replicas, "max_replicas": options.max_replicas}
        scaling = {"autoscaling_config": {**bounds, "target_ongoing_requests": options.target}}
    # More than fits into the engine's queue would wait where no deadline is looked at.
    room = options.max_queue + options.max_batch
    common = {"graceful_shutdown_timeout_s": 60, "logging_config": {"enable_access_log": False}}
    resources = {"num_cpus": options.threads if options.cpus is None else options.cpus, "num_gpus": gpus}
    replica = serve.deployment(
        Replica, name="replica", ray_actor_options=resources, max_ongoing_requests=room, **scaling, **common
    )
    gateway = serve.deployment(
        Gateway,
        name="gateway",
        num_replicas=options.gateways,
        max_ongoing_requests=options.limits.pending,
        ray_actor_options={"num_cpus": 0},
        **common,
    )
    # Nodes of a cluster have not the environment of who deploys on it.
    return gateway.bind(options, replica.bind(options), os.environ.get("VITQ_TOKEN"))


def run(options: Options, host: str, port: int) -> None:
    """Deploy on the cluster of RAY_ADDRESS, or on one of this machine alone; take it down on SIGTERM or SIGINT."""
    address = os.environ.get("RAY_ADDRESS", "local")
    own = {"include_dashboard": False, "num_cpus": max(cores(), options.replicas * options.threads)}
    ray.init(address, logging_level="warning", log_to_driver=False, **(own if address == "local" else {}))
    # The proxies of a cluster are shared: their address is whoever's who started them.
    serve.start(http_options={"host": host, "port": port})
    serve.run(application(options), name=APPLICATION, route_prefix="/")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # now: Ray has put its own in place
        signal.signal(number, lambda *_: stop.set())
    fields = {"url": f"http://{host}:{port}", "model": options.model, "replicas": options.replicas}
    log.info("listening", extra={"fields": fields | {"max_replicas": options.max_replicas}})
    stop.wait()
    serve.delete(APPLICATION)
    ray.shutdown()
    log.info("stopped")
