"""The small vision transformer that ships with the package, registered with timm."""

from pathlib import Path

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from vitq.data.bundled import MEAN, SIZE, STD

NAME = "vit_digits_patch4_32"
WEIGHTS = Path(__file__).parents[1] / "assets" / f"{NAME}.safetensors"

default_cfgs = generate_default_cfgs(
    {
        NAME: {
            "file": str(WEIGHTS),
            "num_classes": 10,
            "input_size": (3, SIZE, SIZE),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": MEAN,
            "std": STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def vit_digits_patch4_32(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """ViT for 32x32 digits: 64 patches and a class token, width 192, 6 blocks, 3 heads, MLP ratio 2.

    DeiT-Tiny's width and head size at half its depth and MLP, 1.81 M parameters: 3.6 MB as stored float16.

    Args:
        pretrained: load the shipped weights (see `bench.train`), converted to float32.
        kwargs: overrides of `timm.models.vision_transformer.VisionTransformer`'s arguments.
    Returns:
        Model of images [N, 3, 32, 32] normalised by mean and std 0.5, giving logits [N, 10].
    """
    arguments = {"img_size": SIZE, "patch_size": 4}
    arguments |= {"embed_dim": 192, "depth": 6, "num_heads": 3, "mlp_ratio": 2}
    return build_model_with_cfg(
        VisionTransformer,
        NAME,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **(arguments | kwargs),
    )
