"""What is timed: the layers of ViT-S, B and L at the tokens of batches 1, 8, 32 and 64, and tiny ones for a dry run."""

from __future__ import annotations

WIDTHS = {"ViT-S": 384, "ViT-B": 768, "ViT-L": 1024}
TOKENS = (197, 1576, 6304, 12608)
RANK = 32
PRECISIONS = ("float32", "bfloat16")
"""Of what calibration learns with."""

MODELS = {
    "ViT-B": "vit_base_patch16_224",
    "ViT-L": "vit_large_patch16_224",
    "DeiT-S": "deit_small_patch16_224",
    "Swin-B": "swin_base_patch4_window7_224",
    "ViT-S": "vit_small_patch16_224",
}
BATCHES = (64, 1, 8, 256)
"""Those with goals first: what there is no time for is left out from the end."""

TINY = {
    "ViT tiny": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "depth": 1, "embed_dim": 64, "num_heads": 1, "num_classes": 8},
    ),
}


def layers(width: int) -> list[tuple[int, int]]:
    """(K, N) of qkv, proj, fc1, fc2."""
    return [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]


def products(dry: bool) -> list[tuple[int, int, int]]:
    """(M, K, N)."""
    if dry:
        return [(17, 64, 48), (9, 16, 64), (9, 48, 48)]
    return [(m, k, n) for width in WIDTHS.values() for m in TOKENS for k, n in layers(width)]


def rows(dry: bool) -> list[tuple[int, int]]:
    """(M, K) of quantizing passes."""
    return [(5, 48)] if dry else [(m, k) for k in (384, 768, 1024, 3072) for m in TOKENS]


def attentions(dry: bool) -> list[tuple[int, int, int, int, int]]:
    """(B, H, N, d, window masks; 0: none, and no relative bias)."""
    if dry:
        return [(2, 1, 9, 16, 2)]
    return [
        (4096, 4, 49, 32, 64),  # Swin-B's first stage at batch 64
        (1, 12, 197, 64, 0),
        (8, 12, 197, 64, 0),
        (64, 12, 197, 64, 0),
        (16, 16, 577, 64, 0),
        (1, 12, 1024, 64, 0),
        (16, 12, 1024, 64, 0),
    ]


def learned(dry: bool) -> dict[str, list[tuple[int, ...]]]:
    """What a ViT-S block learns with 24 and 64 images at a time: (M, K) of quantizers, (B, H, N) of softmaxes."""
    if dry:
        return {"quantizer": [(5, 48)], "softmax": [(1, 2, 9)]}
    return {
        "quantizer": [(197 * b, k) for b in (24, 64) for k in (384, 1536)],
        "softmax": [(24, 6, 197), (64, 6, 197)],
    }
