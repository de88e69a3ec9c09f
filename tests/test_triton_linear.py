"""Linear layers by Triton's kernels, compiled for a GPU and executed without one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from crossvit_kernels import linear
from crossvit_kernels.cross_attention.gpu import Gpu
from crossvit_kernels.linear import gpu_op, triton_launch, triton_table
from tests import layouts
from tests.by_definition import linear_inputs, linear_oracle, normal, run_linear
from tests.contract import STORED, check_values, without_a_gpu

NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias", "residual")

# What every run takes; `make test-drawn` takes some of the rest.
targets = pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_90", marks=pytest.mark.sweep)])
# (leading dimensions, C_in, C_out): all odd, so that no tile is filled and no row is aligned; whole tiles; a
# last tile of half a tile's width; a last step and columns beyond the tiles; one row, one channel, one
# output.
SIZES = (
    *(((2, 19), 37, 51), ((128,), 64, 128), ((3, 47), 96, 192), ((5, 29), 72, 104)),
    *(((1,), 136, 24), ((7,), 1, 9), ((2, 3), 40, 1)),
)
# (LayerNorm, activation, residual)
OPTIONS = (
    (True, "gelu", True),
    (True, None, False),
    (False, None, True),
    (True, "relu", False),
    (False, "gelu", False),
)
FAST = (
    *(("sm_80", torch.float32, SIZES[0], OPTIONS[0]), ("sm_80", torch.bfloat16, SIZES[2], OPTIONS[1])),
    *(("sm_80", torch.float16, SIZES[3], OPTIONS[3]), ("sm_90", torch.bfloat16, SIZES[2], OPTIONS[0])),
    *(("sm_90", torch.bfloat16, SIZES[1], OPTIONS[1]), ("sm_90", torch.bfloat16, SIZES[3], OPTIONS[2])),
)
CASES = [
    case if case in FAST else pytest.param(*case, marks=pytest.mark.sweep)
    for case in itertools.product(("sm_80", "sm_90"), STORED, SIZES, OPTIONS)
    if not (case[2][1] == 1 and case[3][0])  # a LayerNorm over one channel has no gradient but rounding
]


@contextmanager
def on(target: str, multiprocessors: int = 2) -> Iterator[Any]:
    """A GPU so small that tiles are as large as they get."""
    gpu = Gpu(int(target.removeprefix("sm_")), multiprocessors, 232_448)
    with mock.patch.object(triton_launch, "gpu_of", return_value=gpu), without_a_gpu(target) as recorder:
        yield recorder


def given(x: Sequence[Tensor], norm: bool, residual: bool) -> list[Tensor | None]:
    return [*x[:3], *(x[3:5] if norm else (None, None)), x[5] if residual else None]


def weights_of(y: Tensor) -> Tensor:
    """For a loss that weighs every element by itself."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).bfloat16().to(y.dtype)


def both(x: Sequence[Tensor | None], backend: str, **options: Any) -> dict[str, Tensor]:
    """y, and the gradients of all tensors."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in x]
    y = linear_oracle(leaves, **options) if backend == "oracle" else run_linear(leaves, backend, **options)
    named = {name: t for name, t in zip(NAMES, leaves, strict=True) if t is not None}
    grads = torch.autograd.grad(y, list(named.values()), weights_of(y))
    return {"y": y.detach(), **dict(zip(named, grads, strict=True))}


def check(x: Sequence[Tensor | None], **options: Any) -> None:
    """By the rule for kernels."""
    mine, eager = (both(x, backend, **options) for backend in ("triton", "reference"))
    exact = both([None if t is None else t.double() for t in x], "oracle", **options)
    for name, want in exact.items():
        check_values(mine[name], eager[name], want, name)


@pytest.mark.parametrize(("target", "dtype", "size", "options"), CASES, ids=str)
def test_values_and_gradients(target, dtype, size, options):
    norm, activation, residual = options
    x = [t.to(dtype) for t in linear_inputs(*size)]
    with on(target):
        check(given(x, norm, residual), activation=activation)


@targets
def test_small_batches_take_small_tiles(target):
    x = [t.bfloat16() for t in linear_inputs((2, 37), 96, 104)]
    with on(target, multiprocessors=132) as recorder:
        check(x)
    assert {launch.num_warps for launch in recorder.launches if launch.name == "product"} == {4}


@targets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_summed_in_parts(target, dtype):
    """And in the same order in each run."""
    x = given([t.to(dtype) for t in linear_inputs((601,), 40, 72)], True, False)
    with on(target, multiprocessors=4) as recorder:
        check(x, activation=None)
        parts = {launch.grid[1] for launch in recorder.launches if launch.name == "weight_gradient"}
        assert parts > {1} or min(parts) > 1
        first, second = (both(x, "triton", activation=None) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@targets
def test_tokens_and_weights_of_other_dtypes(target):
    """As autocast gives them: normalised first, multiplied in the weight's dtype, added in the tokens'."""
    x = [t.float() for t in linear_inputs((2, 23), 40, 72)]
    for low in (torch.bfloat16, torch.float16):
        exact = both([t.double() for t in x], "oracle")
        with on(target), torch.autocast("cpu", low):
            mine, eager = both(x, "triton"), both(x, "reference")
        for name, want in exact.items():
            assert mine[name].dtype == torch.float32
            check_values(mine[name].to(low), eager[name].to(low), want, name)


@targets
def test_drop_path(target):
    """One number an image, and gradients of all but it."""
    x = [t.bfloat16() for t in linear_inputs((3, 17), 40, 72)]
    scale = torch.tensor([0.0, 1.25, 1.25])
    for activation in (None, "gelu"):
        exact = both([t.double() for t in x], "reference", activation=activation, residual_scale=scale)
        eager = both(x, "reference", activation=activation, residual_scale=scale)
        with on(target):
            mine = both(x, "triton", activation=activation, residual_scale=scale)
        for name, want in exact.items():
            check_values(mine[name], eager[name], want, name)
        assert torch.equal(mine["y"][0], x[5][0])
        assert not mine["x"][0].any()


@targets
def test_large_means_and_rows_without_deviation(target):
    """Which the statistics and the deferred mean have to survive."""
    for dtype in (torch.bfloat16, torch.float32):
        x = [t.to(dtype) for t in linear_inputs((21,), 64, 72)]
        x[0] = (x[0].double() + 30 * normal(21, 1)).to(dtype)
        with on(target):
            check(given(x, True, False), activation=None)
            x[0] = x[0][:, :1].expand(21, 64).contiguous()
            y = run_linear(given(x, True, False), "triton", None)
        want = linear_oracle([t.double() for t in given(x, True, False)[:5]] + [None], None)
        assert (y.double() - want).abs().max() < 40 * torch.finfo(dtype).eps * want.abs().max()


@targets
@pytest.mark.parametrize("layout", layouts.ALL, ids=lambda layout: layout.__name__)
def test_strides(target, layout):
    """Of all tensors, and of the incoming gradient."""
    x = [t.bfloat16() for t in linear_inputs((2, 19), 40, 72)]
    scale = torch.tensor([0.5, 2.0])
    with on(target):
        want = both(x, "triton", residual_scale=scale)
        leaves = [layout(t).detach().requires_grad_() for t in x]
        y = run_linear(leaves, "triton", residual_scale=layout(scale))
        grads = torch.autograd.grad(y, leaves, layout(weights_of(y)))
    assert torch.equal(y, want["y"])
    for name, grad in zip(NAMES, grads, strict=True):
        assert torch.equal(grad, want[name]), name


@targets
def test_rows_that_the_tma_unit_cannot_address(target):
    """An address that is no multiple of 16 bytes, one row for all: every thread copies them itself."""
    x = [t.bfloat16() for t in linear_inputs((9,), 64, 72)]
    apart = torch.zeros(1 + 9 * 64, dtype=torch.bfloat16)[1:].view(9, 64).copy_(x[0])
    with on(target):
        assert torch.equal(run_linear([apart, *x[1:]], "triton"), run_linear(x, "triton"))
        row = x[0][:1].expand(9, 64)
        assert torch.equal(
            run_linear([row, *x[1:]], "triton"), run_linear([row.contiguous(), *x[1:]], "triton")
        )


@targets
def test_one_channel_and_rows_that_overlap(target):
    """Which are not copied, or have a stride that means nothing."""
    for dtype in (torch.bfloat16, torch.float32):
        x = [t.to(dtype) for t in linear_inputs((5,), 1, 8)]
        with on(target):
            y = run_linear(given(x, True, False), "triton", None)
            torch.testing.assert_close(y, run_linear(given(x, True, False), "reference", None))
            apart = torch.randn(16, 16).to(dtype)[:, ::2][:, :1].requires_grad_()
            leaf = x[1].detach().requires_grad_()
            y = linear(apart, leaf, backend="triton")
            grads = torch.autograd.grad(y.sum(), (apart, leaf))
        want = torch.autograd.grad(linear(apart, leaf, backend="reference").sum(), (apart, leaf))
        for mine, eager in zip(grads, want, strict=True):
            torch.testing.assert_close(mine, eager)
    overlapping = torch.randn(20).unfold(0, 16, 1)
    weight = torch.randn(8, 16)
    with on(target), torch.autocast("cpu", torch.bfloat16):
        mine, eager = (linear(overlapping, weight, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(mine.bfloat16(), eager.bfloat16(), rtol=2e-2, atol=2e-2)


@targets
def test_infinite_z_without_a_gradient(target):
    """Beyond float16, in a column that nothing depends on: zero times infinity."""
    x = [t.half() for t in linear_inputs((7,), 16, 8)]
    x[1][3] *= 6e4
    leaves = [t.detach().requires_grad_() for t in x[:5]]
    with on(target):
        y = run_linear([*leaves, None], "triton", None)
        assert not torch.isfinite(y[:, 3]).all()
        weights = torch.ones_like(y)
        weights[:, 3] = 0
        grads = torch.autograd.grad(y, leaves, weights)
    assert torch.isfinite(grads[0]).all()


@targets
def test_nan_stays_in_its_row(target):
    for dtype in (torch.bfloat16, torch.float32):
        x = [t.to(dtype) for t in linear_inputs((29,), 40, 24)]
        with on(target):
            want = run_linear(x, "triton")
            for bad in (float("nan"), float("inf")):
                spoilt = x[0].clone()
                spoilt[14, 3] = bad
                got = run_linear([spoilt, *x[1:]], "triton")
                assert got[14].isnan().all()
                rest = torch.arange(29) != 14
                assert torch.equal(got[rest], want[rest])


@targets
def test_gelu_over_its_whole_range(target):
    """By the error function: rounding of float32, where the tanh formula is 5e-4 away."""
    line = torch.cat((torch.linspace(-12, 12, 1001), torch.tensor([-1e4, -100.0, 100.0, 1e4])))[:, None]
    x = line.detach().requires_grad_()
    with on(target):
        y = linear(x, torch.ones(1, 1), activation="gelu", backend="triton")
        (grad,) = torch.autograd.grad(y.sum(), x)
    exact = line.double().requires_grad_()
    want = F.gelu(exact)
    (slope,) = torch.autograd.grad(want.sum(), exact)
    assert ((y.double() - want).abs() <= 2e-7 * line.abs().clamp_min(1)).all()
    assert (grad.double() - slope).abs().max() < 1e-6
    assert not y[line < -5.2].any()


@targets
def test_relu_at_zero_and_nan(target):
    x = torch.tensor([-1.0, -0.0, 0.0, 2.0, float("nan")])[:, None].requires_grad_()
    with on(target):
        y = linear(x, torch.ones(1, 1), activation="relu", backend="triton")
        (grad,) = torch.autograd.grad(y.sum(), x)
    want = F.relu(x)
    (slope,) = torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(grad, slope, rtol=0, atol=0)


# What blocks hand from one product to the next


@targets
@pytest.mark.parametrize("multiprocessors", [2, 132])
@pytest.mark.parametrize("columns", [24, 192, 200])
def test_statistics_for_the_next_layer_norm(target, multiprocessors, columns):
    """Of what was written, in parts, which the next product merges."""
    rows, depth = 70, 64
    x, weight, residual = normal(rows, depth), normal(columns, depth) / 8, 5 + normal(rows, columns)
    following = normal(32, columns).bfloat16() / columns**0.5
    x, weight, residual = x.bfloat16(), weight.bfloat16(), residual.bfloat16()
    with on(target, multiprocessors):
        y = x.new_empty(rows, columns)
        left = triton_launch.statistics_for(x, columns)
        triton_launch.product(x, weight, y, residual=residual, left=left.values)
        alone = triton_launch.statistics(y)
        gamma = (1 + normal(columns) / 3).bfloat16()
        folded, vectors = triton_launch.fold(following, None, gamma, None)
        found = []
        for statistics in (left, triton_launch.Statistics(alone)):
            z = x.new_empty(rows, 32)
            triton_launch.product(
                y, folded, z, bias=vectors[1], colsum=vectors[0], statistics=statistics, eps=1e-6
            )
            found.append(z)
    wide = y.double()
    for part in range(left.values.shape[0]):
        of_part = wide[:, part * left.part : (part + 1) * left.part]
        sums, squares = left.values[part].double()
        torch.testing.assert_close(sums, of_part.sum(1), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            squares, of_part.var(1, correction=0) * of_part.shape[1], rtol=1e-4, atol=1e-4
        )
    exact = F.linear(F.layer_norm(wide, (columns,), gamma.double(), None, 1e-6), following.double())
    eager = F.linear(F.layer_norm(y, (columns,), gamma, None, 1e-6), following)
    for z in found:
        check_values(z, eager, exact)


@targets
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("multiprocessors", [2, 132])
def test_gradients_through_two_layers(target, activation, multiprocessors):
    """dz of the first layer in the epilogue of the second's gradient, and what its LayerNorm needs of it."""
    rows, channels, hidden = 70, 64, 200
    x, dy = 1 + normal(rows, channels), normal(rows, channels)
    gamma, beta = 1 + normal(channels) / 3, normal(channels) / 3
    first, second = normal(hidden, channels) / 8, normal(channels, hidden) / 14
    bias, scale = normal(hidden), torch.tensor([1.5, 0.0])

    def gradient(dtype: torch.dtype) -> Tensor:
        tensors = [t.bfloat16().to(dtype) for t in (x, gamma, beta, first, bias, second, dy)]
        x_, gamma_, beta_, first_, bias_, second_, dy_ = tensors
        x_.requires_grad_()
        h = linear_oracle([x_, first_, bias_, gamma_, beta_, None], activation)
        y = scale.to(dtype).repeat_interleave(rows // 2)[:, None] * F.linear(h, second_)
        return torch.autograd.grad(y + x_, x_, dy_)[0]

    low = [t.bfloat16() for t in (x, gamma, beta, first, bias, second, dy)]
    x_, gamma_, beta_, first_, bias_, second_, dy_ = low
    with on(target, multiprocessors):
        statistics = triton_launch.Statistics(triton_launch.statistics(x_))
        folded, (colsum, offset) = triton_launch.fold(first_, bias_, gamma_, beta_)
        h, z = (x_.new_empty(rows, hidden) for _ in range(2))
        norm = {"statistics": statistics, "eps": 1e-6, "colsum": colsum}
        triton_launch.product(x_, folded, h, activation=activation, bias=offset, z=z, **norm)
        sums, dz = triton_launch.sums_for(dy_, hidden), x_.new_empty(rows, hidden)
        triton_launch.product(
            *(dy_, second_, dz),
            epilogue="activation_gradient",
            activation=activation,
            transposed=False,
            bias=offset,
            z=z,
            sums=sums,
            scale=scale,
            scaled=True,
            **norm,
        )
        dx = x_.new_empty(rows, channels)
        triton_launch.product(
            *(dz, folded, dx),
            epilogue="norm_gradient",
            transposed=False,
            statistics=statistics,
            eps=1e-6,
            scaled=True,
            z=x_,
            residual=dy_,
            sums=sums,
        )
    check_values(dx, gradient(torch.bfloat16), gradient(torch.float64))


# As an operator of PyTorch


def saved_by(call: Callable[[], object]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call()
    return saved


def test_what_is_saved():
    """The input, for a LayerNorm the weight with gamma, and z in 16 bits where y does not tell it."""
    x = [t.bfloat16() for t in linear_inputs((2, 21), 40, 72)]
    rows, small = 42, 4 * 2 * 72
    for norm, activation, residual, beyond in (
        (False, None, True, 0),
        (False, "gelu", False, 2 * rows * 72),
        (True, None, False, 2 * rows * 72 + 2 * 72 * 40 + 8 * rows + small),  # y itself
        (True, "gelu", True, 2 * rows * 72 + 2 * 72 * 40 + 8 * rows + small),
    ):
        leaves = [None if t is None else t.detach().requires_grad_() for t in given(x, norm, residual)]
        with on("sm_90"):
            saved = saved_by(lambda x=leaves, a=activation: run_linear(x, "triton", a))
        own = {t.data_ptr() for t in leaves if t is not None}
        assert sum(t.nbytes for t in saved if t.data_ptr() not in own) == beyond


def test_only_what_is_wanted_is_computed():
    x = [t.float() for t in linear_inputs((5,), 16, 24)]
    with on("sm_80") as recorder:
        for i, absent in ((0, "weight_gradient"), (1, "product"), (2, "product"), (5, "product")):
            leaves = [t.detach() for t in x]
            leaves[i].requires_grad_()
            y = run_linear(leaves, "triton")
            recorder.launches.clear()
            torch.autograd.grad(y.sum(), leaves[i])
            assert absent not in {launch.name for launch in recorder.launches}
        with torch.no_grad():
            quiet = run_linear(x, "triton")
        assert torch.equal(quiet, y)


def test_second_derivatives_and_the_operator_itself():
    x = [t.float() for t in linear_inputs((3,), 8, 6)]
    with on("sm_80"):
        found = []
        for backend in ("triton", "reference"):
            leaves = [t.detach().requires_grad_() for t in x]
            y = run_linear(leaves, backend)
            first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
            total = sum(g.square().sum() for g in first)
            found.append(torch.autograd.grad(total, leaves))
        for mine, want in zip(*found, strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)
        leaves = [t.detach().requires_grad_() for t in x]
        arguments = (*leaves, None, 1e-6, "gelu", True)
        torch.library.opcheck(gpu_op.FORWARD, arguments)
        y, z, *kept = (t.detach() for t in gpu_op.FORWARD(*arguments))
        plain = [t.detach() for t in leaves]
        gradient = (torch.ones_like(y), *plain[:2], *plain[3:5], None, z, *kept, 1e-6, "gelu", [True] * 5)
        torch.library.opcheck(gpu_op.BACKWARD, gradient)
        with pytest.raises(ValueError, match="residual must have 3 rows of 6, got"):
            gpu_op.FORWARD(*plain[:5], plain[5][:1], None, 1e-6, "gelu", False)
        with pytest.raises(ValueError, match="residual_scale must divide 3 rows, got 2 numbers"):
            gpu_op.FORWARD(*plain, torch.ones(2), 1e-6, "gelu", False)


def test_compiling():
    x = [t.float() for t in linear_inputs((3, 5), 16, 24)]
    with on("sm_80"):

        def through(tokens: Tensor) -> Tensor:
            return run_linear([tokens, *x[1:]], "triton") * 2

        compiled = torch.compile(through, fullgraph=True, backend="aot_eager")
        grads = []
        for function in (compiled, through):
            leaf = x[0].detach().requires_grad_()
            y = function(leaf)
            grads.append((y.detach(), torch.autograd.grad(y.sum(), leaf)[0]))
        torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_another_batch_compiles_nothing():
    with on("sm_90") as recorder:
        counts = []
        for rows in (256, 258, 384, 300):
            both([t.bfloat16() for t in linear_inputs((rows,), 64, 128)], "triton")
            counts.append(recorder.compilations)
    assert len(set(counts)) == 1


def test_no_rows():
    with on("sm_80") as recorder:
        x = [t.float() for t in linear_inputs((2, 0), 8, 6)]
        for name, found in both(x, "triton").items():
            assert found.shape == dict(zip(NAMES, x, strict=True)).get(name, x[5]).shape
            assert not found.any()
    assert not recorder.launches


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, RuntimeError, "triton: it runs on cuda, the tokens are on cpu"),
        (
            {"residual_scale": torch.ones(2, requires_grad=True)},
            RuntimeError,
            "no gradient of residual_scale",
        ),
        ({"residual_scale": torch.ones(3)}, ValueError, r"residual_scale must have shape \[B\] = \[2\]"),
        ({"residual_scale": torch.ones(2), "backend": "cpu"}, RuntimeError, "cpu: it has no residual_scale"),
    ],
)
def test_what_it_refuses(options, error, words):
    x = [t.float() for t in linear_inputs((2, 3), 8, 6)]
    with pytest.raises(error, match=words):
        run_linear(x, **{"backend": "triton", **options})


def test_tails():
    """A last tile of half the width, where that is enough, and never narrower than a slice."""
    tiles = triton_table.Tiles(128, 128, 64, 64, 8, 3, tma=True)
    assert [tiles.tail(n) for n in (128, 129, 192, 193, 448, 672, 1344)] == [0, 64, 64, 0, 64, 64, 64]
    small = triton_table.Tiles(64, 64, 64, 64, 4, 3, tma=True)
    assert {small.tail(n) for n in range(1, 300)} == {0}
