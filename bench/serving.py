"""Load and faults: the engine in process and ``vitq serve`` on loopback, integer and float model, one after the other.

OMP_NUM_THREADS=1 python -m bench.serving     # writes bench/results/serving.json; update_docs.py makes the tables

A model has as many threads as torch has here. Ray is measured, and seen to scale up under load, where it is installed.

Capacity: images per second with CLIENTS requests of one image always under way, at a largest batch of 1 and of 32.
Sustained: requests of one image that arrive at random (Poisson) at 80 % of that capacity, whoever may be late; latency
counts from the moment a request was due. Overhead: one request at a time, engine and server in turn. Faults: requests
of all kinds, 5 % of them malformed, each answer compared with what it has to be. Every answer of the integer model is
compared with the model's bits, the float model's, which depend on the batch, within 1e-4. The load comes from this
process, the server is another; they share the cores that they are given.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import io
import json
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from vitq import Engine, checkpoint, jobs
from vitq.bench.environment import environment
from vitq.models.digits_vit import NAME
from vitq.recipes import load_recipe
from vitq.serving import images as files
from vitq.serving.engine import Overloaded, buckets_up_to, freeze, percentiles
from vitq.sources import ModelSource, load_float

RESULT = Path(__file__).resolve().parent / "results" / "serving.json"
CLIENTS, BATCH, IMAGES, SHARE = 32, 32, 64, 0.8
BODY_S = 1.0
"""Seconds that the server waits for the body of a slow client."""

Ask = Callable[[int], Awaitable[bool]]
"""Sends request number i; whether it was answered, not refused by a full queue. AssertionError: answered wrongly."""


class Connection:
    """HTTP/1.1 with keep-alive and as little else as possible."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.open = True

    @classmethod
    async def to(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def __call__(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, body."""
        with contextlib.suppress(ConnectionError):  # who refuses a body need not have read it
            self._writer.write(request)
            await self._writer.drain()
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:-2])}
        body = await self._reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            self.close()
        return int(head[0].split()[1]), headers, body

    def close(self) -> None:
        self.open = False
        self._writer.close()


class Pool:
    """Connections to one port, opened as they are needed."""

    def __init__(self, port: int) -> None:
        self._port, self._free = port, []

    async def __call__(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = self._free.pop() if self._free else await Connection.to(self._port)
        answer = await connection(request)
        if connection.open:
            self._free.append(connection)
        return answer

    def close(self) -> None:
        while self._free:
            self._free.pop().close()


def post(path: str, body: bytes, announced: int | None = None, **headers: str) -> bytes:
    fields = {"host": "localhost", "content-length": str(len(body) if announced is None else announced), **headers}
    lines = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in fields.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def infer(images: Tensor, binary: bool = True, **changes) -> bytes:
    """A request of the protocol; ``changes`` to what it says of its tensor."""
    tensor = {"name": "images", "shape": list(images.shape), "datatype": "FP32"}
    data = images.numpy().tobytes() if binary else b""
    more = {"parameters": {"binary_data_size": len(data)}} if binary else {"data": images.flatten().tolist()}
    head = json.dumps({"inputs": [tensor | more | changes], "parameters": {"binary_data_output": binary}}).encode()
    length = {"inference_header_content_length": str(len(head))} if binary else {}
    return post("/v2/models/model/infer", head + data, **length)


def logits_of(headers: dict[str, str], body: bytes) -> Tensor:
    length = headers.get("inference-header-content-length")
    if length is None:
        return torch.tensor(json.loads(body)["outputs"][0]["data"])
    return torch.frombuffer(bytearray(body[int(length) :]), dtype=torch.float32)


def same(got: Tensor, want: Tensor, exact: bool) -> None:
    """Raises AssertionError where an answer is wrong."""
    assert torch.equal(got, want) if exact else torch.allclose(got, want, atol=1e-4), (got, want)


# Load


async def closed(ask: Ask, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Answers per second and their seconds, with so many requests always under way."""
    times: list[float] = []
    start = time.perf_counter()
    end = start + seconds

    async def client(first: int) -> None:
        i = first
        while (sent := time.perf_counter()) < end:
            assert await ask(i)
            times.append(time.perf_counter() - sent)
            i += clients

    await asyncio.gather(*(client(i) for i in range(clients)))
    return len(times) / (time.perf_counter() - start), times


async def paced(ask: Ask, rate: float, seconds: float) -> tuple[int, list[float]]:
    """Requests refused, and seconds from when each other one was due to its answer, at so many arrivals per second."""
    chance, due, tasks, times = random.Random(0), 0.0, [], []
    refused, start = 0, time.perf_counter()

    async def client(i: int, due: float) -> None:
        nonlocal refused
        if await ask(i):
            times.append(time.perf_counter() - start - due)
        else:
            refused += 1

    while (due := due + chance.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        tasks.append(asyncio.create_task(client(len(tasks), due)))
    await asyncio.gather(*tasks)
    return refused, times


# Those under load


def ask_engine(engine: Engine, images: Tensor, wanted: Tensor, exact: bool) -> Ask:
    async def ask(i: int) -> bool:
        try:
            answer = await asyncio.wrap_future(engine.submit(images[i % IMAGES : i % IMAGES + 1]))
        except Overloaded:
            return False
        same(answer.logits[0], wanted[i % IMAGES], exact)
        return True

    return ask


def ask_server(pool: Pool, requests: list[bytes], wanted: Tensor, exact: bool) -> Ask:
    async def ask(i: int) -> bool:
        status, headers, body = await pool(requests[i % IMAGES])
        if status == 429:
            return False
        assert status == 200, body
        same(logits_of(headers, body), wanted[i % IMAGES], exact)
        return True

    return ask


def make(what: str, batch: int) -> Engine:
    """Of a checkpoint folder, or of the float model."""
    model = load_float(ModelSource(NAME)) if what == "float" else what
    return Engine(model, threads=torch.get_num_threads(), buckets=buckets_up_to(batch))


@contextlib.contextmanager
def server(what: str, batch: int, engine: str = "local", *options: str) -> Iterator[tuple[int, int]]:
    """Port and process of a server of its own."""
    command = [sys.executable, "-m", "bench.serving", "--serve", what, "--batch", str(batch)]
    if engine == "ray":
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        command = [sys.executable, "-m", "vitq.cli", "serve", what, "--engine", "ray", "--port", port, "--name"]
        command += ["model", "--max-batch", str(batch), "--threads", str(torch.get_num_threads()), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = []
            for line in process.stderr:  # Ray has more to say
                said.append(line)
                if line.startswith("{"):
                    break
            assert said[-1].startswith("{"), "".join(said)
            yield int(json.loads(said[-1])["url"].rpartition(":")[2]), process.pid
        finally:
            process.terminate()
            process.communicate(timeout=120)


def serve(what: str, batch: int) -> None:
    """What ``vitq serve`` does, of the float model, too."""
    from vitq.serving.command import listen, log_lines
    from vitq.serving.server import Limits, Server

    app = Server(make(what, batch), "model", limits=Limits(body_s=BODY_S))
    log_lines("warning")
    asyncio.run(listen(app, socket.create_server(("127.0.0.1", 0), backlog=1024)))


@contextlib.asynccontextmanager
async def under_load(who: str, what: str, batch: int, data: tuple[Tensor, Tensor]) -> AsyncIterator[tuple[Ask, int]]:
    """Who answers, and the process that computes."""
    images, wanted = data
    exact = what != "float"
    if who == "engine":
        with make(what, batch) as engine:
            yield ask_engine(engine, images, wanted, exact), os.getpid()
        return
    with server(what, batch, "ray" if who == "Ray" else "local") as (port, pid):
        pool = Pool(port)
        yield ask_server(pool, [infer(image[None]) for image in images], wanted, exact), pid
        pool.close()


async def load(who: str, what: str, data: tuple[Tensor, Tensor], seconds: float) -> dict:
    """A row: capacity at a largest batch of 1 and of BATCH, then latency at a share of the latter; processor time of an
    image at capacity (of Ray's many processes, none)."""
    async with under_load(who, what, 1, data) as (ask, _):
        await closed(ask, CLIENTS, seconds / 4)
        single, _ = await closed(ask, CLIENTS, seconds)
    async with under_load(who, what, BATCH, data) as (ask, pid):
        await closed(ask, CLIENTS, seconds / 4)
        before = processor_ms(pid)
        capacity, times = await closed(ask, CLIENTS, seconds)
        busy = None if who == "Ray" else (processor_ms(pid) - before) / len(times)
        refused, times = await paced(ask, SHARE * capacity, 2 * seconds)
    row = {"who": who, "model": "float" if what == "float" else "integer", "single": single, "capacity": capacity}
    row |= {"gain": capacity / single, "rate": SHARE * capacity, "requests": len(times) + refused, "refused": refused}
    return row | {"processor_ms": busy} | percentiles(times)


async def overhead(what: str, data: tuple[Tensor, Tensor], seconds: float) -> list[dict]:
    """Of one request at a time to the engine and, in two forms, to the server, in turn: milliseconds until the answer,
    and of processor time in the process that computes it (the engine's is also the client's).
    """
    images, wanted = data
    with make(what, BATCH) as engine, server(what, BATCH) as (port, pid):
        pool, own = Pool(port), os.getpid()
        asks = {"engine": (own, ask_engine(engine, images, wanted, True))}
        for form in ("binary", "JSON"):
            requests = [infer(image[None], form == "binary") for image in images]
            asks[f"server, {form}"] = (pid, ask_server(pool, requests, wanted, True))
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in asks}
        for _ in range(10):
            for name, (process, ask) in asks.items():
                before = processor_ms(process)
                _, times = await closed(ask, 1, seconds / 10)
                busy = (processor_ms(process) - before) / len(times)
                samples[name].append((statistics.median(times) * 1e3, busy))
        pool.close()
    rows = []
    for name, values in samples.items():
        ms, busy = (statistics.median(column) for column in zip(*values))
        rows.append({"who": name, "ms": ms, "processor_ms": busy})
    return [row | {f"over_{k}": row[k] - rows[0][k] for k in ("ms", "processor_ms")} for row in rows]


def processor_ms(pid: int) -> float:
    """Of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return 1e3 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def scaling(what: str, data: tuple[Tensor, Tensor], most_s: float = 180.0) -> dict:
    """Of Ray with up to two replicas and CLIENTS requests always under way: seconds until two answer, and how many
    requests were answered until then and a while after. Raises: AssertionError: no second one, or a wrong answer.
    """
    import ray
    from ray import serve
    from vitq.serving.cluster import APPLICATION

    images, wanted = data
    with server(what, BATCH, "ray", "--max-replicas", "2", "--target", "2") as (port, _):
        ray.init("auto", log_to_driver=False)
        pool, start = Pool(port), time.perf_counter()
        ask = ask_server(pool, [infer(image[None]) for image in images], wanted, True)
        answers, states, seconds = 0, {}, 0.0
        while states.get("RUNNING") != 2:
            assert seconds < most_s, states
            answers += len((await closed(ask, CLIENTS, 2))[1])
            states = serve.status().applications[APPLICATION].deployments["replica"].replica_states
            seconds = time.perf_counter() - start
        answers += len((await closed(ask, CLIENTS, 10))[1])
        pool.close()
        ray.shutdown()
    return {"replicas": 2, "target": 2, "clients": CLIENTS, "seconds": seconds, "answers": answers}


# Faults


def picture(seed: int, format: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def malformed(images: Tensor) -> dict[str, tuple[bytes, int]]:
    """Request and the status it has to be refused with."""
    nan = images[:1].clone()
    nan[0, 0, 3, 3] = float("nan")
    chunks = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(1 << 20))
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(framed)
    jpeg, large = picture(0, "JPEG"), 8 << 20
    return {
        "wrong dtype": (infer(images[:1], datatype="FP64"), 400),
        "wrong shape": (infer(images[:1], shape=[1, 32, 32, 3]), 400),
        "truncated JPEG": (post("/classify", jpeg[: len(jpeg) // 2]), 400),
        "decompression bomb": (post("/classify", bomb), 413),
        "huge JSON": (post("/v2/models/model/infer", b"[" * large), 413),
        "slow body": (post("/v2/models/model/infer", b"{", 2), 408),
        "NaN": (infer(nan), 400),
        "no JSON": (post("/v2/models/model/infer", b"{"), 400),
    }


async def faults(folder: str, data: tuple[Tensor, Tensor], count: int, share: float = 0.05) -> dict:
    """Counts of answers, of what was wrong, and the server's resident memory over the run."""
    images, wanted = data
    model = checkpoint.load(folder)
    pixels = files.transform(model.vitq_config.data)
    good: list[tuple[bytes, Callable[[dict, bytes], None]]] = []
    for i in range(IMAGES):
        for binary in (True, False):
            good.append((infer(images[i : i + 1], binary), lambda h, b, i=i: same(logits_of(h, b), wanted[i], True)))
    for i, format in enumerate(("PNG", "JPEG") * 4):
        body = picture(i, format)
        with Image.open(io.BytesIO(body)) as image, torch.inference_mode():
            best = model(pixels(image.convert("RGB"))[None])[0].max().item()

        def check(_, answer: bytes, best=best) -> None:
            assert json.loads(answer)["integer"]["top"][0]["logit"] == best

        good.append((post("/classify", body), check))
    bad, chance = list(malformed(images).items()), random.Random(0)
    statuses, refused, wrong, memory = Counter(), Counter(), [], []
    with server(folder, BATCH) as (port, pid):
        pool, numbers = Pool(port), iter(range(count))

        async def client() -> None:
            for i in numbers:
                if i % (count // 10) == 0:
                    memory.append(resident_mb(pid))
                if chance.random() < share:
                    name, (request, status) = chance.choice(bad)
                    refused[name] += 1
                    got, _, answer = await pool(request)
                    if got != status:
                        wrong.append((name, got, answer[:200].decode("latin-1")))
                else:
                    request, check = chance.choice(good)
                    got, headers, answer = await pool(request)
                    try:
                        assert got == 200, answer
                        check(headers, answer)
                    except AssertionError as error:
                        wrong.append(("well-formed", got, str(error)[:200]))
                statuses[got] += 1

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        seconds = time.perf_counter() - start
        memory.append(resident_mb(pid))
        pool.close()
    return {"requests": count, "seconds": seconds, "malformed": dict(refused), "wrong": wrong,
            "statuses": {str(k): n for k, n in sorted(statuses.items())}, "resident_mb": memory}  # fmt: skip


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def measure(seconds: float, requests: int) -> dict:
    """The record. Raises: AssertionError where an answer under load is wrong."""
    source = ModelSource(NAME)
    floating = load_float(source)
    about = {"environment": environment(), "load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model")
        recipe = load_recipe("vitq-w4a8", fast=True)
        checkpoint.save(path, jobs.quantize(floating, source, recipe, "digits").state)
        images = jobs.random_images({"float": floating}, IMAGES)
        with torch.inference_mode():
            wanted = {path: by_one(checkpoint.load(path), images), "float": by_one(floating, images)}
        freeze()
        per_request = asyncio.run(overhead(path, (images, wanted[path]), seconds))  # in processes that are both fresh
        print(per_request, flush=True)
        rows = []
        for what, logits in wanted.items():
            for who in ("engine", "server", "Ray"):
                if who == "Ray" and (what == "float" or importlib.util.find_spec("ray") is None):
                    continue  # it serves checkpoints
                rows.append(asyncio.run(load(who, what, (images, logits), seconds)))
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        faulty = asyncio.run(faults(path, (images, wanted[path]), requests))
        gc.unfreeze()
        scaled = asyncio.run(scaling(path, (images, wanted[path]))) if importlib.util.find_spec("ray") else None
    measured = {"rows": rows, "overhead": per_request, "faults": faulty, "scaling": scaled}
    return {"model": NAME, "recipe": recipe.name, **about, **measured}


def by_one(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(image[None]) for image in images])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="per capacity; twice as long under sustained load")
    parser.add_argument("--requests", type=int, default=10_000, help="of the run with faults")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--serve", metavar="WHAT", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=BATCH, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.batch)
        return
    record = measure(args.seconds, args.requests)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(record["faults"])


if __name__ == "__main__":
    main()
