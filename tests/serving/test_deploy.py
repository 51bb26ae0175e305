"""What other servers are given: Triton's model repository and KServe's manifest."""

import errno
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from loopback import random_images
from vitq import checkpoint
from vitq.cli import main, parser

ROOT = Path(__file__).resolve().parents[2]


class Stub(ModuleType):
    """What the Python backend of Triton offers a model."""

    def __init__(self) -> None:
        super().__init__("triton_python_backend_utils")
        self.Tensor = lambda name, values: SimpleNamespace(name=name, values=values)
        self.TritonError = str

    @staticmethod
    def InferenceResponse(outputs=(), error=None):
        return SimpleNamespace(outputs=outputs, error=error)

    @staticmethod
    def get_input_tensor_by_name(request, name):
        return SimpleNamespace(as_numpy=lambda: request[name].numpy())


@pytest.fixture(scope="module")
def repository(folders, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repository") / "tiny"
    assert main(["export", folders[0], "--format", "triton", "--output", str(folder)]) == 0
    return folder


def test_tritons_schema_takes_the_configuration(repository):
    config = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]")
    from google.protobuf import text_format

    found = text_format.Parse((repository / "config.pbtxt").read_text(), config.ModelConfig())
    assert (found.name, found.backend, found.max_batch_size) == ("tiny", "python", 32)
    (images,), (logits,) = found.input, found.output
    assert (images.name, list(images.dims), images.data_type) == ("images", [3, 16, 16], config.TYPE_FP32)
    assert (logits.name, list(logits.dims), logits.data_type) == ("logits", [7], config.TYPE_FP32)
    assert found.instance_group[0].kind == config.ModelInstanceGroup.KIND_CPU
    assert found.parameters["dtype"].string_value == "float32"


def test_the_model_answers_as_triton_asks(repository, references, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Stub())
    spec = importlib.util.spec_from_file_location("model", repository / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    parameters = {"dtype": {"string_value": "float32"}, "buckets": {"string_value": "1,2,4"}}
    about = {"model_config": json.dumps({"parameters": parameters}), "model_instance_kind": "CPU"}
    model.initialize({**about, "model_repository": str(repository), "model_version": "1"})
    requests = [random_images(1, 1), torch.full((1, 3, 16, 16), float("nan")), random_images(3, 2)]
    responses = model.execute([{"images": images} for images in requests])
    model.finalize()
    assert "NaN or Inf" in responses[1].error
    for i in (0, 2):
        assert responses[i].error is None
        (output,) = responses[i].outputs
        assert output.name == "logits"
        assert torch.equal(torch.from_numpy(output.values), references[0](requests[i]))


def test_a_repository_is_replaced_whole_or_not_at_all(folders, repository, tmp_path, capsys):
    export = ["export", folders[1], "--format", "triton", "--output"]
    assert main([*export, str(repository)]) == 2
    other = tmp_path / "precious"
    other.mkdir()
    assert main([*export, str(other), "--force"]) == 2
    assert "is not replaced" in capsys.readouterr().err
    copy = tmp_path / "tiny"
    for _ in range(2):
        assert main([*export, str(copy), "--force", "--device", "cuda", "--dtype", "float16"]) == 0
    assert "KIND_GPU" in (copy / "config.pbtxt").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["precious", "tiny"]


def test_a_repository_that_cannot_be_replaced_stays(folders, tmp_path, monkeypatch, capsys):
    target, rename, left = tmp_path / "tiny", os.rename, [False, True]
    assert main(["export", folders[0], "--format", "triton", "--output", str(target)]) == 0
    before = {file: file.read_bytes() for file in target.rglob("*") if file.is_file()}

    def failing(source, destination):
        if left and left.pop(0):
            raise OSError(errno.EIO, "out of order", str(destination))
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    assert main(["export", folders[1], "--format", "triton", "--output", str(target), "--force"]) == 2
    assert "out of order" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in target.rglob("*") if file.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_a_repository_within_its_checkpoint(folders, tmp_path):
    """Of the checkpoint there is what one consists of, not what else lies in its folder."""
    shutil.copytree(folders[0], tmp_path / "out")
    assert (
        main(["export", str(tmp_path / "out"), "--format", "triton", "--output", str(tmp_path / "out" / "tiny")]) == 0
    )
    found = tmp_path / "out" / "tiny" / "1" / "checkpoint"
    assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in Path(folders[0]).iterdir())
    assert checkpoint.read_config(found) == checkpoint.read_config(folders[0])


def test_the_kserve_manifest_starts_what_there_is():
    manifest = yaml.safe_load((ROOT / "deploy" / "kserve.yaml").read_text())
    predictor = manifest["spec"]["predictor"]
    (container,) = manifest["spec"]["predictor"]["containers"]
    program, *argv = container["command"] + container["args"]
    arguments = parser().parse_args(argv)
    assert (program, arguments.command, arguments.name) == ("vitq", "serve", "vitq")
    assert arguments.port == container["ports"][0]["containerPort"]
    probes = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    assert probes == ["/v2/health/live", "/v2/health/ready", "/v2/health/live"]
    # Reading a body, answering it, and closing the engine.
    assert predictor["terminationGracePeriodSeconds"] > arguments.body_timeout + 2 * arguments.timeout
    # What Knative refuses and what only Knative scales by do not go together.
    assert manifest["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "RawDeployment"
    assert predictor["scaleMetric"] in ("cpu", "memory")
