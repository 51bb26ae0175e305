"""What a user would pick instead, each in its recommended static or dynamic int8 form and in float32.

Every one is optional: what is not installed, refuses a model or cannot be held to an instruction set is named with the
reason, never left out. ``pip install .[bench]`` brings them.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .registry import Absent, peer

Run = Callable[[Tensor], Tensor]


def parts(images: Tensor, example: Tensor) -> list[Tensor]:
    """The calibration images in batches like ``example``: many runtimes fix the size when a model is built."""
    batch = example.shape[0]
    repeated = images.repeat(-(-batch // len(images)), 1, 1, 1)
    return list(repeated.split(batch))[: len(repeated) // batch]


@peer("torch.compile fp32")
def compiled(model: nn.Module, images: Tensor, example: Tensor, threads: int) -> Run:
    return torch.compile(model)


@peer("torch.compile bf16")
def compiled_bf16(model: nn.Module, images: Tensor, example: Tensor, threads: int) -> Run:
    """What a processor with 16-bit matrix units (AMX) is used for without any calibration."""
    run = torch.compile(copy.deepcopy(model).bfloat16())
    return lambda x: run(x.bfloat16()).float()


@peer("PT2E X86Inductor int8", needs=["torchao"])
def pt2e(model: nn.Module, images: Tensor, example: Tensor, threads: int) -> Run:
    """Static int8 (u8 by s8) through Inductor with frozen weights."""
    from torch._inductor import config
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    exported = torch.export.export(model, (example,)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    for part in parts(images, example):
        prepared(part)
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    config.freezing = True  # of this process, which is the peer's own
    return torch.compile(converted)


@peer("torch quantize_dynamic int8", overrides=None)
def dynamic(model: nn.Module, images: Tensor, example: Tensor, threads: int) -> Run:
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


@peer("torchao int8", needs=["torchao"])
def torchao_int8(model: nn.Module, images: Tensor, example: Tensor, threads: int) -> Run:
    """Dynamic int8 activations by int8 weights, compiled as its documentation says."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model)


@peer("torchao 8da4w", needs=["torchao"])
def torchao_8da4w(model: nn.Module, images: Tensor, example: Tensor, threads: int) -> Run:
    """Dynamic int8 activations by int4 weights in groups of 32."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)))
    return model


def _openvino(converted, threads: int, precision: str | None = None) -> Run:
    """``precision``: of the float parts; None leaves it to OpenVINO, which takes bf16 where the hardware has it."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    settings |= {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    chosen = compiled.get_property("INFERENCE_PRECISION_HINT")
    if precision is not None and chosen != getattr(openvino.Type, precision):
        raise Absent(f"OpenVINO computes in {chosen.to_string()} here, expected {precision}")
    request = compiled.create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()])[0])


def _converted(model: nn.Module, example: Tensor):
    import openvino

    return openvino.convert_model(model, example_input=example, input=tuple(example.shape))


@peer("OpenVINO fp32", needs=["openvino"], overrides=None)
def openvino_fp32(model: nn.Module, images: Tensor, example: Tensor, threads: int) -> Run:
    return _openvino(_converted(model, example), threads, "f32")


@peer("OpenVINO bf16", needs=["openvino"], overrides=None)
def openvino_bf16(model: nn.Module, images: Tensor, example: Tensor, threads: int) -> Run:
    return _openvino(_converted(model, example), threads, "bf16")


@peer("OpenVINO NNCF int8", needs=["openvino", "nncf"], overrides=None)
def openvino_int8(model: nn.Module, images: Tensor, example: Tensor, threads: int) -> Run:
    import nncf

    data = nncf.Dataset([part.numpy() for part in parts(images, example)])
    kind = nncf.ModelType.TRANSFORMER
    return _openvino(nncf.quantize(_converted(model, example), data, model_type=kind), threads)


def _onnx(model: nn.Module, example: Tensor, folder: Path) -> Path:
    file = folder / "model.onnx"
    torch.onnx.export(model, (example,), file, input_names=["x"], output_names=["y"], dynamo=True, external_data=False)
    return file


def _session(file: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@peer("ONNX Runtime fp32", needs=["onnxruntime", "onnx", "onnxscript"], overrides=None)
def onnx_fp32(model: nn.Module, images: Tensor, example: Tensor, threads: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        return _session(_onnx(model, example, Path(folder)), threads)


@peer("ONNX Runtime int8 QDQ", needs=["onnxruntime", "onnx", "onnxscript"], overrides=None)
def onnx_int8(model: nn.Module, images: Tensor, example: Tensor, threads: int) -> Run:
    """Static u8 by s8, per channel; 7-bit weights, without which AVX2 saturates."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([{"x": part.numpy()} for part in parts(images, example)])

        def get_next(self):
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = _onnx(model, example, folder)
        quant_pre_process(file, folder / "shaped.onnx")
        quantization.quantize_static(
            folder / "shaped.onnx",
            folder / "int8.onnx",
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            per_channel=True,
            reduce_range=True,
        )
        return _session(folder / "int8.onnx", threads)
