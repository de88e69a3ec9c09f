"""Preprocessing, bit for bit timm's; the photograph of the examples is the one its page describes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config, resolve_model_data_config

from crossvit import VARIANTS, create_model
from crossvit.data import imagenet_labels, open_image, preprocess

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["crossvit_18_240", "crossvit_15_dagger_408"])
@pytest.mark.parametrize("size", [(451, 300), (300, 451), (240, 240), (1000, 411), (100, 90)])
def test_preprocessing_is_timms(name, size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    config = timm.get_pretrained_cfg(name).to_dict()
    config = resolve_data_config(pretrained_cfg=config)
    assert resolve_model_data_config(create_model(name, device="meta")) == config
    want = create_transform(**config, is_training=False)(image)
    assert torch.equal(preprocess(image, VARIANTS[name])[0], want)


def test_the_photograph():
    page = (EXAMPLES / "README.md").read_text()
    digest = hashlib.sha256((EXAMPLES / "cat.png").read_bytes()).hexdigest()
    assert re.search(r"`([0-9a-f]{64})`", page)[1] == digest
    assert "CC0" in page
    assert open_image(EXAMPLES / "cat.png").size == (451, 300)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_any_mode_become_rgb(mode, tmp_path):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (20, 10)).save(path)
    assert open_image(path).mode == "RGB"


def test_photographs_are_turned_upright(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # taken with the camera on its side
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 20)


def test_a_file_that_is_no_image_is_refused(tmp_path):
    (tmp_path / "x.png").write_text("text")
    with pytest.raises(ValueError, match=r"x.png is not an image that Pillow can read"):
        open_image(tmp_path / "x.png")
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "none.png")


def test_labels():
    labels = imagenet_labels()
    assert len(labels) == 1000
    assert "tabby" in labels[281]
