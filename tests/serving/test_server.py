"""The server on loopback: standard clients get the engine's bits; what is malformed gets its status, and no more."""

import contextlib
import http.client
import io
import json
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from anyio import CapacityLimiter
from loopback import Client, infer_binary, infer_json, listening, logits_of, picture, random_images
from PIL import Image
from vitq import Engine
from vitq.serving.engine import Answer

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")
from vitq.serving import images as files
from vitq.serving.server import Limits, Server

INFER = "/v2/models/tiny/infer"
LIMITS = Limits(body_bytes=1 << 20, held_bytes=4 << 20, pixels=1_000_000, pending=64, body_s=0.4, answer_s=10)


@pytest.fixture(scope="module")
def served(folders):
    with Engine(folders[0], buckets=(1, 2, 4, 8), max_queue=64) as engine:
        app = Server(engine, "tiny", limits=LIMITS)
        with listening(app) as client:
            yield app, client


@pytest.fixture
def client(served) -> Client:
    return served[1]


@pytest.fixture
def alive(client, references):
    """After the test the server answers as before it."""
    yield
    images = random_images(2, 77)
    status, headers, body = client("POST", INFER, *infer_binary(images))
    assert status == 200
    assert torch.equal(logits_of(headers, body), references[0](images))


def bomb(width: int, height: int) -> bytes:
    """A PNG whose few bytes announce, and hold, that many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + width // 8)) for _ in range(min(height, 2000))) + rows.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


# Standard clients


@pytest.mark.parametrize("b", [1, 3, 8])
def test_json_and_binary_give_the_bits_of_the_engine(client, references, b):
    images = random_images(b, b)
    want = references[0](images)
    status, headers, body = client("POST", INFER, json.dumps(infer_json(images, id="some")))
    assert (status, json.loads(body)["id"], json.loads(body)["model_name"]) == (200, "some", "tiny")
    assert torch.equal(logits_of(headers, body), want)
    nested = infer_json(images)
    nested["inputs"][0]["data"] = images.tolist()
    status, headers, body = client("POST", INFER.replace("/infer", "/versions/1/infer"), json.dumps(nested))
    assert status == 200
    assert torch.equal(logits_of(headers, body), want)
    for pad in range(4):  # the tensor then begins at any address
        status, headers, body = client("POST", INFER, *infer_binary(images, id="x" * pad))
        assert status == 200
        assert torch.equal(logits_of(headers, body), want)


@pytest.mark.parametrize("binary_in", [False, True])
@pytest.mark.parametrize("binary_out", [False, True])
def test_tritonclient(client, references, binary_in, binary_out):
    triton = pytest.importorskip("tritonclient.http")
    images = random_images(3, 5)
    with triton.InferenceServerClient(f"127.0.0.1:{client.port}") as remote:
        assert remote.is_server_live()
        assert remote.is_server_ready()
        assert remote.is_model_ready("tiny")
        assert remote.is_model_ready("tiny", "1")
        assert "binary_tensor_data" in remote.get_server_metadata()["extensions"]
        metadata = remote.get_model_metadata("tiny")
        (described,) = metadata["inputs"]
        tensor = triton.InferInput(described["name"], list(images.shape), described["datatype"])
        tensor.set_data_from_numpy(images.numpy(), binary_data=binary_in)
        wanted = [triton.InferRequestedOutput(metadata["outputs"][0]["name"], binary_data=binary_out)]
        for outputs in (wanted, None):
            result = remote.infer("tiny", [tensor], outputs=outputs, request_id="7", timeout=9_000_000)
            assert result.get_response()["id"] == "7"
            assert torch.equal(torch.from_numpy(result.as_numpy("logits").copy()), references[0](images))
        with pytest.raises(triton.InferenceServerException, match="expected 'tiny'"):
            remote.infer("other", [tensor])


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on the PATH")
def test_curl(client, references, tmp_path):
    images, url = random_images(2, 6), f"http://127.0.0.1:{client.port}"
    file = tmp_path / "request.json"
    file.write_text(json.dumps(infer_json(images)))
    done = subprocess.run(["curl", "-sS", "-d", f"@{file}", url + INFER], capture_output=True, timeout=30, check=True)
    assert torch.equal(logits_of({}, done.stdout), references[0](images))
    body, headers = infer_binary(images)
    file.write_bytes(body)
    header = [f"{k}: {v}" for k, v in headers.items()]
    answer = tmp_path / "answer"
    command = ["curl", "-sS", "-H", *header, "--data-binary", f"@{file}", "-D", "-", "-o", answer, url + INFER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    length = re.search(r"(?im)^inference-header-content-length: (\d+)", done.stdout)[1]
    got = logits_of({"Inference-Header-Content-Length": length}, answer.read_bytes())
    assert torch.equal(got, references[0](images))


def test_metadata_and_status(client):
    assert client.json("GET", "/v2")[1]["name"] == "vitq"
    _, model = client.json("GET", "/v2/models/tiny")
    assert model["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 16, 16]}]
    assert model["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 7]}]
    _, status = client.json("GET", "/status")
    assert status["invariant"] is True
    assert (status["classes"], status["recipe"], status["float"]) == (7, "vitq-w4a8", False)


def test_metrics_count_what_happens(served, alive):
    _, client = served

    def value(pattern: str) -> float:
        text = client("GET", "/metrics")[2].decode()
        return sum(float(x) for x in re.findall(rf"^{pattern} (\S+)$", text, re.M))

    names = (r'vitq_http_requests_total{route="infer",status="200"}', "vitq_engine_images_total",
             r'vitq_http_requests_total{route="infer",status="400"}',
             r'vitq_http_request_seconds_count{route="infer"}')  # fmt: skip
    before = [value(name) for name in names]
    assert client("POST", INFER, *infer_binary(random_images(5)))[0] == 200
    assert client("POST", INFER, "no json")[0] == 400
    assert [value(name) - was for name, was in zip(names, before)] == [1, 5, 1, 2]
    assert value('vitq_latency_seconds{quantile="0.99"}') > 0


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_limits_are_finite(value):
    with pytest.raises(ValueError, match=f"answer_s is {value}, expected a number above 0"):
        Limits(answer_s=value)


# Images


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_an_image_file_gets_the_classes_of_its_pixels(served, client, references, format):
    body, data = picture(format), served[0].engine.served.data
    with Image.open(io.BytesIO(body)) as image:
        logits = references[0](files.transform(data)(image.convert("RGB"))[None])[0]
    status, answer = client.json("POST", "/classify?top=7")[0], None
    assert status == 415, "no body is no image"
    status, _, answer = client("POST", "/classify?top=7", body)
    assert status == 200
    found = json.loads(answer)["integer"]["top"]
    assert [row["class"] for row in found] == logits.argsort(descending=True).tolist()
    assert [row["logit"] for row in found] == logits.sort(descending=True).values.tolist()
    assert sum(row["probability"] for row in found) == pytest.approx(1)
    assert found[0]["label"] == str(found[0]["class"])
    assert len(json.loads(client("POST", "/classify", body)[2])["integer"]["top"]) == 5


def test_an_image_that_fits_is_never_enlarged_too_far(served):
    """A limit below the model's own size is one of files, not of what they are resized to."""
    data = served[0].engine.served.data
    image = Image.open(io.BytesIO(picture(size=(8, 8)))).convert("RGB")
    assert torch.equal(files.transform(data, 64)(image), files.transform(data)(image))


def test_an_image_is_turned_upright(client):
    upright, exif, file = Image.open(io.BytesIO(picture())), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # to be shown turned right by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    same = [json.loads(client("POST", "/classify", body)[2])["integer"]["top"] for body in (picture(), file.getvalue())]
    assert same[0] == same[1]


# Malformed requests


def changed(**fields) -> str:
    content = infer_json(random_images(1))
    content["inputs"][0] |= fields
    return json.dumps(content)


def binary(images=None, size=None, cut=0, length=None):
    body, headers = infer_binary(random_images(1) if images is None else images)
    if size is not None:
        wrong = body.replace(b'"binary_data_size": 3072', f'"binary_data_size": {size}'.encode())
        name = "Inference-Header-Content-Length"
        body, headers = wrong, {name: str(int(headers[name]) + len(wrong) - len(body))}
    if length is not None:
        headers["Inference-Header-Content-Length"] = length
    return body[: len(body) - cut], headers


NAN = random_images(1).index_fill(3, torch.tensor([2]), float("nan"))
MALFORMED = {
    "no JSON": (INFER, ("{",), 400, "no JSON"),
    "no UTF-8": (INFER, (b"\xff\xfe\xfd",), 400, "no JSON"),
    "empty": (INFER, (b"",), 400, "no JSON"),
    "a list": (INFER, ("[]",), 400, "the body is list"),
    "nested deeply": (INFER, ("[" * 1050,), 400, "no JSON"),
    "nested without end": (INFER, ("[" * 100_000,), 400, "100000 lists"),
    "no inputs": (INFER, ("{}",), 400, "inputs is NoneType"),
    "two inputs": (INFER, (json.dumps({"inputs": infer_json(random_images(1))["inputs"] * 2}),), 400, "2 tensors"),
    "another name": (INFER, (changed(name="pixels"),), 400, "expected one named 'images'"),
    "another datatype": (INFER, (changed(datatype="FP64"),), 400, "datatype 'FP64'"),
    "no datatype": (INFER, (changed(datatype=None),), 400, "datatype 'None'"),
    "another shape": (INFER, (changed(shape=[1, 16, 16, 3]),), 400, "images has shape (1, 16, 16, 3)"),
    "a shape of text": (INFER, (changed(shape=["1", 3, 16, 16]),), 400, "images has shape"),
    "a negative shape": (INFER, (changed(shape=[-1, 3, 16, -16]),), 400, "images has shape"),
    "a huge shape": (INFER, (changed(shape=[2**30, 2**30, 2**30]),), 400, "images.data has shape"),
    "too few values": (INFER, (changed(data=[0.0]),), 400, "images.data has shape [1]"),
    "ragged values": (INFER, (changed(data=[[0.0], [0.0, 1.0]]),), 400, "ragged"),
    "values of text": (INFER, (changed(data=["1"] * 768),), 400, "other values than numbers"),
    "values of null": (INFER, (changed(data=[None] * 768),), 400, "other values than numbers"),
    "NaN": (INFER, (json.dumps(infer_json(NAN)),), 400, "NaN or Inf"),
    "beyond float32": (INFER, (changed(data=[1e300] * 768),), 400, "NaN or Inf"),
    "digits without end": (INFER, ("9" * 10_000,), 400, "no JSON"),
    "no images": (INFER, (json.dumps(infer_json(random_images(0))),), 400, "images has shape [0, 3"),
    "too many images": (INFER, infer_binary(random_images(9)), 413, "images has shape (9, 3"),
    "an id of numbers": (INFER, (json.dumps(infer_json(random_images(1), id=3)),), 400, "id is 3"),
    "another output": (INFER, (json.dumps(infer_json(random_images(1), outputs=[{"name": "x"}])),), 400, "outputs is"),
    "binary NaN": (INFER, binary(NAN), 400, "NaN or Inf"),
    "binary, cut": (INFER, binary(cut=1), 400, "and 3071 bytes, expected 3072"),
    "binary of another size": (INFER, binary(size=3068), 400, "binary_data_size 3068"),
    "binary of a negative size": (INFER, binary(size=-3072), 400, "binary_data_size -3072"),
    "a header's length beyond the body": (INFER, binary(length="99999"), 400, "inference-header-content-length"),
    "a header's length of text": (INFER, binary(length="-1"), 400, "inference-header-content-length"),
    "neither data nor binary": (INFER, (changed().replace('"data"', '"x"'),), 400, "neither data nor"),
    "compressed": (INFER, (zlib.compress(b"{}"), {"content-encoding": "deflate"}), 415, "content-encoding"),
    "huge JSON": (INFER, (b" " * (2 << 20),), 413, "expected up to"),
    "another model": ("/v2/models/other/infer", ("{}",), 404, "no model 'other'"),
    "another version": ("/v2/models/tiny/versions/9/infer", ("{}",), 404, "no version '9'"),
    "another path": ("/v3", ("{}",), 404, "Not Found"),
    "another method": ("/v2", ("{}",), 405, "Method Not Allowed"),
    "a truncated JPEG": ("/classify", (picture("JPEG", (200, 200))[:5000],), 400, "cannot be decoded"),
    "a truncated PNG": ("/classify", (picture("PNG")[:500],), 400, "cannot be decoded"),
    "a GIF": ("/classify", (picture("GIF"),), 415, "no JPEG or PNG"),
    "text for an image": ("/classify", (b"<svg/>",), 415, "no JPEG or PNG"),
    "a bomb": ("/classify", (bomb(2000, 2000),), 413, "2000x2000 pixels"),
    "a large bomb": ("/classify", (bomb(60_000, 60_000),), 413, "too many pixels"),
    "a thin image": ("/classify", (picture(size=(4000, 1)),), 413, "1x4000 pixels and, with its short side resized"),
    "a wide image": ("/classify", (picture(size=(1, 4000)),), 413, "4000x1 pixels and, with its short side resized"),
    "a huge file": ("/classify", (bytes(2 << 20),), 413, "expected up to"),
    "top of text": ("/classify?top=x", (picture(),), 400, "top is 'x'"),
    "top of many digits": ("/classify?top=0000000019", (picture(),), 400, "expected 1 to 7"),
    "top beyond the classes": ("/classify?top=8", (picture(),), 400, "expected 1 to 7"),
    "a float model that is not there": ("/classify?float=1", (picture(),), 400, "float is '1'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_requests_are_refused(client, alive, case):
    path, arguments, want, message = MALFORMED[case]
    status, headers, body = client("POST", path, *arguments)
    assert status == want, body
    assert headers["content-type"].startswith("application/json")
    assert message in json.loads(body)["error"]


def test_a_body_of_unknown_length_is_bounded_too(client, alive):
    status, _, body = client("POST", INFER, (b" " * 65536 for _ in range(32)))  # http.client then sends chunks
    assert status == 413, body


def test_a_refused_body_is_read_so_that_its_sender_sees_why(client, alive):
    """And the connection serves on; but not who sends without end, nor who waits to be told to send."""
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=10)
    with contextlib.closing(connection):
        for path, status in ((INFER, 413), ("/classify", 413), ("/v2/models/other/infer", 404)):
            connection.request("POST", path, bytes(3_000_000))
            own = connection.sock
            answer = connection.getresponse()
            assert "error" in json.loads(answer.read())
            assert (answer.status, connection.sock) == (status, own)
    for length, expect in ((10**12, ""), (3_000_000, "Expect: 100-continue\r\n")):
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{expect}\r\n"
        with socket.create_connection(("127.0.0.1", client.port), timeout=10) as sender:
            sender.sendall(head.encode())
            answer = b"".join(iter(lambda: sender.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in answer.lower()


def test_a_slow_body_is_not_waited_for(client, alive):
    with socket.create_connection(("127.0.0.1", client.port), timeout=10) as slow:
        slow.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
        answer = b"".join(iter(lambda: slow.recv(4096), b""))  # until the server closes
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"not there within 0.4 s" in answer


def test_a_client_that_leaves_takes_nothing_with_it(served, alive):
    app, client = served
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", client.port), timeout=10) as gone:
            gone.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
    deadline = time.monotonic() + 10
    while (app._pending, app._held) != (0, 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Pressure


class Slow:
    """An engine's ``served`` whose model waits for a while."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        def run(images, before=engine.served.runners[0]):
            time.sleep(seconds)
            return before(images)

        engine.served = replace(engine.served, runners=(run,))


def test_what_does_not_fit_into_the_queue_is_sent_away_with_a_time(folders, references):
    with Engine(folders[0], buckets=(1, 2), max_queue=4) as engine, listening(Server(engine, "tiny")) as client:
        Slow(engine, 0.1)
        images = random_images(1)
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: client("POST", INFER, *infer_binary(images)), range(16)))
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 4
        for status, headers, body in answers:
            if status == 429:
                assert int(headers["retry-after"]) >= 1
                assert "the queue holds" in json.loads(body)["error"]
            else:
                assert torch.equal(logits_of(headers, body), references[0](images))


def test_requests_in_progress_and_their_time_are_bounded(folders):
    limits = Limits(pending=2, answer_s=0.3)
    with Engine(folders[0], buckets=(1, 2)) as engine, listening(Server(engine, "tiny", limits=limits)) as client:
        Slow(engine, 0.6)
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: client("POST", INFER, *infer_binary(random_images(1))), range(6)))
        found = {status: headers for status, headers, _ in answers}
        assert set(found) == {503, 504}
        assert found[503]["retry-after"] == "1"
        assert client("GET", "/v2/health/ready")[0] == 200, "health is not refused under load"


def test_time_in_line_for_a_decoder_counts(folders, monkeypatch):
    with Engine(folders[0], buckets=(1,)) as engine:
        app, gate = Server(engine, "tiny", limits=Limits(answer_s=0.3)), threading.Event()
        pixels, entered, app._decoders = app._pixels, threading.Event(), CapacityLimiter(1)
        monkeypatch.setattr(app, "_pixels", lambda *given: (entered.set(), gate.wait(20), pixels(*given))[2])
        with listening(app) as client, ThreadPoolExecutor(1) as pool:
            first = pool.submit(client, "POST", "/classify", picture())
            assert entered.wait(20)
            assert client("POST", "/classify", picture())[0] == 504, "though the first is still being decoded"
            gate.set()
            assert first.result()[0] == 504
            assert client("POST", "/classify", picture())[0] == 200


def test_requests_that_nobody_began_in_time_are_counted(folders):
    """Whoever looks first, who asked or the engine."""
    with Engine(folders[0], buckets=(1,)) as engine:
        with listening(Server(engine, "tiny", limits=Limits(answer_s=0.2))) as client, ThreadPoolExecutor(4) as pool:
            Slow(engine, 1.0)
            answers = list(pool.map(lambda _: client("POST", INFER, *infer_binary(random_images(1))), range(4)))
            assert [status for status, _, _ in answers] == [504] * 4
        engine.close()
        assert engine.snapshot().expired == 3, "all but the one that a worker had begun"


def test_the_version_that_was_asked_for_answers_or_none(folders):
    with Engine(folders[0], buckets=(1,)) as engine, listening(Server(engine, "tiny")) as client:
        run, entered, gate = engine.served.runners[0], threading.Event(), threading.Event()
        engine.served = replace(engine.served, runners=(lambda x: (entered.set(), gate.wait(20), run(x))[2],))
        with ThreadPoolExecutor(2) as pool:
            path, request = INFER.replace("/infer", "/versions/1/infer"), json.dumps(infer_json(random_images(1)))
            first = pool.submit(client.json, "POST", path, infer_json(random_images(1)))
            assert entered.wait(20)
            second = pool.submit(client, "POST", path, request)
            while engine.snapshot().queue_depth < 1:
                time.sleep(0.005)
            engine.swap(folders[1])
            gate.set()
            assert first.result()[1]["model_version"] == "1"
            status, _, answer = second.result()
        assert (status, json.loads(answer)["error"]) == (404, "there is no version '1', expected '2'")


def test_bodies_in_progress_are_bounded_together(folders):
    limits = Limits(body_bytes=8192, held_bytes=10_000, body_s=5)
    with Engine(folders[0], buckets=(1,)) as engine, listening(Server(engine, "tiny", limits=limits)) as client:
        with socket.create_connection(("127.0.0.1", client.port)) as holding:
            holding.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 8000\r\n\r\n".encode() + b" " * 7999)
            time.sleep(0.1)
            status, headers, _ = client("POST", INFER, *infer_binary(random_images(1)))
            assert (status, headers["retry-after"]) == (503, "1")
        time.sleep(0.1)
        assert client("POST", INFER, *infer_binary(random_images(1)))[0] == 200


def test_an_error_of_the_model_is_the_servers(folders):
    with Engine(folders[0], buckets=(1,)) as engine, listening(Server(engine, "tiny")) as client:

        def run(images):
            raise RuntimeError("a secret of the machine")

        good, engine.served = engine.served, replace(engine.served, runners=(run,))
        status, content = client.json("POST", INFER, infer_json(random_images(1)))
        assert (status, content) == (500, {"error": "internal error; the log has the cause"})
        engine.served = good
        assert client.json("POST", INFER, infer_json(random_images(1)))[0] == 200


def test_a_swap_under_load_is_seen_in_the_version_and_in_nothing_else(folders, references):
    with Engine(folders[0], buckets=(1, 2, 4)) as engine, listening(Server(engine, "tiny")) as client:
        stop, seen = threading.Event(), []

        def load(seed):
            images = random_images(1, seed)
            while not stop.is_set():
                status, headers, body = client("POST", INFER, json.dumps(infer_json(images)))
                seen.append((images, status, json.loads(body)["model_version"], logits_of(headers, body)))

        threads = [threading.Thread(target=load, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        engine.swap(folders[1])
        before = len(seen)
        while len(seen) < before + 6:
            time.sleep(0.01)
        stop.set()
        for thread in threads:
            thread.join(20)
        assert {status for _, status, _, _ in seen} == {200}
        assert {version for _, _, version, _ in seen} >= {"2"}
        for images, _, version, logits in seen:
            assert torch.equal(logits, references[int(version) - 1](images))


def test_stopping_answers_what_was_accepted(folders, references):
    images = random_images(1)
    with Engine(folders[0], buckets=(1, 2)) as engine:
        with listening(Server(engine, "tiny")) as client:
            Slow(engine, 0.1)
            pool = ThreadPoolExecutor(8)
            answers = [pool.submit(client, "POST", INFER, *infer_binary(images)) for _ in range(8)]
            while engine.snapshot().queue_depth < 6:
                time.sleep(0.005)
        for answer in answers:
            status, headers, body = answer.result(20)
            assert status == 200
            assert torch.equal(logits_of(headers, body), references[0](images))
        pool.shutdown()
        with pytest.raises(ConnectionRefusedError):
            client("GET", "/v2/health/live")


def test_a_token_is_needed_for_all_but_health_and_the_page(folders):
    with Engine(folders[0], buckets=(1,)) as engine, listening(Server(engine, "tiny", token="t" * 20)) as client:
        right = {"Authorization": f"Bearer {'t' * 20}"}
        for path in ("/v2/health/live", "/v2/health/ready", "/"):
            assert client("GET", path)[0] == 200
        for path in ("/status", "/metrics", "/v2", "/v2/models/tiny"):
            for wrong in ({}, {"Authorization": "t" * 20}, {"Authorization": f"Bearer {'t' * 19}"}):
                status, headers, _ = client("GET", path, None, wrong)
                assert (status, headers["www-authenticate"]) == (401, "Bearer"), path
            assert client("GET", path, None, right)[0] == 200
        assert client("POST", INFER, json.dumps(infer_json(random_images(1))))[0] == 401
        assert client("POST", INFER, json.dumps(infer_json(random_images(1))), right)[0] == 200


def test_a_wrong_answer_would_be_seen(served, client, references):
    """What the comparisons of this file rest on: an engine that is off by one bit is told from one that is not."""
    app, images = served[0], random_images(1)
    good = app.engine.submit

    def off(images, timeout=None):
        from concurrent.futures import Future

        answer, future = good(images, timeout).result(), Future()
        logits = torch.nextafter(answer.logits, torch.tensor(9.0))
        future.set_result(Answer(logits, answer.version, answer.batch, answer.queued_s, answer.run_s))
        return future

    app.engine.submit = off
    try:
        for request in ((json.dumps(infer_json(images)),), infer_binary(images)):
            _, headers, body = client("POST", INFER, *request)
            assert not torch.equal(logits_of(headers, body), references[0](images))
    finally:
        del app.engine.submit
