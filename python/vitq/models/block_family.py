"""What the adapters of timm and transformers share: sites of modules in the form of :mod:`.modules` or timm's own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

from timm.layers import DropPath, PatchDropout, mlp, norm
from timm.layers import activations as act
from torch import Tensor, nn

from . import modules
from .sites import AttentionSite, BlockSite, BranchSite, Family, LinearSite, MlpSite, NormSite, Role

LAYER_NORMS = (nn.LayerNorm, norm.LayerNorm, norm.LayerNormFp32)
_FUSED = {act.GELU: "gelu_erf", act.GELUTanh: "gelu_tanh"}


class BlockFamily(Family):
    """Blocks of ``norm1``, ``attn``, ``ls1``, ``norm2``, ``mlp``, ``ls2``, and what they are rewritten from.

    Attributes:
        model: the float model, or where :meth:`_rewritten` replaces modules a copy with these.
        holders: modules that only ever *call* their linear layers, so that these can be swapped one by one.
    """

    training_only = (nn.Dropout, DropPath, PatchDropout)
    holders: tuple[type[nn.Module], ...] = (modules.Attention, modules.Mlp, mlp.Mlp, mlp.GluMlp, mlp.SwiGLU)

    def __init__(self, model: nn.Module) -> None:
        if next(self._rewritten(model), None) is not None:
            # Not of the original: a rewritten model shares no tensor with it.
            model = copy.deepcopy(model)
            for path, module in list(self._rewritten(model)):
                model.set_submodule(path, module)
        super().__init__(model)

    def _rewritten(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(path, module in its place) of everything that is not in the form of :mod:`.modules` or timm's ViT."""
        yield from ()

    def attention_bias(self, site: AttentionSite) -> Tensor | None:
        return None if site.bias_table is None else self.model.get_submodule(site.path).bias.detach().float()

    def _refuse(self, path: str, reason: str) -> None:
        self.refused.append((path, reason))

    def _refuse_attention(self, path: str, reason: str) -> None:
        self._refuse(path, f"{reason}: it runs in float, its linear layers can be integer")

    def _linear(self, path: str, role: Role, norm: NormSite | None = None) -> LinearSite | None:
        module = self.model.get_submodule(path)
        if isinstance(module, nn.Identity):
            return None
        if type(module) is not nn.Linear:
            self._refuse(path, f"is a {type(module).__name__}, expected a Linear")
            return None
        return LinearSite(path, role, module.out_features, module.in_features, module.bias is not None, norm)

    def _norm(self, path: str) -> NormSite | None:
        module = self.model.get_submodule(path)
        if isinstance(module, nn.Identity):
            return None
        if type(module) not in LAYER_NORMS or len(module.normalized_shape) != 1:
            self._refuse(path, f"is a {type(module).__name__}, no LayerNorm: stays a float module")
            return None
        names = [f"{path}.{p}" if getattr(module, p) is not None else None for p in ("weight", "bias")]
        return NormSite(path, module.normalized_shape[0], module.eps, *names)

    def _patches(self, path: str) -> Iterator[LinearSite]:
        """The convolution at ``path`` as a linear layer over patches."""
        conv = self.model.get_submodule(path)
        plain = type(conv) is nn.Conv2d and conv.stride == conv.kernel_size and conv.dilation == (1, 1)
        if not plain or conv.padding not in ((0, 0), "valid") or conv.groups != 1:
            self._refuse(path, f"is {conv}, expected a Conv2d of patches that do not overlap: stays float")
            return
        k = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
        bias = conv.bias is not None
        yield LinearSite(path, "patch_embed", conv.out_channels, k, bias, None, tuple(conv.kernel_size))

    def _others(self, path: str, covered: Iterable[str] = ()) -> Iterator[LinearSite]:
        """Linear layers below ``path`` outside ``covered``, of modules that merely call them."""
        for name, module in self.model.get_submodule(path).named_modules(prefix=path):
            for child, linear in module.named_children():
                where = f"{name}.{child}"
                if not isinstance(linear, nn.Linear) or where in covered:
                    continue
                if self._holds(module) and type(linear) is nn.Linear:
                    yield self._linear(where, "other")
                else:
                    self._refuse(
                        where, f"belongs to a {type(module).__name__}, whose use of it is not known: stays float"
                    )

    def _holds(self, module: nn.Module) -> bool:
        return type(module) in self.holders

    def _layer_scale(self, block: str, name: str) -> str | None:
        """γ's name: of a LayerScale (Swin's blocks have none)."""
        scale = getattr(self.model.get_submodule(block), name, None)
        return f"{block}.{name}.gamma" if isinstance(getattr(scale, "gamma", None), nn.Parameter) else None

    def _mlp(self, path: str, norm: str | None, layer_scale: str | None = None) -> MlpSite | None:
        """The MLP at ``path`` behind the norm at ``norm``, which it is the only reader of."""
        module = self.model.get_submodule(path)
        if type(module) not in (mlp.Mlp, modules.Mlp) or type(module.fc1) is not nn.Linear:
            self._refuse(path, f"is a {type(module).__name__}, expected an Mlp: its layers are not fused")
            return None
        inner = self._norm(f"{path}.norm")
        if inner is None and not isinstance(module.norm, nn.Identity):
            return None
        fc1 = self._linear(f"{path}.fc1", "fc1", None if norm is None else self._norm(norm))
        fc2 = self._linear(f"{path}.fc2", "fc2", inner)
        kind = type(module.act)
        name = _FUSED.get(kind, "module")
        if kind is nn.GELU:
            name = "gelu_tanh" if module.act.approximate == "tanh" else "gelu_erf"
        if name == "module":
            self._refuse(f"{path}.act", f"is a {kind.__name__}, no GELU: runs in float between fc1 and fc2")
        return MlpSite(path, fc1, fc2, name, f"{path}.act", layer_scale)

    def _block(self, path: str, *, attn: str = "attn", summed: bool = True) -> BlockSite:
        """The block at ``path``, attention first.

        Args: attn: where in it; summed: it sums up both branches, each behind its norm. If not (norms behind the
              branches, or none that are LayerNorms) attention and MLP are swapped where they are.
        """
        branches = (
            BranchSite(f"{path}.norm1", f"{path}.{attn}", self._layer_scale(path, "ls1")),
            BranchSite(f"{path}.norm2", f"{path}.mlp", self._layer_scale(path, "ls2")),
        )
        if summed:
            attention = self._attention(path, branches[0])
            mlp = self._mlp(branches[1].module, branches[1].norm, branches[1].layer_scale)
        else:
            attention = self._attention(path, BranchSite("", branches[0].module))
            mlp = self._mlp(branches[1].module, None)
        front = () if attention is None else (attention.qkv, attention.proj)
        back = () if mlp is None else (mlp.fc1, mlp.fc2)
        others = tuple(self._others(path, {site.path for site in front + back}))
        front += tuple(site for site in others if site.path.startswith(f"{branches[0].module}."))
        back += tuple(site for site in others if site not in front)
        return BlockSite(path, attention, mlp, front + back, branches if summed else ())

    def _unknown_block(self, path: str, expected: str) -> BlockSite:
        kind = type(self.model.get_submodule(path)).__name__
        self._refuse(path, f"is a {kind}, expected a {expected}: its layers are not fused")
        return BlockSite(path, None, None, tuple(self._others(path)))

    def _attention(self, block: str, branch: BranchSite) -> AttentionSite | None:
        """The attention of a block; its LayerNorm in front unless ``branch.norm`` is empty. None: see ``refused``."""
        path = branch.module
        module = self.model.get_submodule(path)
        if type(module) is not modules.Attention:
            self._refuse_attention(path, self._reason(module))
            return None
        norm1, inner = self._norm(branch.norm) if branch.norm else None, self._norm(f"{path}.norm")
        if (branch.norm and norm1 is None) or (inner is None and not isinstance(module.norm, nn.Identity)):
            self._refuse_attention(path, "is surrounded by norms that are no LayerNorm")
            return None
        qkv = self._linear(f"{path}.qkv", "qkv", norm1)
        proj = self._linear(f"{path}.proj", "proj", inner)
        return AttentionSite(
            path,
            qkv,
            proj,
            module.heads,
            qkv.out_features // (3 * module.heads),
            module.scale,
            branch.layer_scale,
            bias_table=None if module.bias is None else f"{path}.bias",
            stage=f"{path}.stage" if isinstance(module.stage, modules.QueryKeyStage) else None,
            **self._tokens(),
        )

    def _tokens(self) -> dict[str, int | bool]:
        """``prefix`` and ``class_token`` of every attention."""
        return {}

    def _reason(self, attention: nn.Module) -> str:
        """Why an attention is not in the form of ``modules.Attention``."""
        return f"is a {type(attention).__name__}, which the integer attention does not compute"


def gated_mlp(module: nn.Module) -> modules.Mlp | None:
    """timm's gated MLPs with the gate inside the activation; None for another module."""
    if type(module) is mlp.SwiGLU:
        fc1, act = modules.fused((module.fc1_g, module.fc1_x)), modules.Gated(module.act)
    elif type(module) is mlp.GluMlp and type(module.fc1) is nn.Linear:
        fc1, act = module.fc1, modules.Gated(module.act, module.gate_last)
    else:
        return None
    return modules.Mlp(fc1, act, module.fc2, module.norm)
