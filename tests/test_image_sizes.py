"""Image sizes at construction, by set_input_size and per forward; what each branch sees; refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from crossvit import create_model
from tests.operations import relative_error

# image -> (rows, columns) of S and of L: S floors at 12 pixels; L is 14/15 of the image, to the nearest 16.
GRIDS = {
    (240, 240): [(20, 20), (14, 14)],
    (256, 128): [(21, 10), (15, 7)],
    (192, 640): [(16, 53), (11, 37)],
    (224, 224): [(18, 18), (13, 13)],
    (256, 256): [(21, 21), (15, 15)],
    (384, 384): [(32, 32), (22, 22)],
    (480, 480): [(40, 40), (28, 28)],
    (60, 12): [(5, 1), (4, 1)],  # L's 3.5 patches are rounded up
}
sizes = pytest.mark.parametrize("size", GRIDS, ids=lambda size: f"{size[0]}x{size[1]}")


@sizes
@pytest.mark.parametrize("name", ["crossvit_tiny", "crossvit_9_dagger"])
def test_every_way_to_a_size_gives_the_same(size, name):
    x = torch.randn(1, 3, *size)
    base = create_model(name).eval()
    state = base.state_dict()
    dynamic = create_model(name, dynamic_img_size=True).eval()
    dynamic.load_state_dict(state)
    built = create_model(name, img_size=size).eval()
    base.set_input_size(size)
    built.load_state_dict(base.state_dict(), strict=True)
    assert base.grid_sizes(size) == GRIDS[size]
    with torch.no_grad():
        want = base(x)
        assert relative_error(built(x), want) == 0
        assert relative_error(dynamic(x), want) < 1e-5
        features = base.forward_intermediates(x, intermediates_only=True)
    assert [tuple(f.shape[-2:]) for f in features] == [GRIDS[size][0]] * 3 + [GRIDS[size][1]] * 3


@sizes
def test_what_the_branches_see(size):
    """S takes the image as it is, its remainder cut; L its nearest multiple of 16, by bicubic resizing."""
    model = create_model("crossvit_tiny", img_size=size).eval()
    x = torch.randn(1, 3, *size)
    (rows, columns), large = GRIDS[size]
    seen = []
    for embed in model.patch_embed:
        embed.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(x)
    assert torch.equal(seen[0][0], x)
    cut = x[..., : rows * 12, : columns * 12]
    by_hand = F.conv2d(cut, model.patch_embed[0].proj.weight, model.patch_embed[0].proj.bias, stride=12)
    assert relative_error(seen[0][1], by_hand.flatten(2).transpose(1, 2)) < 1e-5
    resized = F.interpolate(x, (large[0] * 16, large[1] * 16), mode="bicubic", align_corners=False)
    assert torch.equal(seen[1][0], resized if resized.shape != x.shape else x)


def test_the_dagger_stem_does_not_see_the_remainder():
    model = create_model("crossvit_9_dagger", img_size=250).eval()
    x = torch.randn(1, 3, 250, 250)
    poisoned = x.clone()
    poisoned[..., 240:, :] = float("nan")
    poisoned[..., 240:] = float("nan")
    with torch.no_grad():
        assert torch.equal(model.patch_embed[0](x), model.patch_embed[0](poisoned))


def test_position_embeddings_are_resized_as_timm_does():
    from timm.layers import resample_abs_pos_embed

    model = create_model("crossvit_tiny")
    want = resample_abs_pos_embed(model.pos_embed_0.detach(), (32, 17), num_prefix_tokens=1)
    model.set_input_size((384, 209))
    assert relative_error(model.pos_embed_0.detach(), want) < 1e-6


def test_a_size_stays_after_a_round_trip_of_names():
    model = create_model("crossvit_tiny")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.pos_embed_1.requires_grad_(False)
    model.set_input_size(256)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {**before, "pos_embed_1": False}
    assert model.img_size == (256, 256)
    assert model.img_size_scaled == [(256, 256), (240, 240)]
    assert [embed.num_patches for embed in model.patch_embed] == [441, 225]


def test_position_embeddings_of_low_precision_are_resized_in_float32():
    model = create_model("crossvit_tiny")
    with torch.no_grad():
        model.pos_embed_0.mul_(100)
    low = create_model("crossvit_tiny").bfloat16()
    low.load_state_dict(model.state_dict())
    exact = create_model("crossvit_tiny")
    exact.load_state_dict(low.float().state_dict())
    low.bfloat16().set_input_size(256)
    exact.set_input_size(256)
    assert low.pos_embed_0.dtype == torch.bfloat16
    assert torch.equal(low.pos_embed_0, exact.pos_embed_0.bfloat16())


def test_a_crop_instead_of_resizing_is_central_on_both_axes():
    model = create_model("crossvit_tiny", img_size=(240, 480), crop_scale=True)
    x = torch.randn(1, 3, 240, 480)
    assert torch.equal(model._scale_image(x, (224, 448)), x[..., 8:232, 16:464])


def test_both_branches_need_a_whole_patch():
    with pytest.raises(ValueError, match="smaller than one patch of 16 pixels"):
        create_model("crossvit_tiny", img_size=12, img_scale=(1.0, 1.0))


@pytest.mark.parametrize(
    ("build", "size", "words"),
    [
        (
            {},
            (250, 240),
            "built for images of 240x240, got 250x240: .* are 240x240 and 252x240",
        ),
        ({}, (480, 480), "call set_input_size, or build the model with dynamic_img_size=True"),
        ({"dynamic_img_size": True}, (8, 30), "8x30 is smaller than one patch .* are 12x24 and 12x36"),
    ],
)
def test_wrong_sizes_are_refused_with_the_nearest(build, size, words):
    model = create_model("crossvit_tiny", **build)
    with pytest.raises(ValueError, match=words):
        model(torch.zeros(1, 3, *size))


def test_too_small_a_size_is_refused_when_building():
    with pytest.raises(ValueError, match=r"smaller than one patch of 12 pixels; .* are 12x12 and 24x24"):
        create_model("crossvit_tiny", img_size=8)
    model = create_model("crossvit_tiny")
    with pytest.raises(ValueError, match="smaller than one patch"):
        model.set_input_size((240, 4))
    assert model.img_size == (240, 240)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(1, 1, 240, 240), ValueError, r"images must have shape \[B, 3, height, width\]"),
        (torch.zeros(3, 240, 240), ValueError, r"got \[3, 240, 240\]"),
        (torch.zeros(1, 3, 240, 240, dtype=torch.uint8), TypeError, "floating-point and normalised"),
    ],
)
def test_wrong_images_are_refused(x, error, words):
    with pytest.raises(error, match=words):
        create_model("crossvit_tiny")(x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"global_pool": "max"}, "global_pool must be one of token, avg, got 'max'"),
        ({"fusion": "sum"}, "fusion must be one of cross, all, class, pairwise, none, got 'sum'"),
        ({"patch_size": (12,)}, "patch_size must have one value for S and one for L"),
        ({"num_heads": (5, 3)}, "num_heads must divide the branch's width 96, got 5"),
        ({"multi_conv": True, "patch_size": (8, 16)}, "multi_conv knows patch sizes 12 and 16, got 8"),
    ],
)
def test_wrong_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        create_model("crossvit_tiny", **options)
