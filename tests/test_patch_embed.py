"""Patch embedding: values at odd sizes on every instruction set, resizing, pixels as bytes, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from crossvit_kernels import native, patch_embed
from tests.by_definition import normal, patch_inputs, patch_oracle
from tests.contract import STORED, check_values, every_isa, needs_module
from tests.operations import leaves, relative_error

pytestmark = needs_module

# image [B, in, height, width], patch, C, size it is resized to
SIZES = (
    ((1, 1, 1, 1), 1, 1, None),
    ((2, 3, 8, 8), 4, 3, None),
    ((2, 3, 13, 17), 4, 17, None),  # with a remainder
    ((1, 3, 12, 40), 12, 33, None),
    ((2, 3, 20, 20), 4, 65, (16, 16)),
    ((1, 3, 17, 9), 3, 7, (31, 40)),  # larger, not square, with a remainder
    ((2, 1, 9, 23), 4, 5, (8, 8)),
    ((1, 4, 5, 1), 2, 9, (6, 7)),  # one column
    ((1, 3, 48, 48), 16, 448, (33, 47)),
    ((3, 5, 28, 42), 14, 13, (28, 42)),  # the size that it has
    ((1, 3, 60, 60), 12, 96, (56, 56)),
)


def drawn(case, dtype):
    shape, patch, channels, size = case
    height, width = size or shape[2:]
    tensors = patch_inputs(shape, patch, channels, (height // patch, width // patch))
    return [x.to(dtype) for x in tensors], size


@every_isa
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_odd_sizes(isa, dtype):
    with native.use_isa(isa):
        for case in SIZES:
            tensors, size = drawn(case, dtype)
            exact = patch_oracle([x.double() for x in tensors], size)
            got = patch_embed(*tensors, size=size, backend="cpu")
            check_values(got, patch_oracle(tensors, size), exact, case)


@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_exact_in_float64(case, backend):
    tensors, size = drawn(case, torch.float64)
    assert (
        relative_error(patch_embed(*tensors, size=size, backend=backend), patch_oracle(tensors, size)) < 1e-14
    )


def test_against_timm():
    """Its stem on an image that it resizes as its model does."""
    from timm.models.crossvit import PatchEmbed

    theirs = PatchEmbed(img_size=48, patch_size=16, embed_dim=24)
    image, position, cls = torch.randn(2, 3, 60, 60), torch.randn(1, 10, 24), torch.randn(1, 1, 24)
    with torch.no_grad():
        resized = F.interpolate(image, size=(48, 48), mode="bicubic", align_corners=False)
        want = torch.cat((cls.expand(2, -1, -1), theirs(resized)), 1) + position
        proj = theirs.proj
        got = patch_embed(image, proj.weight, proj.bias, position, cls, size=(48, 48), backend="cpu")
    assert relative_error(got, want) < 1e-5


def test_shapes_of_position_and_cls_token_and_no_bias():
    tensors, _ = drawn(SIZES[2], torch.float32)
    image, weight, _, position, cls = tensors
    want = patch_oracle([image, weight, None, position, cls])
    for p in (position, position[0], position.clone()):
        for c in (cls, cls.flatten()):
            assert relative_error(patch_embed(image, weight, None, p, c, backend="cpu"), want) < 1e-5


@every_isa
@pytest.mark.parametrize("size", [None, (12, 18)])
def test_images_in_any_layout(isa, size):
    """Channels last, cropped, flipped over the diagonal, every second pixel."""
    tensors, _ = drawn(((2, 3, 26, 34), 4, 9, size or (12, 16)), torch.float32)
    image, *others = tensors
    for view in (
        image[..., :13, :17].contiguous(memory_format=torch.channels_last),
        image[..., 5:18, 3:20],
        image[..., ::2, ::2],
        image[..., :17, :13].transpose(2, 3),
        image[:1, :, :13, :17].expand(2, -1, -1, -1),
    ):
        with native.use_isa(isa):
            got, want = (patch_embed(x, *others, size=size, backend="cpu") for x in (view, view.contiguous()))
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("size", [None, (12, 18)])
def test_pixels_as_bytes(backend, dtype, size):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    tensors, _ = drawn(((2, 3, 13, 17), 4, 9, size), dtype)
    pixels = torch.randint(0, 256, (2, 3, 13, 17), dtype=torch.uint8)
    others = [x.double() for x in tensors[1:]]
    per_channel = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (mean, std))
    middle, spread = per_channel
    want = patch_oracle([(pixels.double() / 255 - middle) / spread, *others], size)
    got = patch_embed(pixels, *tensors[1:], size=size, mean=mean, std=std, backend=backend)
    assert got.dtype == dtype
    assert relative_error(got, want) < max(1e-6, 4 * torch.finfo(dtype).eps)
    plain = patch_embed(pixels, *tensors[1:], size=size, backend=backend)
    want = patch_oracle([pixels.double() / 255, *others], size)
    assert relative_error(plain, want) < max(1e-6, 4 * torch.finfo(dtype).eps)


def test_gradients_of_the_weights_from_bytes():
    pixels = torch.randint(0, 256, (2, 3, 13, 17), dtype=torch.uint8)
    found = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        others = leaves(drawn(SIZES[2], torch.float32)[0][1:])
        y = patch_embed(pixels, *others, mean=[0.5] * 3, std=[0.2] * 3, backend=backend)
        found.append(torch.autograd.grad(y.square().sum(), others))
    for mine, other in zip(*found, strict=True):
        assert relative_error(mine, other) < 1e-5


@every_isa
def test_nan_stays_in_its_image_and_patch(isa):
    for dtype in STORED:
        tensors, _ = drawn(((3, 3, 12, 16), 4, 33, None), dtype)
        with native.use_isa(isa):
            want = patch_embed(*tensors, backend="cpu")
            tensors[0][1, 2, 5, 9] = float("nan")
            got = patch_embed(*tensors, backend="cpu")
        at = 1 + 1 * 4 + 2  # behind the CLS token: row 1, column 2 of 4
        assert got[1, at].isnan().all()
        got[1, at] = want[1, at]
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    tensors, size = drawn(((5, 3, 60, 60), 12, 96, (56, 56)), dtype)
    before, want = torch.get_num_threads(), None
    try:
        for threads in range(1, 9):
            torch.set_num_threads(threads)
            got = patch_embed(*tensors, size=size, backend="cpu")
            want = got if want is None else want
            assert torch.equal(got, want), threads
    finally:
        torch.set_num_threads(before)


NAMES = ("image", "weight", "bias", "position", "cls_token")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"image": normal(3, 13, 17)}, ValueError, r"image must have shape \[B, in, .* with in = 3"),
        ({"image": normal(2, 13, 17, 3)}, ValueError, r"got \[2, 13, 17, 3\]: add the dimension of"),
        ({"weight": normal(9, 48)}, ValueError, r"weight must have shape \[C, in, p, p\] .* got \[9, 48\]"),
        ({"weight": normal(9, 3, 4, 5)}, ValueError, "with square patches"),
        ({"bias": normal(3)}, ValueError, r"bias must have shape \[C\] = \[9\], got \[3\]"),
        ({"position": normal(12, 9)}, ValueError, r"position must have .* = \[13, 9\] .*: resize it"),
        ({"size": (16, 16)}, ValueError, r"= \[17, 9\] \(of the patches in 16 x 16 pixels"),
        ({"size": (3, 16)}, ValueError, r"size, got \(3, 16\), must hold at least one patch"),
        ({"size": (16,)}, ValueError, r"size must be \(height, width\) or None"),
        ({"image": normal(2, 3, 13, 3)}, ValueError, r"image, got \[2, 3, 13, 3\], must hold"),
        ({"cls_token": normal(2, 1, 9)}, ValueError, r"cls_token must have .* = \[9\] or \[1, 1, 9\]"),
        ({"mean": (0.5,) * 3}, ValueError, "mean and std must be given together"),
        ({"mean": (0.5,) * 3, "std": (1.0,) * 3}, ValueError, "mean and std are for uint8 images, got"),
        ({"weight": normal(9, 3, 4, 4).float()}, TypeError, "weight must have the dtype of image"),
        ({"image": torch.zeros(2, 3, 13, 17).int()}, TypeError, "image must be a floating-point tensor"),
        ({"position": normal(13, 9).to("meta")}, RuntimeError, "position is on meta, image on cpu"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_words(changes, error, words):
    arguments = {**dict(zip(NAMES, patch_inputs(), strict=True)), **changes}
    with pytest.raises(error, match=words):
        patch_embed(**arguments)


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ((0.5,), (0.2,) * 3, "mean must have a number for each of the 3 channels, got 1"),
        ((0.5,) * 3, (0.2, 0.0, 0.2), "std must not be zero"),
    ],
)
def test_bad_means_are_refused(mean, std, words):
    _, *others = patch_inputs()
    pixels = torch.zeros(2, 3, 13, 17, dtype=torch.uint8)
    with pytest.raises(ValueError, match=words):
        patch_embed(pixels, *others, mean=mean, std=std)
