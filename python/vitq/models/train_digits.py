"""Train the shipped digits transformer: `python -m vitq.models.train_digits --out FILE.safetensors`.

AdamW, linear warm-up and cosine decay, label smoothing, stochastic depth, and the `TRAIN` distortion drawn
anew for every image of every epoch. The last weights are stored, as float16; test accuracy is only reported.
"""

import argparse
import math
import os
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from vitq.data.digits import MEAN, STD, TRAIN, load_digits, training_pixels
from vitq.data.distort import distort

from .digits_vit import NAME


@torch.no_grad()
def top1(model: nn.Module, split: str, batch_size: int = 256) -> float:
    """Percentage of a digits split that `model` labels correctly."""
    images, labels = load_digits(split).tensors
    predicted = torch.cat([model(batch).argmax(1) for batch in images.split(batch_size)])
    return 100 * (predicted == labels).double().mean().item()


def train(epochs: int, batch_size: int, learning_rate: float, seed: int) -> nn.Module:
    """A float32 model in evaluation mode; the same seed and thread count give the same weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = timm.create_model(NAME, drop_path_rate=0.1).train()
    # As is customary, biases, norms and embeddings do not decay.
    decay = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith(("_token", "_embed"))]
    rest = [p for n, p in model.named_parameters() if p.ndim <= 1 or n.endswith(("_token", "_embed"))]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=learning_rate
    )
    pixels, labels = training_pixels()
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (MEAN, STD))
    per_epoch = len(labels) // batch_size
    steps = epochs * per_epoch
    warmup = max(1, steps // 18)

    def rate(step: int) -> float:
        done = (step - warmup) / (steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * done)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start = time.perf_counter()
    for epoch in range(epochs):
        images = (distort(pixels, TRAIN, generator) - mean) / std
        order = torch.randperm(len(labels), generator=generator)[: per_epoch * batch_size]
        total = 0.0
        for batch in order.view(per_epoch, batch_size):
            loss = F.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        elapsed = time.perf_counter() - start
        print(f"epoch {epoch + 1}/{epochs}  loss {total / per_epoch:.4f}  {elapsed:.0f} s", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="weights file to write")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = train(options.epochs, options.batch_size, options.learning_rate, options.seed)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    partial = options.out.with_suffix(".partial")
    origin = {"model": NAME, "seed": str(options.seed), "epochs": str(options.epochs)}
    save_file(weights, partial, metadata=origin)
    os.replace(partial, options.out)
    model.load_state_dict(weights)
    print(
        f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB, as stored: "
        + ", ".join(f"{split} {top1(model, split):.2f} %" for split in ("train", "test", "hard"))
    )


if __name__ == "__main__":
    main()
