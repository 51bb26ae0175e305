"""Where a float model can be quantized, in the words of the formats: what every model family's adapter answers.

A *site* names a module of the float model by its path and says all that calibration and conversion need to know about
it. Adapters (one per family) are the only code that knows a family's attribute names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from vitq_kernels.nn.window import Window

Role = Literal["patch_embed", "qkv", "proj", "fc1", "fc2", "reduction", "head", "other"]


@dataclass(frozen=True)
class NormSite:
    """A LayerNorm over the last dimension (``weight`` and ``bias`` are state-dict names, or None)."""

    path: str
    width: int
    eps: float
    weight: str | None
    bias: str | None


@dataclass(frozen=True)
class LinearSite:
    """A linear layer (or a convolution whose patches do not overlap, as a linear layer over patches).

    Args:
        path: module path.
        role: its place in the model.
        out_features, in_features: N, K.
        bias: whether it has one.
        norm: the LayerNorm in front if this layer is its only reader: it can be absorbed, and scales can be moved
            between the two.
        patch: (h, w) of a patch embedding; K is (C, h, w) flattened, as ``weight.flatten(1)``.
    """

    path: str
    role: Role
    out_features: int
    in_features: int
    bias: bool
    norm: NormSite | None = None
    patch: tuple[int, int] | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """State-dict names of what a state of this site replaces."""
        return (f"{self.path}.weight", f"{self.path}.bias") if self.bias else (f"{self.path}.weight",)


@dataclass(frozen=True)
class AttentionSite:
    """Multi-head self-attention from the LayerNorm in front to the residual sum behind.

    Args:
        path: module path of the attention (its state's key in ``ModelState.sites``).
        qkv, proj: linear layers; qkv's N is [3, H, d].
        heads, head_dim: H, d.
        softmax_scale: factor on q·kᵀ.
        layer_scale: state-dict name of γ [C], the factor on the branch, or None.
        bias_table: state-dict name of the relative position bias, or None (see ``Family.attention_bias``).
        window: the windows that attention stays within, or None for all tokens.
        stage: module path of what becomes of the fused output of qkv in float before it is quantized, or None.
        prefix, class_token: how many leading tokens are no patches, and whether the first of them is the class token.
    """

    path: str
    qkv: LinearSite
    proj: LinearSite
    heads: int
    head_dim: int
    softmax_scale: float
    layer_scale: str | None = None
    bias_table: str | None = None
    window: Window | None = None
    stage: str | None = None
    prefix: int = 0
    class_token: bool = False

    @property
    def norm(self) -> NormSite | None:
        return self.qkv.norm

    @property
    def parameters(self) -> tuple[str, ...]:
        table = () if self.bias_table is None else (self.bias_table,)
        return self.qkv.parameters + self.proj.parameters + table


@dataclass(frozen=True)
class MlpSite:
    """fc1, activation, fc2 from the LayerNorm in front to the residual sum behind.

    Args:
        path: module path of the whole (fc1 and fc2 have states of their own).
        activation: "gelu_erf" or "gelu_tanh", which kernels fuse, or "module": the float module at ``act_path``.
        layer_scale: state-dict name of the [C] factor on the branch, or None.
    """

    path: str
    fc1: LinearSite
    fc2: LinearSite
    activation: Literal["gelu_erf", "gelu_tanh", "module"]
    act_path: str
    layer_scale: str | None = None

    @property
    def norm(self) -> NormSite | None:
        return self.fc1.norm


@dataclass(frozen=True)
class BranchSite:
    """x + γ·module(norm(x)): module paths, and the state-dict name of γ or None."""

    norm: str
    module: str
    layer_scale: str | None = None


@dataclass(frozen=True)
class BlockSite:
    """A transformer block.

    Args:
        path: module path; the module maps the residual stream to the residual stream.
        attention, mlp: None where ``Family.refused`` says why; their linear layers then are sites of their own.
        linears: every linear layer of the block, in execution order.
        branches: what the block sums up, attention then MLP, whether convertible or not; empty if not of this form:
            attention and MLP then are called where they are, without a norm in front.
    """

    path: str
    attention: AttentionSite | None
    mlp: MlpSite | None
    linears: tuple[LinearSite, ...]
    branches: tuple[BranchSite, ...] = ()


class Family(ABC):
    """A float model and its sites.

    Args:
        model: the float model; never modified.

    Attributes:
        refused: (module path, reason) of everything that cannot become integer, or only in part.
    """

    #: module types that do nothing in evaluation
    training_only: tuple[type[nn.Module], ...] = (nn.Dropout,)

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.refused: list[tuple[str, str]] = []
        self._sequence = list(self._enumerate())
        self._sites = {site.path: site for site in (*self.attentions(), *self.linears())}

    @abstractmethod
    def _enumerate(self) -> Iterator[LinearSite | BlockSite]:
        """All sites in execution order; appends to ``refused``."""

    @abstractmethod
    def attention_bias(self, site: AttentionSite) -> Tensor | None:
        """[H, N, N] float32 additive scores of ``site`` (relative position), or None."""

    def input_shape(self) -> tuple[int | None, ...] | None:
        """(C, H, W) of an image, (N, C) of a cloud that the model takes, None for what may be anything."""
        return None

    def output(self, y: Any) -> Tensor:
        """The one tensor of what ``model`` returns that methods compare and predictions are read from."""
        return y

    def holding(self, model: nn.Module, images: Tensor, batch: int) -> AbstractContextManager:
        """The time of a calibration on ``images``, run ``batch`` at a time; ``model``: a copy of this, still float.

        Within, whatever ``model`` chooses by what it sees (regions of interest) stays what it is now, in copies too:
        the layers of float and quantized model have the same rows. Most models choose nothing.
        """
        return nullcontext()

    def sequence(self) -> list[LinearSite | BlockSite]:
        """All sites in execution order: blocks, and the linear layers between them."""
        return list(self._sequence)

    def blocks(self) -> list[BlockSite]:
        """The transformer blocks in execution order."""
        return [site for site in self.sequence() if isinstance(site, BlockSite)]

    def linears(self) -> list[LinearSite]:
        """Every linear layer in execution order, those inside blocks too."""
        out: list[LinearSite] = []
        for site in self.sequence():
            out.extend(site.linears if isinstance(site, BlockSite) else (site,))
        return out

    def attentions(self) -> list[AttentionSite]:
        """Every convertible attention in execution order."""
        return [block.attention for block in self.blocks() if block.attention is not None]

    def find(self, path: str) -> LinearSite | AttentionSite:
        """The site at module ``path``. Raises: ValueError if there is none, with the reason where one is known."""
        if path in self._sites:
            return self._sites[path]
        reason = dict(self.refused).get(path)
        raise ValueError(f"{path!r} is no quantizable site of the model" + (f": {reason}" if reason else ""))

    def weight(self, site: LinearSite) -> Tensor:
        """[N, K] weight of ``site`` (patches flattened), a view of the model's parameter."""
        return self.model.get_parameter(f"{site.path}.weight").flatten(1)

    def bias(self, site: LinearSite) -> Tensor | None:
        """[N] bias of ``site``, or None."""
        return self.model.get_parameter(f"{site.path}.bias") if site.bias else None

    def attention_mask(self, site: AttentionSite) -> Tensor | None:
        """[G, N, N] float32 additive mask of ``site``'s windows (window g of each image uses mask[g]), or None."""
        return None if site.window is None else site.window.mask()

    def float_tensors(self, quantized: Iterable[str]) -> dict[str, Tensor]:
        """``ModelState.floats`` for states at the paths ``quantized``: what the model's state dict holds besides."""
        consumed = {name for path in quantized for name in self.find(path).parameters}
        state = self.model.state_dict()
        return {name: t.detach().float() for name, t in state.items() if name not in consumed}
