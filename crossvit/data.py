"""Preprocessing as the released models were evaluated, and the class names of ImageNet-1k."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ._timm import import_timm
from .variants import Variant

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def open_image(path: str | os.PathLike[str]) -> Image:
    """An image file as RGB.

    Raises:
        ImportError: Pillow is not installed.
        FileNotFoundError, ValueError: there is no such file, or it is no image.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'crossvit-kernels[demo]'") from error
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that Pillow can read") from error


def crop_for(image: Image, size: int, crop: float) -> Image:
    """The part of the image that the model sees: the shorter side to size / crop (bicubic), centre crop."""
    from PIL import Image as PIL

    shorter = math.floor(size / crop)
    width, height = image.size
    if width <= height:
        resized = (shorter, int(shorter * height / width))
    else:
        resized = (int(shorter * width / height), shorter)
    image = image.resize(resized, PIL.Resampling.BICUBIC)
    left, top = round((resized[0] - size) / 2.0), round((resized[1] - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


def normalise(image: Image) -> Tensor:
    """RGB image -> float32 tensor [1, 3, height, width], ImageNet's mean and deviation taken out."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((pixels - mean) / std).unsqueeze(0)


def preprocess(image: Image, variant: Variant) -> Tensor:
    """Image -> [1, 3, size, size] as `variant` was evaluated."""
    return normalise(crop_for(image, variant.image_sizes[0], variant.crop))


def imagenet_labels() -> list[str] | None:
    """The 1000 class names, which come with timm; None without it."""
    try:
        import_timm()
    except ImportError:
        return None
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.index_to_description(index) for index in range(1000)]
