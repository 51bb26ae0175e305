"""An engine behind HTTP: Open Inference Protocol v2, images to labels, a page, metrics, health; limits and logs."""

from __future__ import annotations

import asyncio
import functools
import hmac
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from .. import __version__
from ..bench.environment import cores
from ..checkpoint import DataConfig
from ..data.folder import CHANNELS
from . import images, protocol
from .engine import Answer, Closed, DeadlineExceeded, Engine, Overloaded
from .protocol import DATATYPE, INPUT, OUTPUT, Refused

PAGE = Path(__file__).parents[1] / "assets" / "serve.html"
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src blob:"
OPEN = ("/", "/v2/health/live", "/v2/health/ready")
"""Paths that need no token: the page holds nothing, and orchestrators probe without."""
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
IN_LOOP_BYTES = 1 << 16
"""JSON up to this size is parsed where it arrives: sooner than a thread would start to."""

log, access = logging.getLogger("vitq.serving"), logging.getLogger("vitq.serving.requests")


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take.

    Args:
        body_bytes: of one request. held_bytes: of the bodies of all requests that are being read or answered.
        pixels: of an image file, as its header says, and of it resized. pending: requests in progress.
        body_s: seconds in which a body has to arrive. answer_s: seconds from there to the answer.
    """

    body_bytes: int = 20 << 20
    held_bytes: int = 256 << 20
    pixels: int = 50_000_000
    pending: int = 1024
    body_s: float = 10.0
    answer_s: float = 30.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, expected a number above 0")


def check_token(token: str | None) -> None:
    """Raises ValueError for a bearer token that is soon guessed, or that no header carries."""
    if token is not None and (len(token) < 16 or not token.isascii() or not token.isprintable()):
        raise ValueError(f"the token has {len(token)} characters, expected at least 16 printable ones of ASCII")


class Server:
    """The ASGI application around ``engine``, which whoever made it closes when this has ended.

    Args:
        name: of the model in the protocol. limits: see :class:`Limits`.
        token: what clients must send as ``Authorization: Bearer``, or None; all but health and the page need it.
        reference: an engine of the float model, for comparison on the page.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        limits: Limits | None = None,
        token: str | None = None,
        reference: Engine | None = None,
    ) -> None:
        self.engine, self.name, self.limits, self.reference = engine, name, limits or Limits(), reference
        #: set when no more requests are to be sent here: readiness says so
        self.closing = False
        self._token = None if token is None else f"Bearer {token}".encode()
        if engine.served.data.input_size[0] in CHANNELS:  # others take tensors alone
            images.warm(images.transform(engine.served.data, self.limits.pixels))
        self._pending = self._held = 0
        self._decoders = anyio.CapacityLimiter(cores())
        self._registry = CollectorRegistry()
        self._registry.register(_EngineMetrics(engine))
        labels = {"labelnames": ("route", "status"), "registry": self._registry}
        self._requests = Counter("vitq_http_requests", "Requests by route and status.", **labels)
        self._seconds = Histogram(
            "vitq_http_request_seconds", "From a request's first byte to its answer.", ("route",),
            registry=self._registry, buckets=SECONDS,
        )  # fmt: skip
        model = "/v2/models/{name}"
        versioned = model + "/versions/{version}"
        routes = [
            ("GET", "/", "page", self._page),
            ("GET", "/status", "status", self._status),
            ("GET", "/metrics", "metrics", self._metrics),
            ("POST", "/classify", "classify", self._classify),
            ("GET", "/v2/health/live", "health", self._live),
            ("GET", "/v2/health/ready", "health", self._ready),
            ("GET", "/v2", "metadata", self._server_metadata),
            *(("GET", path, "metadata", self._model_metadata) for path in (model, versioned)),
            *(("GET", f"{path}/ready", "health", self._model_ready) for path in (model, versioned)),
            *(("POST", f"{path}/infer", "infer", self._infer) for path in (model, versioned)),
        ]
        self._app = Starlette(
            routes=[Route(path, self._answering(what, handler), methods=[m]) for m, path, what, handler in routes],
            exception_handlers={HTTPException: _http_error},
        )
        self._app.router.redirect_slashes = False  # to whatever host a client names

    async def __call__(self, scope, receive, send) -> None:
        """Every request is counted and logged here, whatever becomes of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, seen = time.perf_counter(), {"status": 0, "bytes": 0}
        scope["vitq"] = about = {"route": "other", "pending": 1}

        async def sending(message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
            await send(message)

        self._pending += 1
        try:
            await self._app(scope, receive, sending)
        finally:
            self._pending -= about.pop("pending")
            self._held -= about.pop("held", 0)
            seconds, route, status = time.perf_counter() - start, about.pop("route"), seen["status"]
            self._requests.labels(route, str(status)).inc()
            self._seconds.labels(route).observe(seconds)
            level = logging.DEBUG if route == "health" else logging.INFO if status < 500 else logging.WARNING
            if access.isEnabledFor(level):
                fields = {"method": scope["method"], "path": scope["path"][:200], "status": status,
                          "ms": round(seconds * 1e3, 3), "client": (scope.get("client") or ("",))[0]}  # fmt: skip
                access.log(level, "request", extra={"fields": fields | about})

    def _answering(self, what: str, handler: Callable[[Request], Awaitable[Response]]):
        """``handler`` behind the token and the limits, with errors as the protocol words them."""

        @functools.wraps(handler)
        async def answered(request: Request) -> Response:
            about = request.scope["vitq"]
            about["route"] = what
            try:
                self._authorize(request)
                if self._pending > self.limits.pending and what not in ("health", "metrics"):
                    raise Refused(503, f"{self.limits.pending} requests are in progress, expected fewer", 1.0)
                return await handler(request)
            except Refused as error:
                refusal = error
            except Overloaded as error:
                refusal = Refused(429, str(error), error.retry_after)
            except Closed:
                refusal = Refused(503, "the server is shutting down", 1.0)
            except (DeadlineExceeded, TimeoutError):
                refusal = Refused(504, "the answer was not there in time")
            except ClientDisconnect:
                refusal = Refused(400, "the client left before its request was whole")
            except Exception:
                log.exception("a request failed")
                refusal = Refused(500, "internal error; the log has the cause")
            # What JSON may say, and UTF-8 not, is quoted by some refusals.
            about["error"] = message = str(refusal).encode("utf-8", "backslashreplace").decode()
            headers = {}
            if refusal.retry_after is not None:
                headers["retry-after"] = str(max(1, math.ceil(refusal.retry_after)))
            if refusal.status == 401:
                headers["www-authenticate"] = "Bearer"
            # In nobody's way while the rest is read: who has no token could otherwise keep out those who have one.
            self._pending -= about["pending"]
            about["pending"] = 0
            if not await self._drained(request, refusal.status):
                headers["connection"] = "close"
            return JSONResponse({"error": message}, refusal.status, headers)

        return answered

    def _authorize(self, request: Request) -> None:
        # Not request.url: older Starlettes put it together from the Host header, which the client writes.
        if self._token is None or request.scope["path"] in OPEN:
            return
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, self._token):
            raise Refused(401, "the bearer token is missing or wrong")

    async def _drained(self, request: Request, status: int) -> bool:
        """Reads and forgets what is left of a refused body: a connection that is closed before that is reset, and many
        clients then see no answer. False where the connection has to go: clients that are slow, or send without end.
        """
        if "bytes" in request.scope["vitq"]:
            return True
        if status == 408 or "expect" in request.headers:
            return False
        try:
            async with asyncio.timeout(self.limits.body_s):
                left = 4 * self.limits.body_bytes
                while left > 0:
                    message = await request.receive()
                    if not message.get("more_body", False):
                        return message["type"] == "http.request"
                    left -= len(message["body"])
        except TimeoutError:
            pass
        return False

    async def _body(self, request: Request, most: int) -> bytearray:
        """The whole body, within all limits."""
        announced = request.headers.get("content-length", "0")
        if int(announced) > most:  # the HTTP parser has made sure that it is a number
            raise Refused(413, f"the body has {announced} bytes, expected up to {most}")
        if (coding := request.headers.get("content-encoding", "identity")) != "identity":
            raise Refused(415, f"content-encoding is {coding[:40]!r}, expected identity")
        body, about = bytearray(), request.scope["vitq"]
        about["held"] = 0
        try:
            async with asyncio.timeout(self.limits.body_s):
                async for chunk in request.stream():
                    body += chunk
                    about["held"] += len(chunk)
                    self._held += len(chunk)
                    if len(body) > most:
                        raise Refused(413, f"the body has more than {most} bytes, expected up to that")
                    if self._held > self.limits.held_bytes:
                        raise Refused(503, "the bodies of requests in progress fill the memory for them", 1.0)
        except TimeoutError:
            raise Refused(408, f"the body was not there within {self.limits.body_s} s") from None
        about["bytes"] = len(body)
        return body

    async def _ask(self, engine: Engine, x: Tensor, timeout: float | None, about: dict[str, Any]) -> Answer:
        """Within ``timeout`` seconds, and what is left of those that the caller gives the whole answer."""
        left = max(1e-6, anyio.current_effective_deadline() - anyio.current_time())
        seconds = min(left, timeout or math.inf)
        try:
            future = engine.submit(x, seconds)
        except ValueError as error:
            raise Refused(413 if len(x) > engine.max_batch else 400, str(error)) from error
        async with asyncio.timeout(seconds):
            answer = await asyncio.wrap_future(future)
        about |= {"images": len(x), "batch": answer.batch, "version": answer.version,
                  "queue_ms": round(answer.queued_s * 1e3, 3), "run_ms": round(answer.run_s * 1e3, 3)}  # fmt: skip
        return answer

    # Routes

    async def _infer(self, request: Request) -> Response:
        self._known(request)
        values = self.engine.max_batch * math.prod(self.engine.served.data.input_size)
        # A float32 takes up to 17 characters in JSON, a nested one a few more.
        body = await self._body(request, min(self.limits.body_bytes, 32 * values + IN_LOOP_BYTES))
        length = request.headers.get(protocol.HEADER_LENGTH)
        parse = functools.partial(protocol.parse, body, length)
        small = protocol.header_bytes(length, len(body)) <= IN_LOOP_BYTES
        with anyio.fail_after(self.limits.answer_s):
            infer = parse() if small else await anyio.to_thread.run_sync(parse, limiter=self._decoders)
            answer = await self._ask(self.engine, infer.images, infer.timeout, request.scope["vitq"])
        self._known(request, answer.version)
        content, headers = protocol.respond(infer, answer.logits, self.name, answer.version)
        return Response(content, headers=headers)

    async def _classify(self, request: Request) -> Response:
        """?top=5 classes of the image in the body; ?float=1 adds those of the float model."""
        most, query = self.engine.served.data.num_classes, request.query_params
        k = query.get("top", str(min(5, most)))
        if not (k.isascii() and k.isdigit() and len(k) < 10 and 1 <= int(k) <= most):
            raise Refused(400, f"top is {k[:40]!r}, expected 1 to {most}")
        if (compared := query.get("float", "0")) not in ("0", "1") or (compared == "1" and self.reference is None):
            raise Refused(400, f"float is {compared[:40]!r}, expected 0, or 1 where a float model is served beside")
        body, about = await self._body(request, self.limits.body_bytes), request.scope["vitq"]
        with anyio.fail_after(self.limits.answer_s):
            served = answer = None
            while answer is None or answer.version != served.version:  # which may want its images otherwise
                served, start = self.engine.served, time.perf_counter()
                x = await anyio.to_thread.run_sync(self._pixels, body, served.data, limiter=self._decoders)
                decoded = time.perf_counter() - start
                answer = await self._ask(self.engine, x, None, about)
            answers = {"integer": answer}
            if compared == "1":
                answers["float"] = await self._ask(self.reference, x, None, about)
        content: dict[str, Any] = {"model": self.name, "decode_ms": decoded * 1e3}
        for side, answer in answers.items():
            classes = images.top(answer.logits[0], int(k), served.data.class_names)
            content[side] = {"top": classes, "queue_ms": answer.queued_s * 1e3, "run_ms": answer.run_s * 1e3}
        return JSONResponse(content)

    def _pixels(self, body: bytearray, data: DataConfig) -> Tensor:
        return images.transform(data, self.limits.pixels)(images.decode(body, self.limits.pixels))[None]

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": POLICY})

    async def _status(self, request: Request) -> Response:
        served, now = self.engine.served, self.engine.snapshot()
        about = {k: getattr(served, k) for k in ("name", "recipe", "digest", "version", "invariant")}
        size = {"input_size": served.data.input_size, "classes": served.data.num_classes}
        return JSONResponse(
            {"model": self.name, "architecture": about.pop("name"), **about, **size,
             "max_batch": self.engine.max_batch, "float": self.reference is not None, "engine": asdict(now)}
        )  # fmt: skip

    async def _metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def _ready(self, request: Request) -> Response:
        return JSONResponse({"ready": not self.closing}, 503 if self.closing else 200)

    async def _model_ready(self, request: Request) -> Response:
        self._known(request)
        return await self._ready(request)

    async def _server_metadata(self, request: Request) -> Response:
        return JSONResponse({"name": "vitq", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def _model_metadata(self, request: Request) -> Response:
        self._known(request)
        data = self.engine.served.data
        tensors = {INPUT: data.input_size, OUTPUT: (data.num_classes,)}
        inputs, outputs = (
            [{"name": name, "datatype": DATATYPE, "shape": [-1, *shape]}] for name, shape in tensors.items()
        )
        versions = [str(self.engine.served.version)]
        return JSONResponse(
            {"name": self.name, "versions": versions, "platform": "vitq", "inputs": inputs, "outputs": outputs}
        )

    def _known(self, request: Request, served: int | None = None) -> None:
        name, version = request.path_params["name"], request.path_params.get("version")
        if name != self.name:
            raise Refused(404, f"there is no model {name[:80]!r}, expected {self.name!r}")
        if version is not None and version != (own := str(served or self.engine.served.version)):
            raise Refused(404, f"there is no version {version[:40]!r}, expected {own!r}")


async def _http_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


class _EngineMetrics:
    """The engine's snapshot, taken when it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        now = self._engine.snapshot()
        yield GaugeMetricFamily("vitq_queue_depth", "Images that wait.", now.queue_depth)
        yield GaugeMetricFamily("vitq_running_batches", "Batches in the workers.", now.running)
        yield GaugeMetricFamily("vitq_model_version", "One more after every swap of the checkpoint.", now.version)
        for name in ("requests", "images", "batches", "overloaded", "expired", "failed", "restarts"):
            yield CounterMetricFamily(f"vitq_engine_{name}", f"Of the engine: {name}.", getattr(now, name))
        for name, values in (("latency", now.latency_ms), ("queue", now.queue_ms)):
            family = GaugeMetricFamily(f"vitq_{name}_seconds", "Over the last answers.", labels=("quantile",))
            for key, value in (values or {}).items():
                family.add_metric([str(int(key[1:]) / 100)], value / 1e3)
            yield family


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
