"""``vitq serve``: one process that listens until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import torch

from ..sources import load_float
from .engine import Engine
from .server import JsonLines, Limits, Server, log


def serve(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> None:
    """Load, listen, answer; SIGHUP takes the checkpoint anew, SIGTERM and SIGINT end it when all is answered.

    Raises: ValueError, OSError: what is wrong with the checkpoint, an option, or the address.
    """
    token = os.environ.get("VITQ_TOKEN")
    if args.token_file:
        token = Path(args.token_file).read_text().strip()
    if token is not None and (len(token) < 16 or not token.isascii() or not token.isprintable()):
        raise ValueError(f"the token has {len(token)} characters, expected at least 16 printable ones of ASCII")
    if (args.tls_cert is None) != (args.tls_key is None):
        raise ValueError("one of --tls-cert and --tls-key is given, expected both or neither")
    limits = Limits(
        args.max_bytes << 20, max(Limits.held_bytes, args.max_bytes << 20), args.max_pixels, args.max_pending,
        args.body_timeout, args.timeout,
    )  # fmt: skip
    listening = socket.create_server((args.host, args.port), backlog=1024)
    options = {"replicas": args.replicas, "max_delay": args.max_delay / 1e3, "max_queue": args.max_queue}
    options |= {"device": device, "dtype": dtype, "backend": args.backend, "threads": args.threads}
    buckets = [b for b in (1 << i for i in range(args.max_batch.bit_length())) if b < args.max_batch]
    engine = Engine(args.checkpoint, buckets=[*buckets, args.max_batch], **options)
    reference = None
    if args.float:
        from ..commands import recorded_source

        model = load_float(recorded_source(args.checkpoint))
        reference = Engine(model, device=device, threads=args.threads, buckets=(1, 2, 4), max_queue=32)
    name = args.name or Path(args.checkpoint).resolve().name
    server = Server(engine, name, limits=limits, token=token, reference=reference)
    _log(args.log_level)
    asyncio.run(_listen(server, listening, args))


def _log(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for logger in (log, logging.getLogger("uvicorn.error")):
        logger.handlers, logger.propagate = [handler], False
    log.setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel("WARNING")


async def _listen(app: Server, listening: socket.socket, args: argparse.Namespace) -> None:
    import uvicorn

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(args.body_timeout + args.timeout) + 1,
        limit_concurrency=4 * args.max_pending,
        ssl_certfile=args.tls_cert,
        ssl_keyfile=args.tls_key,
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # it would raise them again when all is done
    loop = asyncio.get_running_loop()

    def stop() -> None:
        app.closing = server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, lambda: loop.run_in_executor(None, _reload, app, args.checkpoint))
    host, port = listening.getsockname()[:2]
    url = f"{'https' if args.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    served = app.engine.served
    fields = {"url": url, "model": app.name, "recipe": served.recipe, "device": str(app.engine.device)}
    fields |= {"replicas": app.engine.replicas, "threads": app.engine.threads, "buckets": app.engine.buckets}
    log.warning("listening", extra={"fields": fields | {"invariant": served.invariant}})
    await server.serve(sockets=[listening])
    for engine in filter(None, (app.engine, app.reference)):
        await asyncio.to_thread(engine.close, args.timeout)
    log.warning("stopped", extra={"fields": {"answered": app.engine.snapshot().requests}})


def _reload(app: Server, checkpoint: str) -> None:
    try:
        app.engine.swap(checkpoint)
    except Exception:
        log.exception("the checkpoint was not taken; the one before goes on")
    else:
        log.warning("swapped", extra={"fields": {"version": app.engine.served.version}})
