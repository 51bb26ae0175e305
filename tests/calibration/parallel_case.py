"""One process of test_parallel.py: a small calibration that learns everything, its result in a file of its own."""

import sys
from pathlib import Path

import minmax
import torch
from vitq import parallel
from vitq.calibrate import calibrate
from vitq.recipes import parse

RECIPE = {
    "name": "parallel",
    "calibration": {"batch": 4},
    "bits": {"weights": 8, "activations": 8},
    "low_rank": {"kind": "error", "rank": 16},
    "initialise": ["scales"],
    "allocate": [{"method": "rank_search", "iterations": 3, "batch": 4, "candidates": [0, 16], "cost_weight": 0.1}],
    "compensate": ["closed_form"],
    "reconstruct": [
        {"method": "blocks", "iterations": 12, "batch": 5, "lr_rounding": 0.02, "mixing": 0.5, "mixing_unit": "element"}
    ],
}


def run(folder: Path, work: Path | None = None) -> dict:
    model, seen, share = minmax.vit(), [0], parallel.share

    def counted(chosen: torch.Tensor) -> torch.Tensor:
        mine = share(chosen)
        seen[0] += 0 if chosen.is_floating_point() else len(mine)
        return mine

    parallel.share = counted
    with parallel.launched() as device:
        done = calibrate(model, minmax.images(model, 12), parse(RECIPE), device=device, work_dir=work)
        rank = parallel.rank()
    parallel.share = share
    tensors = {name: t for name, t in done.sim.state_dict().items() if t is not None}
    result = {"seen": seen[0], "tensors": tensors, "logits": done.sim(minmax.images(model, 4, seed=7)).detach()}
    torch.save(result, folder / f"{rank}.pt")
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    run(folder, folder / "work")
