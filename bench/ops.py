"""Single integer ops on the CPU beside what torch has for the same layer in float32."""

from __future__ import annotations

from functools import partial

import attention_oracle
import test_layer_norm_quantize as norm_oracle
import test_learning as learning_oracle
import test_qlinear as linear_oracle
import torch
import torch.nn.functional as F

import vitq_kernels as vk
from vitq_kernels.formats import FocusSpec
from vitq_kernels.ops import learning
from vitq_kernels.testing import assert_codes_match, gamma

from .registry import Prepared, benchmark

WIDTHS = {384: (384, 1152, 1536), 768: (768, 2304, 3072), 1536: (384,), 3072: (768,)}  # K → N of ViT-S and ViT-B
TOKENS = (197, 1576)
RANK = 32
FOCUS = FocusSpec(power=2.0, anchor="row")
FOCUSES = {"4 bits, DFQ": FocusSpec(bits=4, b1=0.01, b2=0.15), "8 bits, row anchor": FOCUS}


def sizes(case: str) -> list[int]:
    """The numbers of "197x384x1536"."""
    return [int(part) for part in case.split("x")]


@benchmark(
    "linear",
    [f"{m}x{k}x{n}" for m in TOKENS for k, widths in WIDTHS.items() for n in widths],
    ["197x384x1536", "197x1536x384"],
)
def linear(case: str) -> Prepared:
    """MxKxN: every integer form of a layer with per-token activations, beside ``F.linear``."""
    m, k, n = sizes(case)
    g = torch.Generator().manual_seed(0)
    x, w, bias = torch.randn(m, k, generator=g), torch.randn(n, k, generator=g), torch.randn(n, generator=g)
    codes = vk.quantize(x, vk.ActQuant())
    side = vk.QTensor(codes.q, codes.scale, 0, torch.randn(m, RANK, generator=g))
    up = torch.randn(n, RANK, generator=g)
    calls = {"F.linear": lambda: F.linear(x, w, bias)}
    for name, bits, layout in (("w8a8", 8, "int8_n16k4"), ("w4a8", 4, "int4_n16k4")):
        scale = w.abs().amax(1) / (2 ** (bits - 1) - 1)
        weight = vk.pack_weight(torch.round(w / scale[:, None]).to(torch.int8), bits, layout)
        linear_oracle.check(codes, weight, scale, {"activation": "none", "bias": bias})
        linear_oracle.check(side, weight, scale, {"activation": "none", "bias": bias, "lora_up": up})
        _check_gelu(codes, weight, scale, bias)
        plain = (weight, scale, bias)
        calls[name] = lambda a=plain: vk.qlinear(codes, *a)
        calls[f"{name}, rank {RANK}"] = lambda a=plain: vk.qlinear(side, *a, lora_up=up)
        calls[f"{name}, GELU, quantize"] = lambda a=plain: vk.qlinear_quantize(
            codes, *a, activation="gelu_erf", out=vk.ActQuant()
        )
    kw = {"activation": "none", "bias": bias}
    linear_oracle.check_weight_only(vk.qlinear_weight_only(x, *plain), x, None, weight, scale, kw)
    calls["w4, float activations"] = lambda: vk.qlinear_weight_only(x, *plain)
    return Prepared(calls)


def _check_gelu(x: vk.QTensor, weight: vk.PackedWeight, scale: torch.Tensor, bias: torch.Tensor) -> None:
    out = vk.qlinear_quantize(x, weight, scale, bias, activation="gelu_erf", out=vk.ActQuant())
    y, bound = linear_oracle.exact_qlinear(x, weight, scale, {"activation": "gelu_erf", "bias": bias})
    y, bound = y / out.scale.double(), bound / out.scale.double()
    assert_codes_match(out.q, y, bound + gamma(3) * y.abs(), -127, 127)


@benchmark(
    "attention",
    [f"{b}x{h}x{n}" for n in (197, 65, 1025) for b in (1, 8) for h in (3, 6, 12) if not (n == 1025 and b * h > 24)],
    ["1x6x197"],
)
def attention(case: str) -> Prepared:
    """BxHxN, 64 wide: integer attention over views of a fused QKV result, beside scaled_dot_product_attention."""
    b, h, n = sizes(case)
    d = 64
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(b, n, 3, h, d, generator=g)
    scale = (fused.abs().amax() / 127).reshape(1)
    coded = torch.round(fused / scale).clamp(-127, 127).to(torch.int8)
    (q, k, v), codes = (x.permute(2, 0, 3, 1, 4).unbind(0) for x in (fused, coded))
    scales = scale, scale, scale
    calls = {"SDPA": lambda: F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, h * d)}
    for name, focus in FOCUSES.items():
        got = vk.qattention(*codes, *scales, focus=focus)
        # Codes on a tie move by a level; levels of 4 bits are far apart.
        attention_oracle.assert_attention(got, *codes, *scales, focus, d**-0.5, vacuous=1.0)
        calls[name] = lambda focus=focus: vk.qattention(*codes, *scales, focus=focus)
    calls["8 bits, quantize"] = lambda: vk.qattention_quantize(*codes, *scales, focus=FOCUS, out=vk.ActQuant())
    return Prepared(calls)


@benchmark("norm", [f"{m}x{k}" for m in TOKENS for k in (384, 768)], ["197x384"])
def norm(case: str) -> Prepared:
    """MxK: LayerNorm and quantization in one pass, beside ``F.layer_norm``."""
    m, k = sizes(case)
    g = torch.Generator().manual_seed(0)
    x, (weight, bias) = torch.randn(m, k, generator=g), torch.randn(2, k, generator=g).unbind(0)
    down = torch.linalg.qr(torch.randn(k, RANK, generator=g)).Q.T.contiguous()
    eps = norm_oracle.EPS
    calls = {"F.layer_norm": lambda: F.layer_norm(x, (k,), weight, bias, eps)}
    for name, quant in {
        "static": vk.ActQuant(scale=torch.tensor([0.03])),
        "per token": vk.ActQuant(),
        f"per token, subspace {RANK}": vk.ActQuant(lora_down=down, subspace=True),
    }.items():
        norm_oracle.check(x, weight, bias, quant, "cpu")
        calls[name] = lambda quant=quant: vk.layer_norm_quantize(x, weight, bias, eps, quant)
    return Prepared(calls)


@benchmark("learning", [f"{m}x{k}" for m in (1576, 4728) for k in (384, 1536)], ["1576x384"])
@torch.inference_mode(False)
def learned_quantizer(case: str) -> Prepared:
    """MxK: a static 4-bit quantizer and its derivative, as they are learned, beside torch's own of the same kind."""
    m, k = sizes(case)
    g = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(m, k, generator=g) for _ in range(2))
    scale, zero = torch.tensor([0.3]), torch.zeros(1)
    leaves = [v.clone().requires_grad_() for v in (x, scale)]
    drop = learning.Dropped(1, 0.5)

    @torch.inference_mode(False)
    def theirs() -> tuple[torch.Tensor, ...]:
        y = torch._fake_quantize_learnable_per_tensor_affine(*leaves, zero, -7, 7, 1.0)
        return y, *torch.autograd.grad(y, leaves, upstream)

    @torch.inference_mode(False)
    def ours(dropped: learning.Dropped | None = None) -> tuple[torch.Tensor, ...]:
        y = learning.fake_quantize(*leaves, None, -7, 7, dropped=dropped)
        return y, *torch.autograd.grad(y, leaves, upstream)

    (y, *got), wide = ours(), [v.double().requires_grad_() for v in (x, scale)]
    torch.testing.assert_close(y, theirs()[0])
    bounds = (torch.tensor(v, dtype=torch.float64) for v in (0.0, -7.0, 7.0))
    want = learning_oracle.defined_fake_quantize(*wide, *bounds, None, torch.tensor(True))
    gradients = learning_oracle.gradients(want, upstream.double(), *wide)
    learning_oracle.assert_near([v.double() for v in got], gradients, 1e-4)
    return Prepared({"torch": theirs, "ours": ours, "ours, half dropped": lambda: ours(drop)})


@benchmark("learning_softmax", [f"{b}x{h}x{n}" for b in (8, 24) for h, n in ((3, 65), (6, 197))], ["8x3x65"])
@torch.inference_mode(False)
def learned_softmax(case: str) -> Prepared:
    """BxHxN: softmax, its quantizer and their derivative, as they are learned, beside a softmax without a quantizer."""
    b, h, n = sizes(case)
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(b, h, n, n, generator=g).requires_grad_()
    upstream = torch.randn(b, h, n, n, generator=g)

    @torch.inference_mode(False)
    def alone() -> object:
        return torch.autograd.grad(scores.softmax(-1), scores, upstream)

    @torch.inference_mode(False)
    def ours(leaves: list[torch.Tensor], focus: FocusSpec) -> object:
        return torch.autograd.grad(learning.focused_softmax(*leaves, focus)[0], leaves, upstream)

    calls = {"softmax alone": alone}
    for name, focus in FOCUSES.items():
        leaves = [scores, *(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (focus.b1, focus.b2))]
        head = scores[:1, :1].detach().requires_grad_()
        learning_oracle.check_focused_softmax([head, *leaves[1:]], upstream[:1, :1], focus)
        calls[name] = partial(ours, leaves, focus)
    return Prepared(calls)
