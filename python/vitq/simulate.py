"""The simulated model: a copy of the float model whose integer sites are Sim modules, and its way to a ModelState."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .models.sites import AttentionSite, BlockSite, Family, LinearSite
from .quantizers import SimAttention, SimBlocks, SimGelu, SimLayerNorm, SimLinear, SimPatchConv
from .state import ModelState


class SimModel(nn.Module):
    """A float model with every site of its family replaced by the simulated layer; computes as the integer model does.

    Fresh sites have no QuantSpec and compute in float.

    Attributes:
        family: the float model's adapter (its model is the untouched teacher).
        model: the copy that runs.
        sequence: the sites in execution order, as the family names them.
        linears: module path -> SimLinear, those inside attention too, in execution order.
        attentions: module path -> SimAttention.
    """

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.__dict__["family"] = family
        self.model = copy.deepcopy(family.model).float().eval().requires_grad_(False)
        self.sequence: list[LinearSite | BlockSite] = family.sequence()
        self.sites: dict[str, LinearSite] = {site.path: site for site in family.linears()}
        self.attention_sites: dict[str, AttentionSite] = {site.path: site for site in family.attentions()}
        linears = {path: self._linear(path) for path in self.sites}
        self._swap_floats(linears)
        for path, site in self.attention_sites.items():
            bias = family.attention_bias(site)
            qkv, proj = linears[site.qkv.path], linears[site.proj.path]
            inner = site.proj.norm
            norm = None if inner is None else self.model.get_submodule(inner.path)
            stage = None if site.stage is None else self.model.get_submodule(site.stage)
            attention = SimAttention(qkv, proj, site.heads, site.softmax_scale, bias, norm, site.window, stage)
            self.model.set_submodule(path, attention)
        inside = {p for site in self.attention_sites.values() for p in (site.qkv.path, site.proj.path)}
        for path, linear in linears.items():
            if path not in inside:
                self.model.set_submodule(path, linear)
        self.bind()
        self._chain()

    def bind(self) -> None:
        """Point ``linears`` and ``attentions`` at the modules of ``model``."""
        self.__dict__["linears"] = {path: self.model.get_submodule(path) for path in self.sites}
        self.__dict__["attentions"] = {path: self.model.get_submodule(path) for path in self.attention_sites}

    def twin(self) -> SimModel:
        """A copy with modules of its own and the same family."""
        other = SimModel.__new__(SimModel)
        nn.Module.__init__(other)
        other.__dict__["family"] = self.family
        other.model = copy.deepcopy(self.model)
        other.sequence, other.sites, other.attention_sites = self.sequence, self.sites, self.attention_sites
        other.bind()
        return other

    def _linear(self, path: str) -> SimLinear:
        module = self.model.get_submodule(path)
        return SimPatchConv(module) if isinstance(module, nn.Conv2d) else SimLinear.of(module)

    def _swap_floats(self, linears: dict[str, SimLinear]) -> None:
        """Put simulations where the integer model's kernels absorb float modules."""
        for path, site in self.sites.items():
            if site.norm is not None:
                norm = self.model.get_submodule(site.norm.path)
                self.model.set_submodule(site.norm.path, SimLayerNorm(norm, linears[path]))
        for block in self.family.blocks():
            mlp = block.mlp
            if mlp is not None and mlp.activation != "module":
                approximate = "tanh" if mlp.activation == "gelu_tanh" else "none"
                self.model.set_submodule(mlp.act_path, SimGelu(approximate, linears[mlp.fc1.path]))

    def _chain(self) -> None:
        """Let attentions rule the bits of the MLP behind them and of the block after theirs."""
        stages: dict[str, list[SimAttention | None]] = {}
        for block in self.family.blocks():
            attention = self.attention_of(block)
            stages.setdefault(block.path.rpartition(".")[0], []).append(attention)
            if attention is not None and block.mlp is not None:
                # Not submodules: the layers have their own place in the model.
                attention.__dict__["mlp"] = (self.linears[block.mlp.fc1.path], self.linears[block.mlp.fc2.path])
        for path, attentions in stages.items():
            blocks = self.model.get_submodule(path)
            if type(blocks) is nn.Sequential:
                self.model.set_submodule(path, SimBlocks(blocks, attentions))

    def forward(self, x: Tensor) -> Tensor:
        """What the family reads from the model's output (see ``Family.output``)."""
        return self.family.output(self.model(x))

    def linears_of(self, unit: LinearSite | BlockSite) -> dict[str, SimLinear]:
        """The linear layers of a site of ``sequence`` in execution order."""
        sites = unit.linears if isinstance(unit, BlockSite) else (unit,)
        return {site.path: self.linears[site.path] for site in sites}

    def attention_of(self, unit: LinearSite | BlockSite) -> SimAttention | None:
        """The attention of a block, or None."""
        if not isinstance(unit, BlockSite) or unit.attention is None:
            return None
        return self.attentions[unit.attention.path]

    def refusals(self) -> dict[str, str]:
        """Module path -> why no integer kernel computes what is quantized there; empty for a deployable model."""
        modules = {**self.linears, **self.attentions}
        return {path: m.simulated.reason for path, m in modules.items() if m.simulated is not None}

    @torch.no_grad()
    def export(self, architecture: str, **rest: Any) -> ModelState:
        """The finished model; sites without a weight QuantSpec stay float.

        Args: architecture: timm model name; rest: the other fields of ModelState.
        Raises: ValueError for quantizers that exist in simulation only, or an attention whose linear layers are
            quantized and whose operands are not.
        """
        if refusals := self.refusals():
            path, reason = next(iter(refusals.items()))
            raise ValueError(f"the model has no integer form: {path}: {reason} ({len(refusals)} such sites)")
        inside = {p for site in self.attention_sites.values() for p in (site.qkv.path, site.proj.path)}
        sites = {
            path: linear.export()
            for path, linear in self.linears.items()
            if path not in inside and linear.quant.spec is not None
        }
        sites |= {path: a.export() for path, a in self.attentions.items() if a.qkv.quant.spec is not None}
        state = self.model.state_dict()
        floats = {name: state[name].detach().float().clone() for name in self.family.float_tensors(sites)}
        return ModelState(architecture=architecture, sites=sites, floats=floats, **rest)


class _Stop(Exception):
    """Ends a forward pass once its hook has what it came for."""


@contextmanager
def recording(modules: dict[str, nn.Module], record: Callable[[str, tuple, Any], None]) -> Iterator[None]:
    """Call ``record(name, inputs, output)`` after every forward of the named modules."""

    def hook(name: str) -> Callable:
        return lambda module, inputs, output: record(name, inputs, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def entering(module: nn.Module, parts: Iterable[Tensor], run: Callable[[Tensor], Any]) -> list[Tensor]:
    """What enters ``module`` when ``run`` sees each part; the forward passes end there."""
    out: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple) -> None:
        out.append(inputs[0].detach())
        raise _Stop

    handle = module.register_forward_pre_hook(hook)
    try:
        for part in parts:
            try:
                run(part)
            except _Stop:
                continue
    finally:
        handle.remove()
    return out


def inputs_of(model: nn.Module, path: str, images: Tensor, batch: int) -> Tensor:
    """What enters the module at ``path`` when ``model`` sees ``images``, concatenated over batches."""
    return torch.cat(entering(model.get_submodule(path), images.split(batch), model))
