"""allocate.rank_search: AIQViT's differentiable search for the rank of each layer's branch.

[P] y = x̂·W0 + Σ_{r∈S} drop_path(softmax(α)_r · branch_r(x)) in every layer of a block; branches learn on one half of
the images, α on the other; the rank is argmax α.  [R] first-order alternation, one branch step per α step, branches
start from the whitened SVD of the weight's rounding error, ranks are multiples of 16 that layer and kernels can use,
and the price of a rank can enter α's loss: cost_weight · Σ_r softmax(α)_r · r·(K + N)/(K·N), the branch's work in units
of the layer's. Deviations: the branch reads x, not x̂; every ``low_rank.kind`` is searched as if it were ``error``; what
is left when candidates are dropped is not scaled up.
"""

from __future__ import annotations

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from .. import lowrank, parallel
from ..models.sites import BlockSite
from ..observers import InputStats
from ..quantizers import SimLinear
from .base import Calibration, Options, Unit, adam, method


class RankSearchOptions(Options):
    """
    Args: candidates: S, before clipping; iterations: α steps per block; batch: images per step; lr_alpha, lr_branch:
    Adam's; drop: chance that a candidate sits a step out; cost_weight: price of a rank, relative to the loss;
    least_iterations: where the recipe's effort leaves fewer, the choice would be noise and the recipe's rank stays.
    """

    candidates: tuple[int, ...] = (0, 16, 32, 64, 96, 160)
    iterations: int = Field(2000, ge=0)
    least_iterations: int = Field(0, ge=0)
    batch: int = Field(24, ge=1)
    lr_alpha: float = Field(0.05, gt=0.0)
    lr_branch: float = Field(1e-3, gt=0.0)
    drop: float = Field(0.1, ge=0.0, lt=1.0)
    cost_weight: float = Field(0.0, ge=0.0)

    @field_validator("candidates")
    @classmethod
    def _sorted(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 0 or max(value) > 1024:
            raise ValueError(f"candidates is {value}, expected ranks in [0, 1024]")
        return tuple(sorted(set(value)))


class RankMixture(nn.Module):
    """Σ_r keep_r·softmax(α)_r · U_r·D_r·x over the candidate ranks of one layer.

    Args: up [N, R], down [R, K]: the largest branch's start; smaller ones start from its leading components.
    """

    def __init__(self, ranks: list[int], up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.ranks = ranks
        self.alpha = nn.Parameter(up.new_zeros(len(ranks), dtype=torch.float32))
        # The candidates beside each other, so that two products compute them all.
        self.up = nn.Parameter(torch.cat([up[:, :r].float() for r in ranks], 1))
        self.down = nn.Parameter(torch.cat([down[:r].float() for r in ranks]))
        owner = torch.tensor([i for i, r in enumerate(ranks) for _ in range(r)], dtype=torch.long, device=up.device)
        self.register_buffer("owner", owner)
        self.keep = torch.ones_like(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        share = (self.alpha.softmax(0) * self.keep)[self.owner]
        return (x @ self.down.T * share) @ self.up.T

    def cost(self, n: int, k: int) -> Tensor:
        """Expected work of the branch in units of the layer's."""
        return (self.alpha.softmax(0) * self.alpha.new_tensor(self.ranks)).sum() * (n + k) / (n * k)

    @property
    def best(self) -> int:
        """argmax α; the smaller rank among equals."""
        return self.ranks[int(self.alpha.argmax())]


def candidates(options: RankSearchOptions, shape: tuple[int, int]) -> list[int]:
    """S clipped to what a layer [N, K] can use."""
    return sorted({lowrank.kernel_rank(r, *shape) for r in options.candidates})


def mixture(linear: SimLinear, stats: InputStats, ranks: list[int]) -> RankMixture:
    """The candidates of one quantized layer."""
    with torch.no_grad():
        lost = (linear.effective_weight() - linear.codes() * linear.quant.scale.unsqueeze(1)).double()
    c = lowrank.damped(stats.second_moment(), 0.01)
    return RankMixture(ranks, *lowrank.whitened(lost, c, ranks[-1]))


@method("allocate", "rank_search")
def rank_search(calibration: Calibration, options: RankSearchOptions) -> None:
    if calibration.recipe.low_rank.kind == "none":
        raise ValueError("allocate.rank_search needs a branch: low_rank.kind is 'none'")
    steps = calibration.iterations(options.iterations)
    if steps < options.least_iterations:
        return
    units = [unit for unit in calibration.sim.sequence if isinstance(unit, BlockSite)]
    for unit, x_ref, x_sim in calibration.units(units):
        target = calibration.run(calibration.reference, unit, x_ref)
        calibration.ranks.update(search(calibration, unit, x_sim, target, options, steps))


def search(
    calibration: Calibration, unit: Unit, x: Tensor, target: Tensor, options: RankSearchOptions, steps: int
) -> dict[str, int]:
    """Layer path -> rank for one block that should map x to ``target``."""
    linears = calibration.sim.linears_of(unit)
    seen = calibration.observations().inputs
    mixtures = {p: mixture(l, seen[p], candidates(options, l.shape)) for p, l in linears.items()}
    module = calibration.sim.model.get_submodule(unit.path).requires_grad_(False)
    alphas = [m.alpha for m in mixtures.values()]
    branches = [p for m in mixtures.values() for p in (m.up, m.down) if p.numel()]
    if not branches:
        return dict.fromkeys(mixtures, 0)
    handles = [
        linear.register_forward_hook(lambda _, inputs, output, m=mixtures[path]: output + m(inputs[0]))
        for path, linear in linears.items()
    ]
    optimizers = (
        adam([{"params": branches, "lr": options.lr_branch}]),
        adam([{"params": alphas, "lr": options.lr_alpha}]),
    )
    generator = calibration.generator(unit.path)
    order = torch.randperm(len(x), generator=generator, device="cpu")
    halves = order.split(-(-len(x) // 2))
    scale = 1.0 / float(target.square().mean())
    for linear in linears.values():
        linear.hold()
    try:
        for _ in range(steps):
            for half, optimizer, learned in zip(halves, optimizers, (branches, alphas)):
                drawn = torch.randperm(len(half), generator=generator, device="cpu")[: options.batch]
                chosen = parallel.share(half[drawn].to(x.device))
                for m in mixtures.values():
                    m.keep = (torch.rand(len(m.ranks), generator=generator, device="cpu") >= options.drop).to(m.alpha)
                with calibration.learning():
                    output = module(x[chosen])
                error = (output - target[chosen]).square().flatten(1).mean(1)
                loss = error.sum() / len(drawn) * scale
                if optimizer is optimizers[1] and options.cost_weight:
                    price = sum(m.cost(*linears[p].shape) for p, m in mixtures.items())
                    loss = loss + options.cost_weight * price / parallel.size()
                optimizer.zero_grad(set_to_none=True)
                loss.backward(inputs=learned)
                parallel.add_gradients(learned)
                optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
        for linear in linears.values():
            linear.held = None
    return {path: m.best for path, m in mixtures.items()}
