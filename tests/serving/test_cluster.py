"""The service on Ray: the engine's bits, no request lost with a killed replica. Skipped, visibly, without ray."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from loopback import Client, infer_binary, infer_json, logits_of, random_images

pytest.importorskip("ray", reason="needs the extra 'ray'")
pytest.importorskip("ray.serve", reason="needs the extra 'ray'")
from vitq.cli import main
from vitq.serving import cluster
from vitq.serving.cluster import Options, application

ROOT = Path(__file__).resolve().parents[2]
INFER = "/v2/models/tiny/infer"


def descendants(pid: int) -> dict[int, str]:
    """Processes below ``pid``, and what they call themselves."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()]
    found, left = {}, [pid]
    while left:
        parent = left.pop()
        children = {int(p): args for p, pp, args in rows if int(pp) == parent}
        found |= children
        left += children
    return found


@pytest.fixture(scope="module")
def running(folders):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vitq.cli", "serve", folders[0], "--name", "tiny", "--port", str(port)]
    command += ["--engine", "ray", "--replicas", "2", "--max-batch", "8"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = [""]
            while not said[-1].startswith("{"):  # Ray has more to say
                said.append(process.stderr.readline())
                assert said[-1], "".join(said)
            assert json.loads(said[-1])["url"] == f"http://127.0.0.1:{port}"
            yield process, Client(port)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(120)
            process.kill()


@pytest.mark.slow
def test_a_service_on_ray(running, references):
    """One test: starting takes most of its time."""
    process, client = running
    images = random_images(3)
    want = references[0](images)

    def infer() -> tuple[int, bytes]:
        status, headers, body = client("POST", INFER, *infer_binary(images), timeout=120)
        return status, b"" if status == 200 and torch.equal(logits_of(headers, body), want) else body or b"wrong"

    assert infer() == (200, b"")
    status, headers, body = client("POST", INFER, json.dumps(infer_json(images)), timeout=120)
    assert torch.equal(logits_of(headers, body), want)
    nan = torch.full((1, 3, 16, 16), float("nan"))
    for request, status in ((infer_binary(nan), 400), (infer_binary(random_images(9)), 413), ((b"{",), 400)):
        assert client("POST", INFER, *request, timeout=120)[0] == status
    replicas = [pid for pid, name in descendants(process.pid).items() if "ServeReplica:vitq:replica" in name]
    assert len(replicas) == 2
    answers, stop = [], threading.Event()

    def load() -> None:
        while not stop.is_set():
            answers.append(infer())

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(answers) < 20:
        time.sleep(0.05)
    os.kill(replicas[0], signal.SIGKILL)
    before = len(answers)
    while len(answers) < before + 40:
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join(120)
    assert set(answers) == {(200, b"")}
    assert client.json("GET", "/status")[1]["engine"]["failed"] == 0
    process.terminate()
    assert process.wait(120) == 0


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [("my-long-enough-token", None), ("my-long-enough-token", "of-nodes-long-enough"), (None, "of-nodes-long-enough")],
)
def test_the_token_of_who_deploys_is_the_gateways(monkeypatch, mine, theirs):
    """Nodes have not the environment of who deploys: without a token, they would let anybody in."""

    class Replicas:
        about = SimpleNamespace(remote=lambda: asyncio.sleep(0, {}))

    def node(token):
        monkeypatch.setenv("VITQ_TOKEN", token) if token else monkeypatch.delenv("VITQ_TOKEN", raising=False)

    monkeypatch.setattr(cluster, "freeze", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(cluster, "Remote", lambda *_: None)
    monkeypatch.setattr(cluster, "Server", lambda *_, token, **__: token)
    node(mine)
    options, _, *given = application({"checkpoint": "out"})._bound_deployment.init_args
    node(theirs)
    made = cluster.Gateway.__bases__[0]  # of what Serve wraps
    assert asyncio.run(made(options, Replicas, *given).__serve_build_asgi_app__()) == (mine or theirs)
    node("short")
    with pytest.raises(ValueError, match="the token has 5 characters"):
        asyncio.run(made(options, Replicas).__serve_build_asgi_app__())


def test_the_deploy_file_is_of_this_application():
    (deployed,) = yaml.safe_load((ROOT / "deploy" / "ray-serve.yaml").read_text())["applications"]
    module, _, name = deployed["import_path"].partition(":")
    assert (module, name) == (application.__module__, application.__name__)
    assert Options(**deployed["args"]).model == "out"
    assert application(deployed["args"]) is not None


def test_the_deploy_file_fits_rays_schema():
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "deploy" / "ray-serve.yaml").read_text()))


@pytest.mark.parametrize("wrong", [{"replicas": 0}, {"device": 3}, {"gpu": 1}, {"limits": {"pixels": 0}}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        application({"checkpoint": "out", **wrong})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--target", "2"], "--target is given without --max-replicas"),
        (["--target", "0", "--max-replicas", "2"], "--target is 0.0, expected"),
        (["--target", "nan", "--max-replicas", "2"], "--target is nan, expected"),
        (["--target", "inf", "--max-replicas", "2"], "--target is inf, expected"),
        (["--replicas", "3", "--max-replicas", "2"], "--max-replicas is 2, expected at least --replicas, 3"),
    ],
)
def test_scaling_that_cannot_be_is_refused(folders, capsys, argv, message):
    assert main(["serve", folders[0], "--engine", "ray", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--float", "--tls-cert=x", "--token-file=x"])
def test_what_ray_does_not_take(folders, capsys, option):
    assert main(["serve", folders[0], "--engine", "ray", option]) == 2
    assert f"{option.partition('=')[0]} is given with --engine ray" in capsys.readouterr().err
