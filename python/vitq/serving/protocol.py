"""Open Inference Protocol v2, REST form: bodies to tensors and back, JSON or with the binary tensor extension.

Source: https://github.com/kserve/open-inference-protocol, Triton's extension_binary_data.md.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

INPUT, OUTPUT, DATATYPE = "images", "logits", "FP32"
HEADER_LENGTH = "inference-header-content-length"


class Refused(ValueError):
    """A request that cannot be answered: the HTTP status says whose fault it is. ``retry_after``: seconds, or None."""

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True)
class Infer:
    """An inference request: images of the shape it says, the form it wants its answer in, seconds it has time."""

    images: Tensor
    id: str | None
    binary: bool
    timeout: float | None


def parse(body: bytearray, header_length: str | None) -> Infer:
    """The request in ``body``.

    Args:   header_length: value of Inference-Header-Content-Length, None for a body that is all JSON.
    Raises: Refused (400) with what is wrong.
    """
    size = header_bytes(header_length, len(body))
    # As objects of Python, empty lists take thirty times their bytes: images of eight columns have fewer than this.
    if (lists := body.count(b"[", 0, size) + body.count(b"{", 0, size)) > 1000 + size // 16:
        raise Refused(400, f"the body has {lists} lists and objects in {size} bytes, expected rows of numbers")
    header = _object("the body", _json(body[:size]))
    inputs = _list("inputs", header.get("inputs"))
    if len(inputs) != 1 or (tensor := _object("inputs[0]", inputs[0])).get("name") != INPUT:
        names = [x.get("name") if isinstance(x, dict) else x for x in inputs[:4]]
        raise Refused(400, f"inputs has {len(inputs)} tensors named {str(names)[:80]}, expected one named {INPUT!r}")
    if tensor.get("datatype") != DATATYPE:
        raise Refused(400, f"{INPUT} has datatype {str(tensor.get('datatype'))[:40]!r}, expected {DATATYPE!r}")
    shape = _list(f"{INPUT}.shape", tensor.get("shape"))
    # Of so many sizes alone: the product of a million would take hours.
    if len(shape) > 8 or any(isinstance(n, bool) or not isinstance(n, int) or not 0 < n < 1 << 31 for n in shape):
        raise Refused(400, f"{INPUT} has shape {str(shape[:9])[:80]}, expected up to 8 sizes from 1")
    parameters = _object(f"{INPUT}.parameters", tensor.get("parameters", {}))
    images = _binary(body, size, parameters, shape) if "data" not in tensor else _values(tensor["data"], shape)
    if "data" in tensor and size != len(body):
        raise Refused(400, f"the body has {len(body) - size} bytes behind its JSON, expected none beside data")
    asked = _object("parameters", header.get("parameters", {}))
    id = header.get("id")
    if id is not None and not isinstance(id, str):
        raise Refused(400, f"id is {str(id)[:40]}, expected a string")
    return Infer(images, id, _wants_binary(header, asked), _timeout(asked))


def respond(infer: Infer, logits: Tensor, model: str, version: int) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the answer. Raises: Refused (400) for logits that JSON has no numbers for."""
    output: dict[str, Any] = {"name": OUTPUT, "datatype": DATATYPE, "shape": list(logits.shape)}
    content = {"model_name": model, "model_version": str(version), "outputs": [output]}
    if infer.id is not None:
        content["id"] = infer.id
    if not infer.binary:
        if not np.isfinite(logits.numpy()).all():
            why = "images lead to logits of NaN or Inf, which JSON cannot hold"
            raise Refused(400, f"{why}: expected smaller values, or binary_data_output")
        output["data"] = logits.flatten().tolist()  # as float64, whose shortest form gives back every float32
        return json.dumps(content, separators=(",", ":")).encode(), {"content-type": "application/json"}
    data = logits.contiguous().numpy().astype("<f4", copy=False).tobytes()
    output["parameters"] = {"binary_data_size": len(data)}
    head = json.dumps(content, separators=(",", ":")).encode()
    return head + data, {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(head))}


def header_bytes(length: str | None, total: int) -> int:
    """How many of a body's ``total`` bytes are JSON. Raises: Refused (400) for a ``length`` that is no such number."""
    if length is None:
        return total
    if not length.isascii() or not length.isdigit() or len(length) > 12 or int(length) > total:
        raise Refused(400, f"{HEADER_LENGTH} is {length[:40]!r}, expected a number up to the body's {total} bytes")
    return int(length)


def _json(text: bytearray) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {str(error)[:100]}") from error


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(400, f"{name} is {type(value).__name__}, expected an object")
    return value


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Refused(400, f"{name} is {type(value).__name__}, expected a list")
    return value


def _values(data: Any, shape: list[int]) -> Tensor:
    """Numbers, flat or nested, as a tensor."""
    leaves = _list(f"{INPUT}.data", data)
    while leaves and set(map(type, leaves)) == {list}:
        leaves = list(chain.from_iterable(leaves))
    # Before numpy sees them: it would give every value as much room as the longest text.
    if not set(map(type, leaves)) <= {int, float}:
        raise Refused(400, f"{INPUT}.data holds other values than numbers, expected numbers")
    try:
        values = np.asarray(data)
    except ValueError as error:
        raise Refused(400, f"{INPUT}.data is ragged, expected {shape}") from error
    if values.dtype.kind not in "iuf":
        raise Refused(400, f"{INPUT}.data holds integers beyond 64 bits, expected numbers of float32")
    if values.size != math.prod(shape) or (values.ndim > 1 and list(values.shape) != shape):
        raise Refused(400, f"{INPUT}.data has shape {list(values.shape)[:8]}, expected {shape}, nested or flat")
    with np.errstate(over="ignore"):  # what is beyond float32 becomes Inf, which is refused as such
        return torch.from_numpy(values.astype(np.float32).reshape(shape))


def _binary(body: bytearray, start: int, parameters: dict[str, Any], shape: list[int]) -> Tensor:
    """What follows the JSON, as a tensor."""
    size, rest, want = parameters.get("binary_data_size"), len(body) - start, 4 * math.prod(shape)
    if size is None:
        given = ", ".join(map(str, parameters))[:80] or "nothing"
        raise Refused(400, f"{INPUT} has neither data nor binary_data_size (but {given}), expected one of them")
    if not size == rest == want:
        raise Refused(400, f"{INPUT} has binary_data_size {str(size)[:40]} and {rest} bytes, expected {want}")
    # A copy: behind a JSON of any length, values are not aligned.
    return torch.from_numpy(np.frombuffer(body, "<f4", offset=start).astype(np.float32).reshape(shape))


def _wants_binary(header: dict[str, Any], parameters: dict[str, Any]) -> bool:
    binary = parameters.get("binary_data_output", False)
    if "outputs" in header:
        outputs = _list("outputs", header["outputs"])
        if len(outputs) != 1 or (output := _object("outputs[0]", outputs[0])).get("name") != OUTPUT:
            raise Refused(400, f"outputs is {str(outputs)[:80]}, expected one named {OUTPUT!r}, or no such field")
        asked = _object(f"{OUTPUT}.parameters", output.get("parameters", {}))
        if unknown := asked.keys() - {"binary_data"}:
            raise Refused(400, f"{OUTPUT} has parameter {sorted(unknown)[0][:40]!r}, expected binary_data alone")
        binary = asked.get("binary_data", binary)
    if not isinstance(binary, bool):
        raise Refused(400, f"binary_data is {str(binary)[:40]}, expected true or false")
    return binary


def _timeout(parameters: dict[str, Any]) -> float | None:
    """Triton's ``timeout`` is in microseconds; 0 is none."""
    value = parameters.get("timeout", 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 53:
        raise Refused(400, f"timeout is {str(value)[:40]}, expected microseconds")
    return value / 1e6 or None
