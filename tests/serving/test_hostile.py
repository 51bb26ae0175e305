"""Clients that mean harm, or might as well: none gets in, stops the server, or takes what others need."""

import contextlib
import json
import socket
import threading
import time
import tracemalloc

import pytest
import torch
from loopback import SMALL, infer_binary, infer_json, listening, logits_of, quantized, random_images
from vitq import Engine, checkpoint

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")
from starlette.datastructures import URL
from starlette.requests import Request
from vitq.serving import protocol
from vitq.serving.command import set_options
from vitq.serving.protocol import Refused
from vitq.serving.server import Limits, Server

INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def served(folders):
    with Engine(folders[0], buckets=(1, 2)) as engine, listening(Server(engine, "tiny")) as client:
        yield client


def test_the_host_header_opens_nothing(folders, monkeypatch):
    """A token is needed whatever URL Starlette makes of it; early ones took it as it was."""
    early = property(lambda request: URL(f"http://{request.headers['host']}{request.scope['path']}"))
    monkeypatch.setattr(Request, "url", early)
    with Engine(folders[0], buckets=(1,)) as engine, listening(Server(engine, "tiny", token="t" * 20)) as client:
        for host in ("x", "x/?", "x/v2/health/live?", "x/v2/health/ready#"):
            assert client("GET", "/status", None, {"Host": host})[0] == 401, host
        assert client("GET", "/v2/health/live", None, {"Host": "x/y"})[0] == 200


def test_nobody_is_sent_to_the_host_that_a_header_names(served):
    status, headers, body = served("GET", "/status/", None, {"Host": "elsewhere.example"})
    assert (status, headers["location"], json.loads(body)) == (404, None, {"error": "Not Found"})


def body(**fields) -> str:
    content = infer_json(random_images(1))
    content["inputs"][0] |= fields
    return json.dumps(content)


def test_one_text_among_numbers_takes_no_room_for_each():
    """numpy would make of this 50 kB an array of 800 MB."""
    request = bytearray(body(data=["x" * 20_000] + [0] * 10_000).encode())
    tracemalloc.start()
    with pytest.raises(Refused, match="other values than numbers"):
        protocol.parse(request, None)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 << 20


@pytest.mark.parametrize("item", ["[]", "{}", "[[]]"])
def test_lists_of_nothing_take_no_room(item, monkeypatch):
    monkeypatch.setattr(protocol, "_json", None)
    with pytest.raises(Refused, match="lists and objects in"):
        protocol.parse(bytearray(body(data=[0]).replace("[0]", "[" + ",".join([item] * 10_000) + "]").encode()), None)


def test_rows_of_short_numbers_are_taken():
    request = {"inputs": [{"name": "images", "shape": [64, 3, 8, 8], "datatype": "FP32"}]}
    request["inputs"][0]["data"] = torch.zeros(64, 3, 8, 8, dtype=torch.int64).tolist()
    found = protocol.parse(bytearray(json.dumps(request, separators=(",", ":")).encode()), None)
    assert torch.equal(found.images, torch.zeros(64, 3, 8, 8))


def test_the_product_of_many_sizes_is_not_computed(monkeypatch):
    """It takes their number squared: hours for what fits into a body."""
    monkeypatch.setattr(protocol.math, "prod", None)
    with pytest.raises(Refused, match="expected up to 8 sizes from 1") as refusal:
        protocol.parse(bytearray(body(shape=[2**31 - 1] * 10_000).encode()), None)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize("fields", [{"shape": [0] + [2**31 - 1] * 7, "data": []}, {"data": [10**30] * 768}])
def test_sizes_and_integers_beyond_64_bits(served, fields):
    status, _, answer = served("POST", INFER, body(**fields))
    assert (status, list(json.loads(answer))) == (400, ["error"])


@pytest.mark.parametrize(
    "request_body",
    [
        body(parameters={"\ud800": 1}).replace('"data"', '"x"'),
        body(parameters={"binary_data_size": "\ud800"}).replace('"data"', '"x"'),
        json.dumps(infer_json(random_images(1), parameters={"timeout": "\ud800"})),
        json.dumps(infer_json(random_images(1), parameters={"binary_data_output": "\ud800"})),
    ],
)
def test_what_utf8_does_not_have_is_quoted_in_another_way(served, request_body):
    status, _, answer = served("POST", INFER, request_body)
    assert status == 400
    assert "\\ud800" in json.loads(answer)["error"]


def test_logits_that_json_has_no_numbers_for(served):
    huge = torch.full((1, 3, 16, 16), 3e38)
    status, _, answer = served("POST", INFER, json.dumps(infer_json(huge)))
    assert (status, "binary_data_output" in json.loads(answer)["error"]) == (400, True)
    status, headers, answer = served("POST", INFER, *infer_binary(huge))
    assert status == 200
    assert logits_of(headers, answer).isnan().any()


def test_long_json_is_parsed_apart_whatever_its_headers(served, monkeypatch):
    seen, parse = [], protocol.parse
    monkeypatch.setattr(protocol, "parse", lambda *given: (seen.append(threading.get_ident()), parse(*given))[1])
    for padding in (0, 1 << 16):
        request, headers = infer_binary(random_images(1))
        headers = {name: str(int(length) + padding) for name, length in headers.items()}
        assert served("POST", INFER, b" " * padding + request, headers)[0] == 200
    assert seen[0] != seen[1]


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no TCP_USER_TIMEOUT")
def test_who_never_reads_answers_keeps_nothing(tmp_path):
    """A second request waits until the first one's answer, of megabytes, is taken."""
    checkpoint.save(tmp_path / "wide", quantized(0, **{**SMALL, "num_classes": 5000}))
    limits = Limits(pending=2, body_s=0.2, answer_s=0.5)
    request = json.dumps(infer_json(torch.zeros(32, 3, 16, 16))).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(request)}\r\n\r\n".encode()
    with Engine(tmp_path / "wide", buckets=(32,)) as engine, contextlib.ExitStack() as sockets:
        app = Server(engine, "tiny", limits=limits)
        with listening(app, lambda listener: set_options(listener, limits)) as client:
            for _ in range(2):
                deaf = sockets.enter_context(socket.socket())
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                deaf.connect(("127.0.0.1", client.port))
                deaf.sendall(2 * (head + request))
            deadline = time.monotonic() + 30
            while engine.snapshot().requests < 4 or app._pending:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert client("GET", "/status")[0] == 200


def test_who_has_no_token_keeps_nobody_out(folders):
    """Bodies that were refused, and never come, are no requests in progress."""
    limits = Limits(pending=2, body_s=20)
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode()
    request, headers = infer_binary(random_images(1))
    with (
        Engine(folders[0], buckets=(1,)) as engine,
        listening(Server(engine, "tiny", token="t" * 20, limits=limits)) as client,
        contextlib.ExitStack() as sockets,
    ):
        for _ in range(4):
            sockets.enter_context(socket.create_connection(("127.0.0.1", client.port))).sendall(head)
        time.sleep(0.3)
        status, _, answer = client("POST", INFER, request, headers | {"Authorization": f"Bearer {'t' * 20}"})
        assert status == 200, answer
