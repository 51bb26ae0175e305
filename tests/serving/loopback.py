"""Small models, and servers on loopback with clients for them."""

import contextlib
import http.client
import io
import json
import socket
import threading
import time

import numpy as np
import timm
import torch
from PIL import Image
from vitq.calibrate import calibrate
from vitq.models import state_data

ARCHITECTURE = "vit_tiny_patch16_224"
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7}
SIZE = (3, 16, 16)


def random_images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *SIZE, generator=torch.Generator().manual_seed(seed))


def quantized(seed: int, recipe: str = "vitq-w4a8", architecture: str = ARCHITECTURE, **kwargs):
    """The state of a model of random weights."""
    torch.manual_seed(seed)
    kwargs = kwargs or SMALL
    model = timm.create_model(architecture, **kwargs).eval()
    data = state_data(model)
    images = torch.randn(4, *data["input_size"], generator=torch.Generator().manual_seed(seed))
    return calibrate(model, images, recipe, architecture=architecture, kwargs=kwargs, data=data).state


def picture(format: str = "PNG", size=(40, 30), seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


class Client:
    """A connection per request, as curl would."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __call__(self, method: str, path: str, body=None, headers=None, timeout: float = 20.0):
        """Status, headers, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            # Who refuses a body need not have read it.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def json(self, method: str, path: str, content=None, headers=None):
        status, _, body = self(method, path, None if content is None else json.dumps(content), headers)
        return status, json.loads(body)


@contextlib.contextmanager
def listening(app, set_options=lambda listener: None):
    """``app`` on a free port of loopback, in a thread."""
    import uvicorn

    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=10)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        set_options(listener)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield Client(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def infer_json(images: torch.Tensor, **more) -> dict:
    """A request of the protocol, all in JSON."""
    tensor = {"name": "images", "shape": list(images.shape), "datatype": "FP32", "data": images.flatten().tolist()}
    return {"inputs": [tensor], **more}


def infer_binary(images: torch.Tensor, **more) -> tuple[bytes, dict[str, str]]:
    """Body and headers of one with its tensors behind the JSON."""
    data = images.numpy().tobytes()
    tensor = {"name": "images", "shape": list(images.shape), "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": len(data)}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}, **more}).encode()
    return head + data, {"Inference-Header-Content-Length": str(len(head))}


def logits_of(headers, body: bytes) -> torch.Tensor:
    """The logits of an answer in either form."""
    length = headers.get("Inference-Header-Content-Length")
    content = json.loads(body[: None if length is None else int(length)])
    (output,) = content["outputs"]
    if length is None:
        return torch.tensor(output["data"], dtype=torch.float32).reshape(output["shape"])
    return torch.frombuffer(bytearray(body[int(length) :]), dtype=torch.float32).reshape(output["shape"])
