"""allocate.patchwise: token-wise activation bits at inference; the patches that attention singles out keep their bits.

PMQ (arXiv 2305.06559), all of it reconstructed from the abstract [R]: patch j of block l scores s_j = mean over heads
of A[cls, j] (without a class token, as in Swin's windows, the mean over queries too), decided per image and without any
training. Of each block's patches the best r_l keep the recipe's bits and the others get ``low``; prefix tokens always
keep theirs. A of block l rules the inputs of its proj, fc1 and fc2, and qkv, Q and K of the block after; V keeps its
bits, and so do qkv, Q and K of the first block of a resolution. Scales are per token, where a static form would have
two per site. BitOps are MAC·b_w·b̄ of a linear layer and MAC·b̄² of q·kᵀ, b̄ the mean over tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from vitq_kernels.formats import TokenBits

from ..allocation.costs import FLOAT_BITS, layers_of
from ..allocation.frontier import Component, pareto_frontier
from ..allocation.sensitivity import Metric, distance
from ..models.sites import AttentionSite
from ..quantizers import SimAttention
from .base import Calibration, Options, method

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Budget(Options):
    """Upper limit on the BitOps of the blocks' linear layers and of q·kᵀ, as a fraction of float32's."""

    bitops: float = Field(gt=0.0)


class PatchwiseOptions(Options):
    """
    Args:
        shares: r_l, of each block or of all.
        low: bits of the patches that do not keep theirs.
        rank_by: ``attention``, or a control of equal BitOps: ``random`` and ``inverted`` (the least attended) keep as
            many patches; ``uniform`` gives all patches of a block one width, the whole number of bits that brings the
            BitOps of the blocks so far closest to those of ``attention``.
        budget: choose each r_l among ``candidates`` instead, by the exact frontier of BitOps against Ω: what deciding
            in one block alone does to the quantized model's logits on ``images`` images.
        metric: Ω, ``l2`` relative squared error or ``kl``.
    """

    shares: Share | tuple[Share, ...] = 0.5
    low: int = Field(4, ge=2, le=8)
    rank_by: Literal["attention", "random", "inverted", "uniform"] = "attention"
    budget: Budget | None = None
    candidates: tuple[Share, ...] = Field((0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)
    images: int = Field(64, ge=1)
    metric: Metric = "l2"


@dataclass(frozen=True)
class _Item:
    """Work that depends on the bits of its rows: ``cost`` of their mean, ``own`` where nothing is decided."""

    rows: int
    own: int
    cost: Callable[[Fraction], int]
    floating: int

    def bitops(self, high: int, low: int) -> int:
        """With ``high`` rows that keep their bits."""
        return self.cost(Fraction(high * self.own + (self.rows - high) * min(self.own, low), self.rows))


@dataclass(frozen=True)
class _Decision:
    """One attention and everything whose bits it decides."""

    attention: SimAttention
    site: AttentionSite
    tokens: int
    seed: int
    items: list[_Item] = field(default_factory=list)

    def spec(self, share: float, low: int, rank_by: str) -> TokenBits:
        return TokenBits(share, low, self.site.prefix, self.site.class_token, rank_by, self.seed)

    def bitops(self, spec: TokenBits) -> int:
        high = self.site.prefix + spec.kept(self.tokens - self.site.prefix)
        return sum(item.bitops(high, spec.low) for item in self.items)


@method("allocate", "patchwise")
def patchwise(calibration: Calibration, options: PatchwiseOptions) -> None:
    """Leaves the decision in the attentions and what it costs as ``metrics["token_bits"]``.

    Raises: ValueError for static scales or level tables, another number of shares than of attentions, or a budget that
        nothing fits.
    """
    recipe = calibration.recipe
    for name, found, expected in (
        ("activations", recipe.activations, "dynamic"),
        ("operands", recipe.operands, "dynamic"),
        ("activation_levels", recipe.activation_levels, "uniform"),
    ):
        if found != expected:
            raise ValueError(f"{name} is {found!r}, expected {expected!r} for allocate.patchwise")
    decisions, fixed = _decisions(calibration)
    floating = sum(item.floating for d in decisions for item in d.items) + sum(item.floating for item in fixed)
    constant = sum(item.bitops(item.rows, 8) for item in fixed)
    rank_by = "attention" if options.rank_by == "uniform" else options.rank_by
    shares = options.shares if isinstance(options.shares, tuple) else (options.shares,) * len(decisions)
    if len(shares) != len(decisions):
        raise ValueError(f"shares has {len(shares)} numbers, expected one for each of {len(decisions)} attentions")
    record: dict[str, Any] = {"rank_by": options.rank_by}
    if options.budget is not None:
        offered = [[d.spec(share, options.low, rank_by) for share in options.candidates] for d in decisions]
        shares, record["points"] = _choose(calibration, options, decisions, offered, constant, floating)
    specs = [d.spec(share, options.low, rank_by) for d, share in zip(decisions, shares)]
    if options.rank_by == "uniform":
        specs = _uniform(decisions, specs)
    for d, spec in zip(decisions, specs):
        d.attention.token_bits = spec
    spent = constant + sum(d.bitops(spec) for d, spec in zip(decisions, specs))
    own = constant + sum(d.bitops(d.spec(1.0, 8, rank_by)) for d in decisions)
    record |= {"bitops": spent / floating, "bitops_undecided": own / floating}
    record["blocks"] = {d.site.path: {"share": spec.share, "low": spec.low} for d, spec in zip(decisions, specs)}
    calibration.metrics["token_bits"] = record


def _decisions(calibration: Calibration) -> tuple[list[_Decision], list[_Item]]:
    """Every attention with what it rules, and the work of the blocks that none does."""
    sim = calibration.sim
    blocks = [block for block in sim.family.blocks() if block.attention is not None]
    merged = calibration.recipe.low_rank.kind == "merged"
    ranks = {site.path: 0 if merged else calibration.rank(site.path) for block in blocks for site in block.linears}
    layers = layers_of(sim, calibration.images[:1], ranks)

    def product(path: str) -> _Item:
        layer, linear = layers[path], sim.linears[path]
        weight_bits = linear.quant.spec.bits
        cost = lambda bits: layer.bitops(weight_bits, bits)  # noqa: E731
        return _Item(layer.rows, linear.act.spec.bits, cost, layer.float_bitops)

    decisions: list[_Decision] = []
    fixed: list[_Item] = []
    previous = None
    for block in blocks:
        site, parent = block.attention, block.path.rpartition(".")[0]
        rows, window = layers[site.qkv.path].rows, site.window
        if window is not None and window.dynamic:
            raise ValueError(f"windows of {site.path!r} are laid out for each image size, expected those of one size")
        keys = rows if window is None else window.tokens
        macs, own = rows * keys * site.heads * site.head_dim, sim.attentions[site.path].operands.spec.bits
        scores = _Item(rows, own, lambda bits, macs=macs: int(macs * bits**2), macs * FLOAT_BITS**2)
        entering = fixed if previous != parent else decisions[-1].items
        entering += [product(site.qkv.path), scores]
        tokens = rows if window is None else window.resolution[0] * window.resolution[1]
        seed = int(torch.randint(1 << 31, (), generator=calibration.generator(site.path), device="cpu"))
        decision = _Decision(sim.attentions[site.path], site, tokens, seed)
        ruled = {site.proj.path} | ({block.mlp.fc1.path, block.mlp.fc2.path} if block.mlp is not None else set())
        for linear in block.linears:
            if linear.path != site.qkv.path:
                (decision.items if linear.path in ruled else fixed).append(product(linear.path))
        decisions.append(decision)
        previous = parent
    return decisions, fixed


def _choose(
    calibration: Calibration,
    options: PatchwiseOptions,
    decisions: list[_Decision],
    offered: list[list[TokenBits]],
    constant: int,
    floating: int,
) -> tuple[list[float], list[dict[str, Any]]]:
    """The shares that the budget buys, and the points of the frontier by rising cost."""
    parts = calibration.batches(calibration.images[: options.images])

    def logits() -> Tensor:
        with torch.no_grad():
            return torch.cat([calibration.sim(part) for part in parts])

    undecided = logits()
    components = []
    for index, (decision, specs) in enumerate(zip(decisions, offered)):
        calibration.progress(calibration.step, index, len(decisions))
        errors = []
        for decision.attention.token_bits in specs:
            errors.append(distance(undecided, logits(), options.metric))
        decision.attention.token_bits = None
        costs = tuple((decision.bitops(spec),) for spec in specs)
        components.append(Component(decision.site.path, tuple(errors), costs))
    frontier = pareto_frontier(components)
    limit = int(Fraction(str(options.budget.bitops)) * floating) - constant
    try:
        picked = frontier.pick([limit])
    except ValueError as error:
        least = (int(frontier.costs.min()) + constant) / floating
        raise ValueError(f"budget is bitops={options.budget.bitops}, expected at least {least:.4g}") from error
    shares = [[options.candidates[j] for j in chosen] for chosen in frontier.chosen]
    points = [
        {"error": float(error), "bitops": (int(cost[0]) + constant) / floating, "shares": own}
        for error, cost, own in zip(frontier.errors, frontier.costs, shares)
    ]
    return shares[picked], points


def _uniform(decisions: list[_Decision], specs: list[TokenBits]) -> list[TokenBits]:
    """All patches of each block at one width: see ``rank_by``."""
    out = []
    wanted = spent = 0
    for decision, spec in zip(decisions, specs):
        wanted += decision.bitops(spec)
        widths = [decision.spec(0.0, bits, "attention") for bits in range(2, 9)]
        out.append(min(widths, key=lambda s: abs(spent + decision.bitops(s) - wanted)))
        spent += decision.bitops(out[-1])
    return out
