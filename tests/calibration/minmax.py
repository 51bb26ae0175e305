"""For tests only: states from plain ranges over a model's sites, and an independent float64 simulation of them."""

import copy
from dataclasses import replace
from functools import partial

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from vitq.models import adapter_for
from vitq.state import ModelState

from vitq_kernels.formats import AttentionState, FocusSpec, LinearState, LowRankSpec, QuantSpec, TokenBits

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 7, "mlp_ratio": 2}
FOCUS = FocusSpec(8, power=2.0, anchor="row")


def vit(cls=VisionTransformer, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return spread(cls(**(TINY | kwargs)))


def swin(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"img_size": (24, 40), "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    return spread(SwinTransformer(**(arguments | {"num_classes": 7, "window_size": 4} | kwargs)))


def spread(model: nn.Module) -> nn.Module:
    """Weights of a size at which every branch matters (fresh timm models are nearly the identity)."""
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=1.5 * p[0].numel() ** -0.5 if name.endswith("weight") else 0.5)
        else:
            nn.init.normal_(p, mean=1.0 if "norm" in name and name.endswith("weight") else 0.1, std=0.2)
    return model.eval().requires_grad_(False)


def images(model: nn.Module, n: int = 6, seed: int = 1) -> torch.Tensor:
    size = model.patch_embed.img_size
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def inputs_of(model: nn.Module, paths: list[str], x: torch.Tensor) -> tuple[dict, dict]:
    """What the modules at ``paths`` read and wrote on ``x``."""
    read, wrote, hooks = {}, {}, []

    def hook(path, module, args, out):
        read[path], wrote[path] = args[0].detach(), out.detach()

    for path in paths:
        hooks.append(model.get_submodule(path).register_forward_hook(partial(hook, path)))
    model(x)
    for h in hooks:
        h.remove()
    return read, wrote


def rows(site, x: torch.Tensor) -> torch.Tensor:
    if site.patch is not None:
        return nn.functional.unfold(x, site.patch, stride=site.patch).transpose(1, 2).reshape(-1, site.in_features)
    return x.reshape(-1, site.in_features)


def linear_state(weight, bias, x, weight_spec, act, rank=0, kind="error") -> LinearState:
    """Symmetric absmax weights, min-max activations, whatever low-rank directions the weight has."""
    lora, down, up, residual = LowRankSpec(rank, kind), None, None, x
    if rank and kind == "subspace":
        down = torch.linalg.svd(x, full_matrices=False).Vh[:rank].half().float()
        lora = LowRankSpec(down.shape[0], kind)
        up, residual = weight @ down.T, x - x @ down.T @ down
    scale = weight.abs().amax(1) / weight_spec.scale_divisor
    codes = torch.round(weight / scale[:, None]).clamp(weight_spec.qmin, weight_spec.qmax).to(torch.int8)
    if weight_spec.table is not None:
        codes = weight_spec.table.lut()[codes.long() + 128]
    if rank and kind == "error":
        u, s, v = torch.linalg.svd(weight - codes * scale[:, None], full_matrices=False)
        down, up = v[:rank].contiguous(), (u * s)[:, :rank].contiguous()
        lora = LowRankSpec(down.shape[0], kind)
    act_scale, zero = None, 0
    if act is not None and not act.dynamic:
        if act.symmetric:
            act_scale = residual.abs().max().reshape(1) / act.scale_divisor
        else:
            low, high = residual.min().clamp(max=0), residual.max().clamp(min=0)
            act_scale = ((high - low) / (act.qmax - act.qmin)).reshape(1)
            zero = int((act.qmin - low / act_scale).round().clamp(act.qmin, act.qmax))
    branch = (None, None) if down is None else (down.half(), up.half())
    return LinearState(codes, scale, weight_spec, bias, act, act_scale, zero, lora, *branch)


def minmax_state(
    model, x, *, weight=None, act=None, operands=None, focus=FOCUS, rank=0, kind="error", skip=(), weight_only=()
) -> ModelState:
    """A complete state; ``skip``: sites left float, ``weight_only``: linear layers without activation codes."""
    weight = weight or QuantSpec(8, granularity="per_channel")
    act = act or QuantSpec(8, symmetric=False)
    operands = operands or QuantSpec(8, granularity="per_head")
    family = adapter_for(model)
    stages = [site.stage for site in family.attentions() if site.stage is not None]
    read, wrote = inputs_of(family.model, [*(site.path for site in family.linears()), *stages], x)

    def linear(site):
        bias = family.bias(site)
        bias = None if bias is None else bias.detach().clone()
        spec = None if site.path in weight_only else act
        return linear_state(family.weight(site).clone(), bias, rows(site, read[site.path]), weight, spec, rank, kind)

    sites, inside = {}, set()
    for site in family.attentions():
        inside |= {site.qkv.path, site.proj.path}
        if site.path not in skip:
            parts = wrote[site.stage or site.qkv.path].reshape(-1, 3, site.heads, site.head_dim).abs()
            scale = None
            if not operands.dynamic:
                top = parts.amax((0, 3)) if operands.granularity == "per_head" else parts.amax((0, 2, 3))
                scale = (top / operands.scale_divisor).flatten()
            bias = family.attention_bias(site)
            sites[site.path] = AttentionState(
                linear(site.qkv), linear(site.proj), site.heads, site.softmax_scale, operands, scale, focus, bias
            )
    for site in family.linears():
        if site.path not in inside and site.path not in skip:
            sites[site.path] = linear(site)
    floats = {name: t.clone() for name, t in family.float_tensors(sites).items()}
    return ModelState("test", sites, floats)


def deciding(model, state: ModelState, **bits) -> ModelState:
    """``state`` with attentions that all decide token-wise bits."""
    sites = dict(state.sites)
    for site in adapter_for(model).attentions():
        own = TokenBits(prefix=site.prefix, class_token=site.class_token, **bits)
        sites[site.path] = replace(sites[site.path], token_bits=own)
    return replace(state, sites=sites)


# The oracle: timm's own float64 modules with the quantizers put between them. It shares no code with the package's
# kernels, modules or index maps: windows, masks, residual sums and LayerScale are timm's.


def fake_quantize(x, spec: QuantSpec, scale, zero, dim=-1):
    """Quantize and dequantize; dynamic scales per row along ``dim``."""
    if spec.dynamic:
        scale = x.abs().amax(dim, keepdim=True) / spec.qmax
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    q = (torch.round(x / scale) + zero).clamp(spec.qmin, spec.qmax)
    if spec.table is not None:
        q = spec.table.lut().double()[q.long() + 128]
    return (q - zero) * scale


class SimLinear(nn.Module):
    def __init__(self, state: LinearState):
        super().__init__()
        self.s = state
        self.w = state.codes.double() * state.weight_scale.double()[:, None]

    def forward(self, x):
        s = self.s
        y, t = x, None
        if s.lora_down is not None:
            t = x @ s.lora_down.double().T
            y = x - t @ s.lora_down.double() if s.lora.kind == "subspace" else x
        if s.act is not None:
            y = fake_quantize(y, s.act, None if s.act_scale is None else s.act_scale.double(), s.act_zero_point)
        y = y @ self.w.T
        if t is not None:
            y = y + t @ s.lora_up.double().T
        return y if s.bias is None else y + s.bias.double()


class SimConv(nn.Module):
    def __init__(self, state: LinearState, patch):
        super().__init__()
        self.linear, self.patch = SimLinear(state), patch

    def forward(self, x):
        h, w = x.shape[-2] // self.patch[0], x.shape[-1] // self.patch[1]
        y = self.linear(nn.functional.unfold(x, self.patch, stride=self.patch).transpose(1, 2))
        return y.transpose(1, 2).unflatten(2, (h, w))


class SimAttention(nn.Module):
    def __init__(self, state: AttentionState, norm: nn.Module, stage: nn.Module, windows: bool):
        super().__init__()
        self.excluded = -100 if windows else -torch.inf
        self.s, self.norm, self.stage = state, norm, stage
        self.qkv, self.proj = SimLinear(state.qkv), SimLinear(state.proj)

    def forward(self, x, attn_mask=None, is_causal=False, mask=None):
        s, (b, n, _) = self.s, x.shape
        raw = self.stage(self.qkv(x)).reshape(b, n, 3, s.heads, -1)
        per_head = s.operands.granularity != "per_tensor"
        scale = None
        if s.operand_scale is not None:
            scale = s.operand_scale.double().reshape(3, s.heads if per_head else 1, 1)
        qkv = fake_quantize(raw, s.operands, scale, 0, dim=-1 if per_head else (-1, -2))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-1, -2) * s.softmax_scale
        if s.bias is not None:
            scores = scores + s.bias.double()
        if mask is not None:
            mask = mask.masked_fill(mask <= self.excluded, -torch.inf)
            scores = scores + mask.repeat(b // mask.shape[0], 1, 1).unsqueeze(1)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        if s.operands.dynamic:
            # Values meet the probabilities on the scale of the row with the largest one.
            dim = -1 if per_head else (-1, -2)
            vs = (raw.abs().amax(dim, keepdim=True) / s.operands.qmax).permute(2, 0, 3, 1, 4)[2]
            top = vs.amax(-2, keepdim=True)
            v = torch.round(v / top) * top
        f = s.focus
        p = scores.softmax(-1)
        top = p.amax(-1, keepdim=True) if f.anchor == "row" else 1.0
        code = torch.round(f.n * ((p / top - f.b1) / (f.b2 - f.b1)).clamp(0, 1) ** (1 / f.power))
        levels, step, offset = f.decode()
        p_hat = (levels.double()[code.long()] * step + offset) * (p > 0)
        norm = p_hat.sum(-1, keepdim=True) if f.renormalize else 1.0 / top
        return self.proj(self.norm((p_hat / norm @ v).transpose(1, 2).reshape(b, n, -1)))


def simulated(model: nn.Module, state: ModelState) -> nn.Module:
    """``state`` on timm's own modules in float64."""
    family = adapter_for(model)
    out = copy.deepcopy(family.model)
    out.load_state_dict(state.floats, strict=False)
    out = out.double()
    for path, site_state in state.sites.items():
        site = family.find(path)
        if isinstance(site_state, AttentionState):
            parts = [getattr(out.get_submodule(path), name, nn.Identity()) for name in ("norm", "stage")]
            out.set_submodule(path, SimAttention(site_state, *parts, site.window is not None))
        elif site.patch is not None:
            out.set_submodule(path, SimConv(site_state, site.patch))
        else:
            out.set_submodule(path, SimLinear(site_state))
    return out


def sqnr(reference: torch.Tensor, got: torch.Tensor) -> float:
    """Signal-to-error ratio in dB."""
    reference = reference.double()
    return float(10 * torch.log10(reference.square().sum() / (got.double() - reference).square().sum()))
