"""Float model + state -> integer model, by swapping modules; the forward API stays the model's own."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitq_kernels.formats import AttentionState, LinearState, QuantSpec
from vitq_kernels.nn import FloatBranch, QAttention, QBlock, QBlocks, QLinear, QMlp, QModule, QPatchEmbed, prepack

from .models.adapters import adapter_for
from .models.sites import AttentionSite, BlockSite, Family, LinearSite, MlpSite, NormSite
from .state import ModelState, SiteState


@dataclass(frozen=True)
class ConversionReport:
    """What a converted model computes in integers and what it does not.

    Args:
        integer: module path -> how (bits, rank, static or dynamic).
        floating: module path -> why it computes in float.
    """

    integer: dict[str, str] = field(default_factory=dict)
    floating: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max(map(len, (*self.integer, *self.floating, "")))
        lines = [f"{path:{width}}  {how}" for path, how in self.integer.items()]
        return "\n".join(lines + [f"{path:{width}}  float: {why}" for path, why in self.floating.items()])


def to_integer(model: nn.Module, state: ModelState, backend: str | None = None) -> nn.Module:
    """The integer model of ``state``: a deep copy of the float ``model`` with its modules swapped, in eval mode.

    Args:
        model: the float model that ``state`` was calibrated on; of its weights none is used, all come from the state.
        state: see :class:`vitq.state.ModelState`.
        backend: pin every integer module to one back end; None takes the device's best at each call.

    Returns:
        A model on ``model``'s device with the same forward, forward_features and forward_head; its ``vitq_report`` is
        the ConversionReport.

    Raises:
        TypeError: a model of no known family, or a state of the wrong kind for its site.
        ValueError: a path that is no site of the model (with the reason where one is known), a shape that does not fit,
            float tensors missing or left over, a back end that does not serve the device.
    """
    family = adapter_for(model)
    check_state(family, state)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    out = copy.deepcopy(family.model).eval().requires_grad_(False)
    out.load_state_dict(state.floats, strict=False)
    swap = _Swap(out, state.to(device))
    for site in family.sequence():
        if isinstance(site, BlockSite):
            swap.block(site)
        else:
            swap.linear(site)
    for path in {site.path.rpartition(".")[0] for site in family.blocks() if _decides(site, state)}:
        out.set_submodule(path, QBlocks(OrderedDict(out.get_submodule(path).named_children())))
    for name, module in list(out.named_modules()):
        if isinstance(module, family.training_only):
            out.set_submodule(name, nn.Identity())
    out.vitq_report = _report(family, state, out)
    return prepack(out, backend)


def check_state(family: Family, state: ModelState) -> None:
    """Raises ValueError or TypeError unless ``state`` fits the model of ``family``, naming what does not."""
    for path, site_state in state.sites.items():
        _check_site(family, family.find(path), site_state)
    _check_token_bits(family, state)
    inside = {
        linear.path for site in family.attentions() if site.path in state.sites for linear in (site.qkv, site.proj)
    }
    if both := sorted(inside & set(state.sites)):
        raise ValueError(f"sites has {both[0]!r} beside the attention that it is part of, expected one of the two")
    expected = family.float_tensors(state.sites)
    if missing := sorted(set(expected) - set(state.floats)):
        raise ValueError(f"floats lacks {', '.join(missing[:4])} ({len(missing)} in all)")
    if unknown := sorted(set(state.floats) - set(expected)):
        raise ValueError(f"floats has {', '.join(unknown[:4])} ({len(unknown)} in all), which the model does not use")
    for name, tensor in expected.items():
        if state.floats[name].shape != tensor.shape:
            got = tuple(state.floats[name].shape)
            raise ValueError(f"floats[{name!r}] has shape {got}, expected {tuple(tensor.shape)}")


def _check_site(family: Family, site: LinearSite | AttentionSite, state: SiteState) -> None:
    kind = AttentionState if isinstance(site, AttentionSite) else LinearState
    if not isinstance(state, kind):
        raise TypeError(f"sites[{site.path!r}] is {type(state).__name__}, expected {kind.__name__}")
    if isinstance(site, LinearSite):
        if tuple(state.codes.shape) != (site.out_features, site.in_features):
            want = (site.out_features, site.in_features)
            raise ValueError(f"codes of {site.path!r} has shape {tuple(state.codes.shape)}, expected {want}")
        return
    _check_site(family, site.qkv, state.qkv)
    _check_site(family, site.proj, state.proj)
    if state.heads != site.heads:
        raise ValueError(f"heads of {site.path!r} is {state.heads}, expected {site.heads}")
    bias = family.attention_bias(site)
    want = None if bias is None else tuple(bias.shape)
    got = None if state.bias is None else tuple(state.bias.shape)
    if got != want:
        raise ValueError(f"bias of {site.path!r} has shape {got}, expected {want}")


def _decides(block: BlockSite, state: ModelState) -> bool:
    """Whether the block's attention decides token-wise bits."""
    attention = None if block.attention is None else state.sites.get(block.attention.path)
    return attention is not None and attention.token_bits is not None


def _mlp_fused(block: BlockSite, sites: dict[str, SiteState]) -> bool:
    return block.mlp is not None and {block.mlp.fc1.path, block.mlp.fc2.path} <= sites.keys()


def _check_token_bits(family: Family, state: ModelState) -> None:
    """ValueError where bits are decided for a quantizer whose scales are not dynamic, or cannot be handed on."""
    blocks = family.blocks()
    for block, after in zip(blocks, (*blocks[1:], None)):
        if not _decides(block, state):
            continue
        parent = block.path.rpartition(".")[0]
        if type(family.model.get_submodule(parent)) is not nn.Sequential:
            raise ValueError(f"token_bits of {block.attention.path!r} is given, expected None outside a Sequential")
        ruled = {block.attention.proj.path: state.sites[block.attention.path].proj.act}
        if _mlp_fused(block, state.sites):
            ruled |= {site.path: state.sites[site.path].act for site in (block.mlp.fc1, block.mlp.fc2)}
        if after is not None and after.path.rpartition(".")[0] == parent and after.attention is not None:
            attention = state.sites.get(after.attention.path)
            if attention is not None:
                ruled |= {after.attention.qkv.path: attention.qkv.act, after.attention.path: attention.operands}
        for path, spec in ruled.items():
            if spec is not None and (not spec.dynamic or spec.table is not None):
                raise ValueError(
                    f"token_bits of {block.attention.path!r} rules {path!r}, whose codes are {_how(spec)}, expected "
                    "dynamic scales and no table"
                )


class _Swap:
    """Swaps modules of ``model`` in place, each linear layer together with the LayerNorm that only it reads."""

    def __init__(self, model: nn.Module, state: ModelState) -> None:
        self.model, self.sites = model, state.sites

    def _absorb(self, norm: NormSite | None) -> nn.LayerNorm | None:
        if norm is None:
            return None
        module = self.model.get_submodule(norm.path)
        self.model.set_submodule(norm.path, nn.Identity())
        return module

    def _gamma(self, name: str | None) -> Tensor | None:
        return None if name is None else self.model.get_parameter(name).detach().clone()

    def linear(self, site: LinearSite) -> None:
        state = self.sites.get(site.path)
        if state is None:
            return
        if site.patch is not None:
            module = QPatchEmbed.from_state(state, site.patch)
        else:
            module = QLinear.from_state(state, norm=self._absorb(site.norm))
        self.model.set_submodule(site.path, module)

    def block(self, site: BlockSite) -> None:
        fused_attention = site.attention is not None and site.attention.path in self.sites
        fused_mlp = _mlp_fused(site, self.sites)
        fused = {site.mlp.fc1.path, site.mlp.fc2.path} if fused_mlp else set()
        for linear in site.linears:
            if linear.path not in fused:
                self.linear(linear)
        if not fused_attention or not site.branches:
            # The float block keeps its residual sums and LayerScale.
            if fused_attention:
                self.model.set_submodule(site.attention.path, self._attention(site.attention))
            if fused_mlp:
                self.model.set_submodule(site.mlp.path, self._mlp(site.mlp, None))
            return
        branch = site.branches[1]
        if fused_mlp:
            mlp = self._mlp(site.mlp, self._gamma(branch.layer_scale))
        else:
            norm, module = self.model.get_submodule(branch.norm), self.model.get_submodule(branch.module)
            mlp = FloatBranch(norm, module, self._gamma(branch.layer_scale))
        self.model.set_submodule(site.path, QBlock(self._attention(site.attention), mlp))

    def _mlp(self, site: MlpSite, layer_scale: Tensor | None) -> QMlp:
        fused = site.activation != "module"
        return QMlp.from_states(
            self.sites[site.fc1.path],
            self.sites[site.fc2.path],
            site.activation if fused else self.model.get_submodule(site.act_path),
            norm=self._absorb(site.fc1.norm),
            inner_norm=self._absorb(site.fc2.norm),
            layer_scale=layer_scale,
        )

    def _attention(self, site: AttentionSite) -> QAttention:
        return QAttention.from_state(
            self.sites[site.path],
            norm=self._absorb(site.qkv.norm),
            proj_norm=self._absorb(site.proj.norm),
            layer_scale=self._gamma(site.layer_scale),
            window=site.window,
            stage=None if site.stage is None else self.model.get_submodule(site.stage),
        )


def _how(spec: QuantSpec) -> str:
    return f"{spec.bits} bits {'dynamic' if spec.dynamic else 'static'} {spec.granularity}" + (
        "" if spec.table is None else " table"
    )


def _describe(state: SiteState) -> str:
    if isinstance(state, AttentionState):
        focus = state.focus
        bits = state.token_bits
        return (
            f"q, k, v {_how(state.operands)}; softmax {focus.bits} bits, {focus.anchor} anchor, power {focus.power:g}"
        ) + ("" if bits is None else f"; leaves {bits.share:.0%} of the patches their bits, {bits.low} to the others")
    act = "float input" if state.act is None else f"input {_how(state.act)}"
    rank = f", rank {state.lora.rank} {state.lora.kind}" if state.lora.rank else ""
    return f"weight {state.weight.bits} bits{'' if state.weight.table is None else ' table'}, {act}{rank}"


def _report(family: Family, state: ModelState, model: nn.Module) -> ConversionReport:
    linears = state.linears()
    report = ConversionReport()
    for site in family.linears():
        if site.path in linears:
            report.integer[site.path] = _describe(linears[site.path])
        else:
            report.floating[site.path] = "the state leaves it float"
    for site in family.attentions():
        if site.path in state.sites:
            report.integer[site.path] = _describe(state.sites[site.path])
        else:
            report.floating[site.path] = "the state leaves it float"
    report.floating.update(family.refused)
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, QModule))
    for name, module in model.named_modules():
        if not name.startswith(inside) and name not in report.floating and any(True for _ in module.parameters(False)):
            what = "parameters of its own" if name == "" else type(module).__name__
            report.floating[name] = f"{what}: computed in float"
    return report
