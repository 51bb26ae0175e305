"""Clients that mean harm, or might as well: none gets in, stops the server, or takes what others need."""

import json

import pytest
from loopback import listening
from vitq import Engine

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")
from starlette.datastructures import URL
from starlette.requests import Request
from vitq.serving.server import Server


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
