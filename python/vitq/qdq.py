"""A quantized model as an ONNX graph, for runtimes that are not ours.

Layers with static scales are in QDQ form: codes go from QuantizeLinear to DequantizeLinear, and the float product
behind is an integer one to a runtime that recognizes the form. Layers with dynamic scales multiply codes by
MatMulInteger. Attention is QDQ where its scales are static and its softmax quantizer is uniform. Low-rank branches,
tables and the other softmax quantizers are written out in float operators; token-wise bits are refused.

The graph is the integer model's function, not its bits: values at the middle between two codes may fall on the other
side where scales multiply in another order.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections import Counter, OrderedDict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from .export import check_graph, check_target
from .files import naming
from .quantizers import SimAttention, SimBlocks, SimGelu, SimLayerNorm, SimLinear, SimPatchConv
from .quantizers.activation import ActivationQuantizer
from .quantizers.attention import EXCLUDED
from .simulate import SimModel

if TYPE_CHECKING:
    import onnx

#: The first operator set with 4-bit integers.
OPSET = 21
SUFFIX = ".onnx"
INPUT, OUTPUT = "images", "logits"


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int = -1) -> Tensor:
    """QuantizeLinear: rne(x/scale) + zero_point in the range of zero_point's dtype; scale [] or [x.shape[axis]]."""
    if torch.onnx.is_in_onnx_export():
        attrs = {"axis": axis} if scale.dim() else {}
        inputs = (x, scale, zero_point)
        return torch.onnx.ops.symbolic("QuantizeLinear", inputs, attrs, dtype=zero_point.dtype, shape=x.shape)
    limits = torch.iinfo(zero_point.dtype)
    code = (x / _along(scale, x, axis)).round() + _along(zero_point, x, axis)
    return code.clamp(limits.min, limits.max).to(zero_point.dtype)


def _dequantize(code: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int = -1) -> Tensor:
    """DequantizeLinear: (code − zero_point)·scale; without a zero point it is 0."""
    if torch.onnx.is_in_onnx_export():
        attrs = {"axis": axis} if scale.dim() else {}
        inputs = (code, scale) if zero_point is None else (code, scale, zero_point)
        return torch.onnx.ops.symbolic("DequantizeLinear", inputs, attrs, dtype=scale.dtype, shape=code.shape)
    centred = code.to(scale.dtype) - (0 if zero_point is None else _along(zero_point, code, axis))
    return centred * _along(scale, code, axis)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """MatMulInteger: int8 [..., K] and [K, N] to int32."""
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic("MatMulInteger", (a, b), dtype=torch.int32, shape=(*a.shape[:-1], b.shape[1]))
    return (a.double() @ b.double()).int()


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """[] or [x.shape[axis]] so that it broadcasts against x."""
    return values if values.dim() == 0 else values.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index], as the operator Gather (an index in brackets becomes the slower GatherND)."""
    return table.index_select(0, index.flatten()).reshape(index.shape)


class _Activation(nn.Module):
    """Floats [..., G·d] to what their codes decode to; dynamic ones of one group only (else see ``codes``)."""

    def __init__(self, act: ActivationQuantizer) -> None:
        super().__init__()
        spec = act.spec
        self.groups, self.dynamic = act.groups, spec.dynamic
        self.qmax = spec.qmax
        self.register_buffer("lut", None if act.lut is None else act.lut.detach().clone())
        if not self.dynamic:
            zero = act.integer_zero_point
            scale = act.scale.detach().clone()
            per_group = torch.full_like(scale, zero, dtype=torch.int8)
            single = act.groups == 1
            self.register_buffer("scale", scale[0] if single else scale)
            self.register_buffer("zero_point", per_group[0] if single else per_group)
            # What int8 itself does not clamp to.
            self.clamped = (spec.qmin, spec.qmax) != (-128, 127)
            column = scale[0] if single else scale.unsqueeze(-1)
            self.register_buffer("low", column * (spec.qmin - zero))
            self.register_buffer("high", column * (spec.qmax - zero))

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Dynamic: [..., d] to integer-valued floats and scales [..., 1]."""
        scale = x.abs().amax(-1, keepdim=True) / self.qmax
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        code = (x * (1.0 / scale)).round()
        return (code if self.lut is None else _look_up(self.lut, code.int() + 128).to(x.dtype)), scale

    def decoded(self, x: Tensor) -> Tensor:
        """Static: [..., G, d], of one group also without G, to the same."""
        axis = x.dim() - 2
        if self.clamped:
            x = torch.minimum(torch.maximum(x, self.low), self.high)
        code = _quantize(x, self.scale, self.zero_point, axis)
        if self.lut is not None:
            code = _look_up(self.lut, code.int() + 128)
        return _dequantize(code, self.scale, self.zero_point, axis)

    def forward(self, x: Tensor) -> Tensor:
        if self.dynamic:
            return torch.mul(*self.codes(x))
        if self.groups == 1:  # no reshape between what a runtime has to recognize
            return self.decoded(x)
        return self.decoded(x.unflatten(-1, (self.groups, -1))).flatten(-2)


class _Linear(nn.Module):
    """What a SimLinear computes, over the last dimension."""

    def __init__(self, sim: SimLinear) -> None:
        super().__init__()
        # [K, N], as MatMul takes it.
        if sim.quant.spec is None:
            self.register_buffer("weight", sim.effective_weight().T.contiguous())
            self.register_buffer("scale", None)
        else:
            self.register_buffer("weight", sim.codes().to(torch.int8).T.contiguous())
            self.register_buffer("scale", sim.quant.scale.detach().clone())
        self.register_buffer("bias", None if sim.bias is None else sim.bias.detach().clone())
        self.act = None if sim.act.spec is None else _Activation(sim.act)
        down, up = sim.side_branch() or (None, None)
        self.subspace = sim.lora.kind == "subspace"
        # Exact in float16, as in checkpoints.
        self.register_buffer("down", None if down is None else down.detach().half())
        self.register_buffer("up", None if up is None else up.T.detach().half().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        t = None
        if self.down is not None:
            down = self.down.to(x.dtype)
            t = x @ down.T
            if self.subspace:
                x = x - t @ down
        if self.scale is None:
            y = (x if self.act is None else self.act(x)) @ self.weight
        elif self.act is None:
            # No DequantizeLinear: with one alone, ONNX Runtime quantizes the other operand on its own account
            # (MatMulNBits at accuracy level 4, its default).
            y = x @ (self.weight.to(x.dtype) * self.scale)
        elif self.act.dynamic:
            code, scale = self.act.codes(x)
            # One scale after the other: ONNX Runtime takes a product of both for that of two constants
            # (MatMulIntegerToFloat), whatever the shape of the rows'.
            y = _product(code.to(torch.int8), self.weight).to(x.dtype) * scale * self.scale
        else:
            y = self.act(x) @ _dequantize(self.weight, self.scale, axis=1)
        if t is not None:
            y = y + t @ self.up.to(x.dtype)
        return y if self.bias is None else y + self.bias


class _PatchConv(_Linear):
    """A SimPatchConv: [B, C, H, W] to [B, N, H/p, W/q]."""

    def __init__(self, sim: SimPatchConv) -> None:
        super().__init__(sim)
        self.kernel = sim.kernel

    def forward(self, x: Tensor) -> Tensor:
        (_, c, h, w), (p, q) = x.shape, self.kernel
        patches = x.reshape(-1, c, h // p, p, w // q, q).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return super().forward(patches).permute(0, 3, 1, 2)


class _Attention(nn.Module):
    """What a SimAttention computes; takes the same arguments."""

    def __init__(self, sim: SimAttention) -> None:
        super().__init__()
        focus = None if sim.focus is None else sim.focus.spec
        self.qkv, self.proj, self.stage, self.norm = _Linear(sim.qkv), _Linear(sim.proj), sim.stage, sim.norm
        self.heads, self.softmax_scale, self.focus, self.windowed = (
            sim.heads, sim.softmax_scale, focus, sim.window is not None,
        )  # fmt: skip
        self.operands = None if sim.operands.spec is None else _Activation(sim.operands)
        self.register_buffer("bias", None if sim.bias is None else sim.bias.detach().clone())
        if focus is not None:
            levels, step, _ = focus.decode()
            self.register_buffer("step", torch.tensor(step))
            self.register_buffer("zero", torch.tensor(0, dtype=torch.uint8))
            self.register_buffer("levels", None if focus.affine else levels.to(torch.uint8))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask or is_causal is given, the integer attention takes neither")
        if mask is not None and self.windowed:
            mask = mask.masked_fill(mask <= EXCLUDED, -torch.inf)
        q, k, v = self._split(self.stage(self.qkv(x)))
        s = (q @ k.transpose(-1, -2)) * self.softmax_scale
        if self.bias is not None:
            s = s + self.bias
        valid = None
        if mask is not None:
            s = self._by_window(s, mask, torch.add)
            valid = (mask != -torch.inf).to(s.dtype)
        out = self._focused(s, valid, v)
        return self.proj(self.norm(out.transpose(1, 2).flatten(2)))

    def _by_window(self, x: Tensor, mask: Tensor, combine) -> Tensor:
        """``combine`` of x [B, H, N, N] and mask [G, N, N], image b with mask[b mod G]."""
        n = x.shape[-1]
        return combine(x.reshape(-1, len(mask), self.heads, n, n), mask.unsqueeze(1)).reshape(-1, self.heads, n, n)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, 3·H·d] to decoded q, k, v [B, H, N, d]."""
        if self.operands is None or not self.operands.dynamic:
            decoded = qkv if self.operands is None else self.operands(qkv)
            return decoded.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        code, scale = self.operands.codes(qkv.unflatten(-1, (self.operands.groups, -1)))
        code = code.flatten(-2).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scale = scale.squeeze(-1).unflatten(-1, (3, -1)).permute(2, 0, 3, 1).unsqueeze(-1)
        top = scale[2].amax(-2, keepdim=True)
        return code[0] * scale[0], code[1] * scale[1], (code[2] * (scale[2] / top)).round() * top

    def _focused(self, s: Tensor, valid: Tensor | None, v: Tensor) -> Tensor:
        """Softmax of scores [B, H, N, N], its quantizer, the product with v."""
        focus = self.focus
        if focus is None:
            return s.softmax(-1) @ v
        total = None
        if focus.anchor == "row":
            u = torch.exp(s - s.amax(-1, keepdim=True))
            total = u.sum(-1, keepdim=True)
        else:
            u = s.softmax(-1)
        if focus.affine:
            u = u.clamp(focus.b1, focus.b2) - focus.b1
            p = _dequantize(_quantize(u, self.step, self.zero), self.step, self.zero) + focus.b1
        else:
            position = ((u - focus.b1) * (1.0 / (focus.b2 - focus.b1))).clamp(1e-30, 1.0)
            position = position.sqrt() if focus.power == 2.0 else position.pow(1.0 / focus.power)
            code = (position * focus.n).round().int()
            p = _dequantize(_look_up(self.levels, code), self.step, self.zero)
        if valid is not None:
            p = self._by_window(p, valid, torch.mul)
        out = p @ v
        if focus.renormalize:
            denom = p.sum(-1, keepdim=True)
            return torch.where(denom == 0, torch.zeros_like(out), out / torch.where(denom == 0, 1.0, denom))
        return out if total is None else out / total


class QdqModel(nn.Module):
    """A simulated model whose quantizers are QuantizeLinear and DequantizeLinear; built by :func:`to_qdq`."""

    def __init__(self, sim: SimModel, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["family"] = sim.family
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.family.output(self.model(x))


@torch.no_grad()
def to_qdq(sim: SimModel) -> QdqModel:
    """``sim`` in plain torch operators and the two of ONNX, which torch computes too.

    Raises: ValueError for a detector, for quantizers that exist in simulation only and for token-wise bits.
    """
    check_graph(sim.model)
    if refusals := sim.refusals():
        path, reason = next(iter(refusals.items()))
        raise ValueError(f"the model has no integer form: {path}: {reason} ({len(refusals)} such sites)")
    for path, attention in sim.attentions.items():
        if attention.token_bits is not None:
            raise ValueError(f"{path!r} decides token-wise bits, which QDQ cannot say, expected one width per layer")
    model = copy.deepcopy(sim.model)
    for path, linear in sim.linears.items():
        model.set_submodule(path, (_PatchConv if isinstance(linear, SimPatchConv) else _Linear)(linear))
    for path, attention in sim.attentions.items():
        model.set_submodule(path, _Attention(attention))
    for path, module in list(model.named_modules()):
        if isinstance(module, SimLayerNorm):
            plain = nn.LayerNorm(module.normalized_shape, module.eps, device=module.weight.device)
            plain.weight, plain.bias = module.weight, module.bias
            model.set_submodule(path, plain)
        elif isinstance(module, SimGelu):
            model.set_submodule(path, nn.GELU(module.approximate))
        elif isinstance(module, SimBlocks):
            model.set_submodule(path, nn.Sequential(OrderedDict(module.named_children())))
    return QdqModel(sim, model).eval().requires_grad_(False)


@dataclass(frozen=True)
class Summary:
    """What a written file holds.

    Args: quantize, dequantize, products: number of QuantizeLinear, DequantizeLinear and MatMulInteger; int4, int8:
    weights stored at these widths; bytes: of the file.
    """

    quantize: int
    dequantize: int
    products: int
    int4: int
    int8: int
    bytes: int


def _check_packages() -> None:
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ValueError(f"ONNX needs {' and '.join(missing)}, expected pip install 'vitq-kernels[onnx]'")


def to_proto(model: QdqModel, size: tuple[int, ...], batch: int | None = None) -> onnx.ModelProto:
    """The ONNX graph, weights of four bits and less stored as INT4.

    Args: size: (C, H, W) of an image, (N, C) of a cloud; batch: None makes the batch size an input's property.
    Raises: ValueError without the packages onnx and onnxscript, or for a model that torch.onnx cannot export.
    """
    _check_packages()
    # Two images: tracers take a batch of one for a constant. Not optimized: that would fold branches to float32.
    x = torch.zeros(batch or 2, *size)
    shapes = None if batch else ({0: Dim("batch")},)
    try:
        program = torch.onnx.export(
            model, (x,), dynamo=True, dynamic_shapes=shapes, opset_version=OPSET, optimize=False, verbose=False,
            input_names=[INPUT], output_names=[OUTPUT],
        )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(f"torch.onnx fails: {' '.join(str(error).split())[:300]}") from error
    proto = program.model_proto
    for part in (*proto.graph.node, *proto.graph.value_info, *proto.graph.initializer):
        del part.metadata_props[:]  # where in Python it came from, longer than the weights of a small model
    _narrow(proto)
    return proto


def _narrow(proto: onnx.ModelProto) -> None:
    """Store int8 tensors that DequantizeLinear or MatMulInteger reads, and that fit, as INT4."""
    from onnx import TensorProto, helper, numpy_helper

    graph = proto.graph
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, place))
    casts = []
    for tensor in graph.initializer:
        reading = {(node.op_type, place, len(node.input)) for node, place in readers.get(tensor.name, [])}
        # A zero point has its code's type: with one, the two would have to change together.
        if tensor.data_type != TensorProto.INT8 or reading not in (
            {("DequantizeLinear", 0, 2)},
            {("MatMulInteger", 1, 2)},
        ):
            continue
        codes = numpy_helper.to_array(tensor)
        if not codes.size or codes.min() < -8 or codes.max() > 7:
            continue
        name = tensor.name
        nibbles = np.append(codes.flatten(), np.zeros(codes.size % 2, np.int8)).astype(np.uint8) & 15
        packed = (nibbles[0::2] | nibbles[1::2] << 4).tobytes()
        tensor.CopyFrom(helper.make_tensor(name, TensorProto.INT4, codes.shape, packed, raw=True))
        for info in graph.value_info:
            if info.name == name:
                info.type.tensor_type.elem_type = TensorProto.INT4
        if reading == {("MatMulInteger", 1, 2)}:  # which takes bytes
            wide = f"{name}.int8"
            casts.append(helper.make_node("Cast", [name], [wide], to=TensorProto.INT8))
            for node, place in readers[name]:
                node.input[place] = wide
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def write(
    sim: SimModel,
    path: str | os.PathLike,
    size: tuple[int, ...],
    batch: int | None = None,
    *,
    overwrite: bool = False,
) -> Summary:
    """Write ``sim`` to ``path``, atomically: what is there stays whole until the new file is.

    Args:   sim: as :func:`vitq.restore.to_simulated` makes it, on the CPU; size, batch: as :func:`to_proto`.
    Raises: ValueError: a path that may not be written, a model or an environment that :func:`to_qdq` or
            :func:`to_proto` refuses. OSError: the file system's own complaint.
    """
    path = Path(path)
    check_target(path, SUFFIX, overwrite)
    _check_packages()
    import onnx

    proto = to_proto(to_qdq(sim), size, batch)
    onnx.checker.check_model(proto)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        file = Path(folder) / path.name
        with naming(path):
            onnx.save_model(proto, file)
        os.replace(file, path)
    return summary(proto, path.stat().st_size)


def summary(proto: onnx.ModelProto, size: int) -> Summary:
    """Counts of ``proto``, whose file has ``size`` bytes."""
    from onnx import TensorProto

    operators = Counter(node.op_type for node in proto.graph.node)
    # Zero points and tables are bytes as well, of one dimension at most.
    widths = Counter(tensor.data_type for tensor in proto.graph.initializer if len(tensor.dims) == 2)
    return Summary(
        operators["QuantizeLinear"],
        operators["DequantizeLinear"],
        operators["MatMulInteger"],
        widths[TensorProto.INT4],
        widths[TensorProto.INT8],
        size,
    )
