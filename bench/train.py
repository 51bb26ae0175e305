"""Train a model of the bench: `python -m bench.train vit --out FILE.safetensors`.

AdamW, linear warm-up and cosine decay, label smoothing, stochastic depth. The last weights are stored, as float16;
accuracy on the test splits is only reported. Interrupted, the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from vitq.data import contours, digits, load_data, primitives
from vitq.data.distort import TRAIN, distort
from vitq.evaluate import predict, top1
from vitq.models import state_data

from bench.models import CLOUDS, MODELS, Trained

LABEL_SMOOTHING = 0.1
#: Nuisances of the contours grow up to this share of the training, and up to this strength: the tests' is 1.
RAMP, PEAK = 0.4, 1.2
EVERY = 100


def digits_batches(seed: int, batch: int, start: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (images [batch, 3, 32, 32] in [0, 1], labels) of the digits, distorted anew in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = digits.images("train", torch.arange(digits.COUNTS["train"]))

    def epochs() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            images = distort(pixels, TRAIN, generator)
            order = torch.randperm(len(labels), generator=generator)
            for part in order[: len(order) // batch * batch].view(-1, batch):
                yield images[part], labels[part]

    return islice(epochs(), start, steps)


def contours_batches(seed: int, batch: int, start: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the contours, every image new; their nuisances grow from nothing, which saves most of the time.

    Args: steps: length of the training; nuisances are at their strongest after `RAMP` of it.
    """
    for step in range(start, steps):
        index = torch.arange(batch) + ((seed << 24) + batch * step)
        yield contours.images("train", index, contours.CLEAN.times(PEAK * min(1.0, step / (RAMP * steps))))


def clouds_batches(draw: Callable, seed: int, batch: int, start: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `primitives`, every cloud new, their nuisances growing as those of the contours."""
    for step in range(start, steps):
        index = torch.arange(batch) + ((seed << 24) + batch * step)
        yield draw("train", index, primitives.strengthened(PEAK * min(1.0, step / (RAMP * steps))))


STREAMS = {
    "digits": digits_batches,
    "contours": contours_batches,
    "clouds": functools.partial(clouds_batches, primitives.classes),
    "parts": functools.partial(clouds_batches, primitives.objects),
}


def fit(trained: Trained, seed: int, checkpoint: Path) -> nn.Module:
    """A float32 model in evaluation mode; the same seed and thread count give the same weights.

    Args: checkpoint: file that keeps the progress.
    """
    torch.manual_seed(seed)
    model = timm.create_model(trained.source.name, drop_path_rate=trained.drop_path, **trained.source.kwargs).train()
    # As is customary, biases, norms and embeddings do not decay.
    free = ("_token", "_embed", "_pos", "_bias_table")
    decay = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith(free)]
    rest = [p for n, p in model.named_parameters() if p.ndim <= 1 or n.endswith(free)]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=trained.learning_rate,
        fused=True,
    )
    steps = trained.images // trained.batch
    warmup = max(1, steps // 18)

    def rate(step: int) -> float:
        done = (step - warmup) / (steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * done)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    first = 0
    if checkpoint.exists():
        progress = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(progress[name])
        torch.set_rng_state(progress["random"])
        first = progress["step"]
    config = state_data(model)
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) if config[name] else None for name in ("mean", "std"))
    total, right, seen, start = 0.0, 0, 0, time.perf_counter()
    for step, (images, labels) in enumerate(
        STREAMS[trained.stream or trained.data](seed, trained.batch, first, steps), first + 1
    ):
        logits = model(images if mean is None else (images - mean) / std).flatten(0, -2)
        labels = labels.flatten()
        loss = F.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total, seen = total + loss.item(), seen + labels.numel()
        right += int((logits.argmax(1) == labels).sum())
        if step % EVERY == 0 or step == steps:
            n = (step - 1) % EVERY + 1
            print(f"step {step}/{steps}  loss {total / n:.4f}  top-1 {100 * right / seen:.1f} %  "
                  f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
            total, right, seen = 0.0, 0, 0
            states = {name: part.state_dict() for name, part in parts.items()}
            partial = checkpoint.with_suffix(".partial")
            torch.save({**states, "random": torch.get_rng_state(), "step": step}, partial)
            os.replace(partial, checkpoint)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=MODELS | CLOUDS)
    parser.add_argument("--out", type=Path, required=True, help="weights file to write; its progress lies beside it")
    parser.add_argument("--images", type=int, help="train on so many (default: as published)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trained = (MODELS | CLOUDS)[options.name]
    trained = replace(trained, images=options.images or trained.images)
    out = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_suffix(".progress")
    model = fit(trained, options.seed, checkpoint)
    weights = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    command = f"python -m bench.train {options.name} --seed {options.seed} --images {trained.images}"
    partial = out.with_suffix(".partial")
    save_file(weights, partial, metadata={"model": trained.source.name, "command": command})
    os.replace(partial, out)
    checkpoint.unlink()
    model.load_state_dict(weights)
    scores = {split: top1(*predict(model, load_data(trained.data, split, model))) for split in ("test", "hard")}
    size = out.stat().st_size / 1e6
    print(f"{out}: {size:.2f} MB, as stored: " + ", ".join(f"{k} {v:.2f} %" for k, v in scores.items()))


if __name__ == "__main__":
    main()
