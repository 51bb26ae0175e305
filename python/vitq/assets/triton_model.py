"""A vitq checkpoint in Triton Inference Server's Python backend: one engine per model instance.

Triton hands over the requests of one of its batches; the engine checks each, computes them together and answers each.
"""

import gc
import json
from pathlib import Path

import torch
import triton_python_backend_utils as pb_utils
import vitq
from vitq.serving.engine import freeze


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        text = {name: value["string_value"] for name, value in config["parameters"].items()}
        gpu = args["model_instance_kind"] == "GPU"
        self.engine = vitq.Engine(
            Path(args["model_repository"]) / args["model_version"] / "checkpoint",
            device=f"cuda:{args['model_instance_device_id']}" if gpu else "cpu",
            dtype=getattr(torch, text["dtype"]),
            buckets=[int(b) for b in text["buckets"].split(",")],
        )
        freeze()

    def execute(self, requests):
        return [self._response(future) for future in [self._submit(request) for request in requests]]

    def _submit(self, request):
        images = pb_utils.get_input_tensor_by_name(request, "images").as_numpy()
        try:
            return self.engine.submit(torch.from_numpy(images))
        except (ValueError, RuntimeError) as error:
            return error

    def _response(self, answer):
        try:
            if isinstance(answer, Exception):
                raise answer
            logits = answer.result().logits.numpy()
        except Exception as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse([pb_utils.Tensor("logits", logits)])

    def finalize(self):
        self.engine.close()
        gc.unfreeze()
