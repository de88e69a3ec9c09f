"""The patch embedding by Triton's kernels, compiled for a GPU and executed without one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from crossvit_kernels import add_position, patch_embed
from crossvit_kernels.patch_embed import gpu_op, reference, triton_launch
from tests import layouts
from tests.by_definition import patch_inputs, patch_oracle
from tests.contract import STORED, check_values, without_a_gpu

NAMES = ("image", "weight", "bias", "position", "cls_token")
targets = pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_90", marks=pytest.mark.sweep)])
# (image, side of a patch, C, size): a remainder at both edges; the models' patches, a depth that steps do not
# divide; enlarged and reduced; hardly any pixel left; patches of one pixel.
CASES_OF_SIZES = (
    *(((2, 3, 13, 17), 4, 9, None), ((2, 3, 24, 36), 12, 40, None), ((1, 3, 40, 40), 16, 72, (32, 32))),
    *(((2, 3, 33, 41), 4, 24, (30, 37)), ((1, 2, 9, 11), 4, 8, (25, 30)), ((1, 1, 70, 300), 8, 16, (9, 31))),
    ((2, 1, 3, 4), 1, 5, None),
)
FAST = (
    *(("sm_80", torch.float32, CASES_OF_SIZES[3]), ("sm_80", torch.bfloat16, CASES_OF_SIZES[1])),
    *(("sm_90", torch.bfloat16, CASES_OF_SIZES[2]), ("sm_80", torch.float16, CASES_OF_SIZES[0])),
)
CASES = [
    case if case in FAST else pytest.param(*case, marks=pytest.mark.sweep)
    for case in itertools.product(("sm_80", "sm_90"), STORED, CASES_OF_SIZES)
]


def inputs(image: Sequence[int], side: int, channels: int, size: tuple[int, int] | None) -> list[Tensor]:
    height, width = size or image[2:]
    return patch_inputs(image, side, channels, (height // side, width // side))


def both(
    x: Sequence[Tensor], backend: str, wanted: Sequence[str] = NAMES, **options: Any
) -> dict[str, Tensor]:
    """y, and the gradients that are wanted, for a loss that weighs every element by itself."""
    leaves = dict(zip(NAMES, (t.detach() for t in x), strict=True))
    some = [leaves[name].requires_grad_() for name in wanted]
    if backend == "oracle":
        y = patch_oracle(list(leaves.values()), **options)
    else:
        y = patch_embed(*leaves.values(), backend=backend, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).bfloat16().to(y.dtype)
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, some, weights), strict=True))}


@pytest.mark.parametrize(("target", "dtype", "case"), CASES, ids=str)
def test_values_and_gradients(target, dtype, case):
    size = case[3]
    x = [t.to(dtype) for t in inputs(*case)]
    with without_a_gpu(target):
        mine = both(x, "triton", size=size)
    eager, exact = both(x, "reference", size=size), both([t.double() for t in x], "oracle", size=size)
    for name, want in exact.items():
        check_values(mine[name], eager[name], want, name)


@targets
@pytest.mark.parametrize("size", [None, (24, 16)], ids=str)
def test_bytes(target, size):
    """Standardised as torchvision does it; the mean is taken off before anything is rounded."""
    x = inputs((2, 3, 26, 22), 8, 24, size)
    image = torch.randint(0, 256, (2, 3, 26, 22), dtype=torch.uint8)
    means, stds = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    options = {"size": size, "mean": means, "std": stds, "wanted": NAMES[1:]}
    for dtype in STORED:
        low = [image, *(t.to(dtype) for t in x[1:])]
        with without_a_gpu(target):
            mine = both(low, "triton", **options)
        eager = both(low, "reference", **options)
        exact = both([image, *(t.double() for t in low[1:])], "reference", **options)
        for name, want in exact.items():
            check_values(mine[name], eager[name], want, name)


@targets
def test_under_autocast(target):
    x = [t.float() for t in inputs((2, 3, 24, 36), 12, 40, None)]
    exact = both([t.double() for t in x], "oracle")
    with without_a_gpu(target), torch.autocast("cpu", torch.bfloat16):
        mine, eager = both(x, "triton"), both(x, "reference")
    for name, want in exact.items():
        assert mine[name].dtype == torch.float32
        check_values(mine[name].bfloat16(), eager[name].bfloat16(), want, name)


def test_backward_within_autocast():
    """Which would round what the image's gradient is put together from."""
    x = [t.float() for t in inputs((1, 1, 9, 11), 2, 4, (8, 8))]
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.detach().requires_grad_() for t in x]
        with without_a_gpu("sm_80"):
            y = patch_embed(*leaves, size=(8, 8), backend=backend)
            with torch.autocast("cpu", torch.bfloat16):
                found.append(torch.autograd.grad(y.square().sum(), leaves))
    for mine, eager in zip(*found, strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4)


@targets
def test_images_and_patches_far_apart(target):
    """Channels more than 2^31 bytes apart, in memory that is never touched but for them."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    image = far.as_strided((1, 3, 4, 4), (0, 2**30, 4, 1))
    patches = far.as_strided((1, 2, 3), (0, 8, 2**30))
    x = [t.bfloat16() for t in inputs((1, 3, 4, 4), 2, 8, None)]
    image.copy_(x[0])
    with without_a_gpu(target):
        assert torch.equal(patch_embed(image, *x[1:], backend="triton"), patch_embed(*x, backend="triton"))
        position, cls = torch.randn(3, 3), torch.randn(3)
        patches.copy_(torch.randn(1, 2, 3))
        mine, want = (add_position(patches, position, cls, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(mine, want)


@targets
def test_an_infinite_weight_leaves_the_cls_token(target):
    x = [t.bfloat16() for t in inputs((1, 3, 8, 8), 4, 8, None)]
    x[1][5, 0, 0, 0] = float("inf")
    with without_a_gpu(target):
        y = patch_embed(*x, backend="triton")
    assert torch.isfinite(y[:, 0]).all()
    assert not torch.isfinite(y[:, 1:, 5]).any()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


@targets
@pytest.mark.parametrize("layout", [*layouts.ALL, channels_last], ids=lambda layout: layout.__name__)
def test_strides(target, layout):
    """Of the image, the weight, the position and the incoming gradient; sides of 3 and 4."""
    for side, size in ((4, None), (3, None), (4, (14, 17))):
        x = [t.bfloat16() for t in inputs((2, 3, 13, 18), side, 24, size)]
        with without_a_gpu(target):
            want = both(x, "triton", size=size)
            leaves = [layout(t).detach().requires_grad_() for t in x]
            y = patch_embed(*leaves, size=size, backend="triton")
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
            grads = torch.autograd.grad(y, leaves, layout(weights))
        assert torch.equal(y, want["y"])
        for name, grad in zip(NAMES, grads, strict=True):
            assert torch.equal(grad, want[name]), name


@targets
def test_nan_stays_in_its_patch(target):
    x = [t.bfloat16() for t in inputs((2, 3, 16, 16), 8, 24, None)]
    with without_a_gpu(target):
        want = patch_embed(*x, backend="triton")
        x[0][1, 2, 9, 3] = float("nan")  # image 1, patch 2
        got = patch_embed(*x, backend="triton")
    spoilt = torch.zeros(2, 5, dtype=torch.bool)
    spoilt[1, 3] = True
    assert got[spoilt].isnan().all()
    assert torch.equal(got[~spoilt], want[~spoilt])


def test_the_image_is_not_written_anew_where_it_need_not_be():
    x = [t.bfloat16() for t in inputs((2, 3, 24, 24), 12, 16, None)]
    with without_a_gpu("sm_80") as recorder:
        patch_embed(*x, backend="triton")
        assert [launch.name for launch in recorder.launches] == ["embed"]
        patch_embed(*x[:3], x[3], x[4], size=(24, 24), backend="triton")
        assert [launch.name for launch in recorder.launches] == ["embed"] * 2


def test_what_is_saved_and_what_is_computed():
    """The inputs alone; the image has no gradient unless it is wanted."""
    x = [t.bfloat16() for t in inputs((2, 3, 24, 24), 12, 16, None)]
    saved: list[Tensor] = []
    with without_a_gpu("sm_80") as recorder:
        leaves = [x[0], *(t.detach().requires_grad_() for t in x[1:])]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = patch_embed(*leaves, backend="triton")
        assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in leaves}
        recorder.launches.clear()
        first = torch.autograd.grad(y.sum(), leaves[1:], retain_graph=True)
        assert "product" not in {launch.name for launch in recorder.launches}
        second = torch.autograd.grad(y.sum(), leaves[1:], retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        y = patch_embed(*x[:3], *leaves[3:], backend="triton")
        recorder.launches.clear()
        torch.autograd.grad(y.sum(), leaves[3:])
        assert not recorder.launches


def test_second_derivatives_and_the_operator_itself():
    x = [t.float() for t in inputs((1, 2, 5, 6), 2, 4, (4, 4))]
    with without_a_gpu("sm_80"):
        found = []
        for backend in ("triton", "reference"):
            leaves = [t.detach().requires_grad_() for t in x]
            y = patch_embed(*leaves, size=(4, 4), backend=backend)
            first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
        for mine, want in zip(*found, strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-3)
        leaves = [t.detach().requires_grad_() for t in x]
        leaves[3:] = [x[3][0].detach().requires_grad_(), x[4].flatten().detach().requires_grad_()]
        torch.library.opcheck(gpu_op.FORWARD, (*leaves, [4, 4], None, None))
        grad = torch.randn(1, 5, 4)
        plain = [t.detach() for t in leaves[:2]]
        torch.library.opcheck(gpu_op.BACKWARD, (grad, *plain, [4, 4], None, None, [True] * 5))


def test_compiling():
    x = [t.float() for t in inputs((1, 2, 5, 6), 2, 4, None)]
    with without_a_gpu("sm_80"):

        def through(image: Tensor) -> Tensor:
            return patch_embed(image, *x[1:], backend="triton") * 2

        compiled = torch.compile(through, fullgraph=True, backend="aot_eager")
        grads = []
        for function in (compiled, through):
            leaf = x[0].detach().requires_grad_()
            y = function(leaf)
            grads.append((y.detach(), torch.autograd.grad(y.sum(), leaf)[0]))
        torch.testing.assert_close(*grads, rtol=0, atol=0)


# Position and CLS token behind several convolutions


@targets
@pytest.mark.parametrize("size", [(2, 5, 9), (1, 70, 130), (3, 64, 64), (2, 0, 8)], ids=str)
def test_add_position(target, size):
    """Patches lie token by token, channel by channel and apart, in one dtype and as under autocast."""
    batch, count, channels = size
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    patches, position, cls = (
        drawn(batch, count, channels),
        drawn(1, 1 + count, channels),
        drawn(1, 1, channels),
    )
    weights = drawn(batch, 1 + count, channels).bfloat16()
    for dtypes in itertools.product(STORED, STORED):
        low = [t.to(dtype) for t, dtype in zip((patches, position, cls), (*dtypes, dtypes[1]), strict=True)]
        for layout in (layouts.contiguous, layouts.backwards_in_memory, layouts.every_second):
            found = []
            for backend in ("triton", "reference"):
                leaves = [layout(t).detach().requires_grad_() for t in low]
                with without_a_gpu(target):
                    y = add_position(*leaves, backend=backend)
                    grads = torch.autograd.grad(y, leaves, layout(weights.to(y.dtype)))
                found.append((y, *grads))
            assert found[0][0].dtype == found[1][0].dtype
            for name, mine, eager in zip(("y", "patches", "position", "cls"), *found, strict=True):
                step = torch.finfo(mine.dtype).eps
                torch.testing.assert_close(mine, eager, rtol=2 * step, atol=8 * step, msg=name)


def test_what_add_position_saves_and_refuses():
    x = [torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(8)]
    leaves = [t.requires_grad_() for t in x]
    saved: list[Tensor] = []
    with without_a_gpu("sm_80") as recorder:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = add_position(*leaves, backend="triton")
        assert not saved
        assert [launch.name for launch in recorder.launches] == ["place"]
        (first,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaves[0])
        torch.testing.assert_close(second, 8 * (x[0] + x[1][1:]))
        torch.library.opcheck(gpu_op.PLACE, tuple(leaves))
    for wrong, words in (
        ((x[0][0], *x[1:]), r"patches must have shape \[B, P, C\]"),
        ((x[0], x[1][1:], x[2]), r"position must have shape \[1 \+ P, C\] = \[6, 8\]"),
        ((*x[:2], x[2][1:]), r"cls_token must have shape \[C\] = \[8\]"),
    ):
        with pytest.raises(ValueError, match=words):
            add_position(*wrong)
    with pytest.raises(RuntimeError, match="cpu: it does not implement add_position"):
        add_position(*x, backend="cpu")
    with pytest.raises(RuntimeError, match="triton: it does not take float64"):
        add_position(x[0], x[1].double(), x[2], backend="triton")
    with pytest.raises(TypeError, match="position must be a floating-point tensor"):
        add_position(x[0], x[1].detach().long(), x[2])


def test_no_images():
    x = inputs((0, 3, 8, 8), 4, 8, None)
    with without_a_gpu("sm_80") as recorder:
        for name, found in both([t.float() for t in x], "triton").items():
            assert found.shape == dict(zip(NAMES, x, strict=True)).get(name, torch.empty(0, 5, 8)).shape
            assert not found.any()
    assert not recorder.launches


def test_windows_hold_what_is_interpolated():
    """For enlarging and reducing, of all pixels that are taken together."""
    from crossvit_kernels.patch_embed.bicubic import taps

    for old, new, seen in (
        (240, 224, 224),
        (408, 384, 384),
        (300, 31, 24),
        (9, 25, 24),
        (5000, 10, 10),
        (1, 64, 64),
    ):
        count, window = triton_launch._window(old, new, seen)
        places, _ = taps(old, new)
        for i in range(0, seen, count):
            of_these = places[:, i : min(i + count, seen)]
            assert of_these.max() < int(of_these[0, 0]) // 8 * 8 + window
            assert of_these.min() == of_these[0, 0]


def test_the_transposed_interpolation():
    """Is that of PyTorch's own gradient."""
    image = torch.randn(1, 1, 12, 9, dtype=torch.float64, requires_grad=True)
    resized = reference.F.interpolate(image, size=(7, 11), mode="bicubic", align_corners=False)
    grad = torch.randn_like(resized)
    (want,) = torch.autograd.grad(resized, image, grad)
    down = triton_launch._interpolation(12, 7, 7, image.device)
    across = triton_launch._interpolation(9, 11, 11, image.device)
    torch.testing.assert_close((down.T @ grad.float() @ across).double(), want, rtol=1e-4, atol=1e-5)
