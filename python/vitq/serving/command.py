"""``vitq serve``: one process that listens until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
import ssl
import sys
from pathlib import Path

import torch
import uvicorn

from ..checkpoint import read_config
from ..sources import load_float
from .engine import Engine, buckets_up_to, freeze
from .server import JsonLines, Limits, Server, access, check_token, log

RAY = ("max_replicas", "target")
"""Options that only Ray's engine has."""


def serve(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> None:
    """Load, listen, answer; SIGHUP takes the checkpoint anew, SIGTERM and SIGINT end it when all is answered.

    Raises: ValueError, OSError: what is wrong with the checkpoint, an option, or the address.
    """
    model_name = args.name or Path(args.checkpoint).resolve().name
    if not model_name or "/" in model_name:
        raise ValueError(f"--name is {model_name!r}, expected a part of a URL, without '/'")
    if args.engine == "ray":
        _serve_on_ray(args)
        return
    for name in RAY:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is given with --engine local, expected --engine ray")
    token = os.environ.get("VITQ_TOKEN")
    if args.token_file:
        token = Path(args.token_file).read_text().strip()
    check_token(token)
    if (args.tls_cert is None) != (args.tls_key is None):
        raise ValueError("one of --tls-cert and --tls-key is given, expected both or neither")
    if args.tls_cert is not None:
        _check_tls(args.tls_cert, args.tls_key)
    limits = _limits(args)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    listening = socket.create_server((args.host, args.port), family=family, backlog=1024)
    options = {"replicas": args.replicas, "max_delay": args.max_delay / 1e3, "max_queue": args.max_queue}
    options |= {"device": device, "dtype": dtype, "backend": args.backend, "threads": args.threads}
    engine = Engine(args.checkpoint, buckets=buckets_up_to(args.max_batch), **options)
    reference = None
    if args.float:
        from ..commands import recorded_source

        model = load_float(recorded_source(args.checkpoint))
        shape = {"threads": args.threads, "keep_threads": False, "buckets": (1, 2, 4), "max_queue": 32}
        reference = Engine(model, device=device, **shape)
    torch.set_num_threads(1)  # of what decodes and checks; the cores are the workers'
    server = Server(engine, model_name, limits=limits, token=token, reference=reference)
    log_lines(args.log_level)
    tls = None if args.tls_cert is None else (args.tls_cert, args.tls_key)
    asyncio.run(listen(server, listening, args.checkpoint, tls))


def _check_tls(certificate: str, key: str) -> None:
    """Before the checkpoint is loaded. Raises: OSError, ValueError naming the file."""
    for file in (certificate, key):
        Path(file).read_bytes()
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise ValueError(f"--tls-cert '{certificate}' and --tls-key '{key}' are no PEM pair: {error}") from error


def _limits(args: argparse.Namespace) -> Limits:
    most = args.max_bytes << 20
    held = max(Limits.held_bytes, most)
    return Limits(most, held, args.max_pixels, args.max_pending, args.body_timeout, args.timeout)


def _serve_on_ray(args: argparse.Namespace) -> None:
    for name in ("token_file", "tls_cert", "tls_key", "float"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is given with --engine ray, expected --engine local")
    check_token(os.environ.get("VITQ_TOKEN"))
    read_config(args.checkpoint)
    from . import cluster

    if args.max_replicas is not None and args.max_replicas < args.replicas:
        raise ValueError(f"--max-replicas is {args.max_replicas}, expected at least --replicas, {args.replicas}")
    if args.target is not None and args.max_replicas is None:
        raise ValueError("--target is given without --max-replicas, expected both, or neither")
    if args.target is not None and not 0 < args.target < math.inf:
        raise ValueError(f"--target is {args.target}, expected requests above 0")
    same = ("name", "device", "dtype", "backend", "max_batch", "max_queue", "replicas")
    options = {name: getattr(args, name) for name in same} | {"threads": args.threads or 1, "limits": _limits(args)}
    options |= {name: value for name in RAY if (value := getattr(args, name)) is not None}
    checkpoint = str(Path(args.checkpoint).resolve())
    log_lines(args.log_level)
    options = cluster.Options(checkpoint=checkpoint, max_delay_ms=args.max_delay, **options)
    cluster.run(options, args.host, args.port)


def log_lines(requests: str) -> None:
    """JSON lines on stderr. Args: requests: the level from which requests are logged; warning: only answers of 5xx."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for logger, level in ((log, "INFO"), (logging.getLogger("uvicorn.error"), "WARNING")):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    access.setLevel(requests.upper())


def set_options(listening: socket.socket, limits: Limits) -> None:
    """Options of a listening TCP socket, which those that it accepts inherit."""
    # asyncio sets it only where it made the socket, and without it the second packet of an answer waits for the
    # client's delayed acknowledgement of the first: 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Who asks and never reads the answers would keep what the requests hold.
        patience = min(math.ceil(1e3 * (limits.body_s + limits.answer_s)), (1 << 31) - 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)


async def listen(
    app: Server, listening: socket.socket, checkpoint: str | None = None, tls: tuple[str, str] | None = None
) -> None:
    """Answer on ``listening`` until SIGTERM or SIGINT, then answer what was accepted and close the engines.

    Args: checkpoint: taken anew on SIGHUP. tls: files of certificate chain and private key.
    """
    limits, engine = app.limits, app.engine
    set_options(listening, limits)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(limits.body_s + limits.answer_s) + 1,
        limit_concurrency=4 * limits.pending,
        ssl_certfile=tls and tls[0],
        ssl_keyfile=tls and tls[1],
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # it would raise them again when all is done
    loop = asyncio.get_running_loop()

    again = asyncio.Event()

    def stop() -> None:
        app.closing = server.should_exit = True
        again.set()

    async def reload() -> None:
        # One after the other, and one for all signals that come meanwhile: the end waits for those begun.
        while not app.closing:
            await again.wait()
            again.clear()
            if not app.closing:
                await asyncio.to_thread(_reload, engine, checkpoint)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    if checkpoint is not None:
        loop.add_signal_handler(signal.SIGHUP, again.set)
    reloading = loop.create_task(reload())
    host, port = listening.getsockname()[:2]
    url = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    fields = {"url": url, "model": app.name, "recipe": engine.served.recipe, "device": str(engine.device)}
    fields |= {"replicas": engine.replicas, "threads": engine.threads, "buckets": engine.buckets}
    freeze()
    log.info("listening", extra={"fields": fields | {"invariant": engine.served.invariant}})
    await server.serve(sockets=[listening])
    stop()
    await reloading
    gc.unfreeze()
    for each in filter(None, (engine, app.reference)):
        await asyncio.to_thread(each.close, limits.answer_s)
    log.info("stopped", extra={"fields": {"answered": engine.snapshot().requests}})


def _reload(engine: Engine, checkpoint: str) -> None:
    try:
        engine.swap(checkpoint)
    except Exception:
        log.exception("the checkpoint was not taken; the one before goes on")
    else:
        gc.unfreeze()  # of what the old one was
        freeze()
        log.info("swapped", extra={"fields": {"version": engine.served.version}})
