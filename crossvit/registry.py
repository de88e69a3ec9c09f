"""Models by name: `create_model`, `list_models`, and one constructor per variant under each of its names."""

from __future__ import annotations

import fnmatch
import os
from typing import Any

from torch import nn

from .data import IMAGENET_MEAN, IMAGENET_STD
from .model import CrossViT
from .variants import VARIANTS, Variant, find_variant
from .weights import Source, fetch, load_weights


def create_model(
    name: str,
    pretrained: bool | Source = False,
    *,
    checkpoint_path: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> CrossViT:
    """A CrossViT under timm's, IBM's or its short name.

    Args:
        name: for example "crossvit_18_240", "crossvit_18_224" or "crossvit_18", which are the same model.
        pretrained: True or "timm" for the released weights from the hub, "ibm" for IBM's release.
        checkpoint_path: a weights file, of timm's or of IBM's names; excludes `pretrained`.
        **kwargs: arguments of CrossViT that replace the variant's own.

    Raises:
        ValueError: there is no such model, no released weights, or the weights do not fit.
        RuntimeError: the weights could not be downloaded.
    """
    return Constructor(find_variant(name))(pretrained, checkpoint_path=checkpoint_path, **kwargs)


def list_models(pattern: str = "*", *, pretrained: bool = False, aliases: bool = False) -> list[str]:
    """Names of the models that match a shell pattern; `pretrained` keeps those with released weights,
    `aliases` adds IBM's and the short names."""
    rows = (row for row in VARIANTS.values() if row.released or not pretrained)
    names = [name for row in rows for name in (row.names if aliases else (row.name,))]
    return [name for name in names if fnmatch.fnmatch(name, pattern)]


# What the released weights are for.
_OF_RELEASED = {"fusion": "cross", "t2t": False, "class_token": True}


class Constructor:
    """Makes models of one variant; what `from crossvit import crossvit_18` gives."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.__name__ = variant.name
        self.__doc__ = f"{variant.name}: see crossvit.create_model for the arguments."

    def __repr__(self) -> str:
        return f"<constructor of {self.variant.name}>"

    def __call__(
        self,
        pretrained: bool | Source = False,
        *,
        checkpoint_path: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> CrossViT:
        if pretrained and checkpoint_path is not None:
            raise ValueError("pretrained and checkpoint_path exclude each other: give one of them")
        row = self.variant
        changed = [name for name, value in _OF_RELEASED.items() if kwargs.get(name) not in (value, None)]
        if pretrained and changed:
            raise ValueError(f"no weights were released for models with another {', '.join(changed)}")
        # Downloaded before the model is built: a failure costs nothing.
        path = fetch(row, "timm" if pretrained is True else pretrained) if pretrained else checkpoint_path
        arguments: dict[str, Any] = {
            "img_size": row.image_sizes[0],
            "img_scale": (1.0, row.image_sizes[1] / row.image_sizes[0]),
            "patch_size": row.patch_sizes,
            "embed_dim": row.widths,
            "depth": ((*row.depth, 0),) * row.encoders,
            "num_heads": (row.heads, row.heads),
            "mlp_ratio": (row.mlp_ratio, row.mlp_ratio, 1),
            "multi_conv": row.three_conv_stem,
        }
        # As with timm, None means: the model's own value.
        arguments.update({key: value for key, value in kwargs.items() if value is not None})
        model = CrossViT(**arguments)
        model.pretrained_cfg = model.default_cfg = _config(model, row)
        if path is not None:
            load_weights(model, path)
        return model


def _config(model: CrossViT, row: Variant) -> dict[str, Any]:
    """What timm's data helpers read of a model."""
    proj = model.patch_embed[0].proj
    released = (model.fusion, model.class_token) == ("cross", True) and not isinstance(proj, nn.Linear)
    stem = ".0" if isinstance(proj, nn.Sequential) else ""
    return {
        "architecture": row.name,
        "num_classes": model.num_classes,
        "input_size": (model.in_chans, *model.img_size),
        "pool_size": None,
        "crop_pct": row.crop,
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "fixed_input_size": not model.dynamic_img_size,
        "first_conv": None
        if isinstance(proj, nn.Linear)
        else tuple(f"patch_embed.{b}.proj{stem}" for b in range(2)),
        "classifier": ("head.0", "head.1"),
        "hf_hub_id": row.timm_hub_id if released else None,
        "license": "apache-2.0",
    }


crossvit_tiny = crossvit_tiny_240 = crossvit_tiny_224 = Constructor(VARIANTS["crossvit_tiny_240"])
crossvit_small = crossvit_small_240 = crossvit_small_224 = Constructor(VARIANTS["crossvit_small_240"])
crossvit_base = crossvit_base_240 = crossvit_base_224 = Constructor(VARIANTS["crossvit_base_240"])
crossvit_9 = crossvit_9_240 = crossvit_9_224 = Constructor(VARIANTS["crossvit_9_240"])
crossvit_15 = crossvit_15_240 = crossvit_15_224 = Constructor(VARIANTS["crossvit_15_240"])
crossvit_18 = crossvit_18_240 = crossvit_18_224 = Constructor(VARIANTS["crossvit_18_240"])
crossvit_9_dagger = crossvit_9_dagger_240 = crossvit_9_dagger_224 = Constructor(
    VARIANTS["crossvit_9_dagger_240"]
)
crossvit_15_dagger = crossvit_15_dagger_240 = crossvit_15_dagger_224 = Constructor(
    VARIANTS["crossvit_15_dagger_240"]
)
crossvit_18_dagger = crossvit_18_dagger_240 = crossvit_18_dagger_224 = Constructor(
    VARIANTS["crossvit_18_dagger_240"]
)
crossvit_15_dagger_408 = crossvit_15_dagger_384 = Constructor(VARIANTS["crossvit_15_dagger_408"])
crossvit_18_dagger_408 = crossvit_18_dagger_384 = Constructor(VARIANTS["crossvit_18_dagger_408"])
crossvit_18_dagger_504 = crossvit_18_dagger_480 = Constructor(VARIANTS["crossvit_18_dagger_504"])
