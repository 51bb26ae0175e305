"""``vitq serve`` as a process: what it prints, signals, TLS, what it refuses to start with."""

import asyncio
import contextlib
import gc
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading

import pytest
import torch
from loopback import infer_binary, logits_of, random_images
from vitq import Engine, checkpoint
from vitq.cli import main

pytest.importorskip("starlette", reason="needs the extra 'serve'")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

INFER = "/v2/models/model0/infer"


@contextlib.contextmanager
def process(*argv: str):
    """A running server and its log, line by line; the first says where it listens."""
    command = [sys.executable, "-m", "vitq.cli", "serve", *argv, "--port", "0", "--max-batch", "4"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            line = server.stderr.readline()
            assert line.startswith("{"), line + server.stderr.read()
            yield server, json.loads(line)
        finally:
            server.kill()


def post(connection: http.client.HTTPConnection, images: torch.Tensor, headers=None):
    body, own = infer_binary(images)
    connection.request("POST", INFER, body, own | (headers or {}))
    response = connection.getresponse()
    return response.status, logits_of(response.headers, response.read())


def test_a_server_from_start_to_end(folders, references, tmp_path):
    """Swapped by SIGHUP, stopped by SIGTERM, both under load: every answer is one of the two checkpoints' and whole."""
    folder, images = tmp_path / "model0", random_images(3)
    shutil.copytree(folders[0], folder)
    wanted = [reference(images) for reference in references]
    with process(str(folder)) as (server, first):
        assert (first["event"], first["model"], first["buckets"]) == ("listening", "model0", [1, 2, 4])
        assert first["invariant"] is True
        port, seen, swapped = int(first["url"].rpartition(":")[2]), [], threading.Event()

        def load() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            with contextlib.closing(connection), contextlib.suppress(ConnectionError, http.client.RemoteDisconnected):
                while True:  # until the server, having answered, closes
                    status, logits = post(connection, images)
                    assert status == 200
                    which = [torch.equal(logits, want) for want in wanted].index(True)
                    seen.append(which)
                    if which:
                        swapped.set()

        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        state, _ = checkpoint.load_state(folders[1])
        checkpoint.save(folder, state, overwrite=True)
        server.send_signal(signal.SIGHUP)
        assert swapped.wait(30)
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        for thread in threads:
            thread.join(30)
        events = [json.loads(line) for line in server.stderr]
    assert set(seen) == {0, 1}
    assert [e["event"] for e in events if e["event"] != "request"] == ["swapped", "stopped"]
    requests = [e for e in events if e["event"] == "request"]
    assert len(requests) == len(seen) == events[-1]["answered"]
    assert {e["status"] for e in requests} == {200}
    assert {e["version"] for e in requests} == {1, 2}
    assert all(e["images"] == 3 <= e["batch"] and e["ms"] >= e["run_ms"] > 0 for e in requests)


def test_small_packets_are_sent_at_once(folders, monkeypatch):
    """An answer goes out in two; the second must not wait until the first is acknowledged."""
    from vitq.serving.command import listen
    from vitq.serving.server import Server

    found = []

    async def serve(self, sockets):
        with socket.create_connection(sockets[0].getsockname()):
            accepted, _ = sockets[0].accept()
            with accepted:
                found.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(uvicorn.Server, "serve", serve)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        asyncio.run(listen(Server(Engine(folders[0], buckets=(1,)), "tiny"), listening))
    assert found == [1]


@pytest.fixture
def listening(folders, monkeypatch):
    """A function that runs ``listen`` around a coroutine function instead of a server's loop."""
    from vitq.serving.command import listen
    from vitq.serving.server import Server

    def run(engine, do):
        monkeypatch.setattr(uvicorn.Server, "serve", lambda self, sockets: do())
        with socket.create_server(("127.0.0.1", 0)) as listener:
            asyncio.run(listen(Server(engine, "tiny"), listener, folders[0]))

    return run


def test_signals_that_come_during_a_reload_are_one(folders, listening):
    """Each would be waited for at the end."""
    with Engine(folders[0], buckets=(1,)) as engine:
        swap, began, gate = engine.swap, [], threading.Event()
        engine.swap = lambda folder: (began.append(folder), gate.wait(20), swap(folder))

        async def hang_up() -> None:
            for _ in range(10):
                os.kill(os.getpid(), signal.SIGHUP)
                await asyncio.sleep(0.02)
            gate.set()
            while engine.served.version < 3:
                await asyncio.sleep(0.01)

        listening(engine, hang_up)
        assert began == [folders[0]] * 2


def test_a_reload_that_the_end_finds_running_leaves_nothing_frozen(folders, listening):
    """What the collector never sees is never freed, which libraries complain of at exit."""
    with Engine(folders[0], buckets=(1,)) as engine:
        swap, began, gate = engine.swap, threading.Event(), threading.Event()
        engine.swap = lambda folder: (began.set(), gate.wait(20), swap(folder))

        async def end() -> None:
            os.kill(os.getpid(), signal.SIGHUP)
            while not began.is_set():
                await asyncio.sleep(0.01)
            asyncio.get_running_loop().call_later(0.3, gate.set)

        listening(engine, end)
        assert (engine.served.version, gc.get_freeze_count()) == (2, 0)


def test_an_address_of_ipv6(folders):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on loopback")
    with process(folders[0], "--host", "::1") as (_, first):
        port = int(re.fullmatch(r"http://\[::1\]:(\d+)", first["url"])[1])
        with contextlib.closing(http.client.HTTPConnection("::1", port, timeout=30)) as connection:
            connection.request("GET", "/v2/health/ready")
            assert connection.getresponse().status == 200


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl on the PATH")
def test_tls_and_a_token(folders, references, tmp_path):
    key, certificate, token = (tmp_path / name for name in ("key.pem", "certificate.pem", "token"))
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run([*request, *subject, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    token.write_text("a-token-of-some-length\n")
    tls = ["--tls-cert", str(certificate), "--tls-key", str(key), "--token-file", str(token)]
    with process(folders[0], *tls) as (_, first):
        assert first["url"].startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        port = int(first["url"].rpartition(":")[2])
        with contextlib.closing(http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=30)) as secure:
            images = random_images(2)
            status, logits = post(secure, images, {"Authorization": "Bearer a-token-of-some-length"})
            assert status == 200
            assert torch.equal(logits, references[0](images))
            secure.request("GET", "/status")
            assert secure.getresponse().status == 401


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "no such folder"),
        (["--device", "cuda:99"], "--device is 'cuda:99'"),
        (["--backend", "triton"], "triton"),
        (["--tls-cert", "x.pem"], "expected both or neither"),
        (["--token-file", "no-such-file"], "no-such-file"),
        (["--max-queue", "8"], "max_queue=8"),
        (["--tls-cert", "no-such-file", "--tls-key", "x.pem"], "no-such-file"),
        (["--tls-cert", __file__, "--tls-key", __file__], f"--tls-cert '{__file__}' and --tls-key '{__file__}' are no"),
        (["--name", "a/b"], "--name is 'a/b', expected a part of a URL"),
        (["--max-replicas", "2"], "--max-replicas is given with --engine local"),
        (["--float"], "where its float model came from"),
    ],
)
def test_what_it_refuses_to_start_with(folders, capsys, argv, message):
    argv = argv if argv == ["nothing"] else [folders[0], *argv]
    assert main(["serve", *argv, "--port", "0"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("argv", [["--backend", "tpu"], ["--tls-cert", __file__, "--tls-key", __file__]])
def test_options_are_refused_before_anything_is_loaded(folders, capsys, monkeypatch, argv):
    monkeypatch.setattr("vitq.serving.command.Engine", None)
    assert main(["serve", folders[0], *argv, "--port", "0"]) == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_short_token_is_refused(folders, capsys, monkeypatch, engine):
    if engine == "ray":
        pytest.importorskip("ray.serve", reason="needs the extra 'ray'")
    monkeypatch.setenv("VITQ_TOKEN", "short")
    monkeypatch.setattr("vitq.serving.command.Engine", None)
    monkeypatch.setattr("vitq.serving.command.read_config", None)
    assert main(["serve", folders[0], "--port", "0", "--engine", engine]) == 2
    assert "the token has 5 characters" in capsys.readouterr().err


def test_an_address_in_use_is_refused(folders, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", folders[0], "--port", str(taken.getsockname()[1])]) == 2
    assert "in use" in capsys.readouterr().err


@pytest.mark.parametrize(("missing", "extra"), [("uvicorn", "serve"), ("ray", "ray")])
def test_a_missing_library_is_named_with_its_extra(folders, capsys, monkeypatch, missing, extra):
    for name in [name for name in sys.modules if name.startswith("vitq.serving.c")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(f"vitq.serving.{name.rpartition('.')[2]}")
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["serve", folders[0], "--engine", "ray" if missing == "ray" else "local"]) == 2
    assert f"serving needs {missing}: pip install 'vitq-kernels[{extra}]'" in capsys.readouterr().err


def test_nothing_of_it_is_imported_unless_it_is_used():
    code = "import sys, vitq.commands; print({'starlette', 'uvicorn', 'prometheus_client', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"
