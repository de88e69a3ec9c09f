"""Self-attention by Triton's kernels, compiled for a GPU and executed without one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from crossvit_kernels import self_attention
from crossvit_kernels.self_attention import gpu_op, reference, triton_launch
from tests.by_definition import attention_oracle, normal
from tests.contract import STORED, check_values, without_a_gpu
from tests.operations import leaves

# What every run takes; `make test-drawn` takes some of the rest, whose calls take seconds.
targets = pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_90", marks=pytest.mark.sweep)])
# (B, N, H, d): tokens beside whole tiles and tails of 16, 32 and 64, a single token; head widths that fill
# their tile and that do not; one head and several.
SIZES = (
    *((2, 37, 2, 32), (1, 70, 2, 48), (1, 64, 1, 64), (3, 1, 1, 16), (1, 145, 1, 64), (2, 129, 1, 32)),
    *((1, 21, 2, 112), (1, 33, 1, 128)),
)
FAST = (
    *(("sm_80", torch.float32, SIZES[0]), ("sm_90", torch.bfloat16, SIZES[1])),
    *(("sm_80", torch.float16, SIZES[2]), ("sm_90", torch.bfloat16, SIZES[3])),
)
CASES = [
    case if case in FAST else pytest.param(*case, marks=pytest.mark.sweep)
    for case in itertools.product(("sm_80", "sm_90"), STORED, SIZES)
]


def both(qkv: Tensor, heads: int, backend: str, **options: object) -> list[Tensor]:
    """y, and the gradient for a loss that weighs every element by itself."""
    (x,) = leaves([qkv])
    if backend == "definition":
        y = attention_oracle(x, heads, **options)
    else:
        y = self_attention(x, heads, backend=backend, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, x, weights)]


def check(qkv: Tensor, heads: int, saturated: bool = False, **options: object) -> None:
    """By the rule for kernels, queries, keys and values each by themselves.

    Where the softmax is all but one-hot, rounding is all that the gradients of queries and keys consist of:
    they are held against the largest gradient then, with eight times the error of eager PyTorch.
    """
    mine = both(qkv, heads, "triton", **options)
    exact = both(qkv.double(), heads, "definition", **options)
    eager = both(qkv, heads, "reference", **options)
    check_values(mine[0], eager[0], exact[0], "y")
    if saturated:
        assert torch.isfinite(mine[1]).all()
        errors = [(x[1].double() - exact[1]).abs().max() / exact[1].abs().max() for x in (mine, eager)]
        assert errors[0] <= 8 * errors[1] + 32 * torch.finfo(qkv.dtype).eps
        return
    thirds = zip(*(x[1].chunk(3, dim=-1) for x in (mine, eager, exact)), strict=True)
    for name, third in zip(("queries", "keys", "values"), thirds, strict=True):
        check_values(*third, name)


@pytest.mark.parametrize(("target", "dtype", "size"), CASES, ids=str)
def test_values_and_gradients(target, dtype, size):
    batch, tokens, heads, channels = size
    with without_a_gpu(target):
        qkv = (normal(batch, tokens, 3 * heads * channels) * 1.5 + 0.2).to(dtype)
        check(qkv, heads, saturated=tokens == 1)


@targets
def test_strides(target):
    """Rows of a longer buffer, channels apart, images in the other order; the gradient of y likewise."""
    qkv = normal(2, 19, 96).bfloat16()
    buffer = torch.zeros(2, 40, 192, dtype=torch.bfloat16)
    with without_a_gpu(target):
        want = both(qkv, 2, "triton")
        for view in (buffer[:, 1:20, 3:99], buffer[:, ::2, ::2][:, :19], buffer.flip(0)[:, :19, 96:]):
            view.copy_(qkv)
            x = view.detach().requires_grad_()
            y = self_attention(x, 2, backend="triton")
            assert torch.equal(y, want[0])
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
            apart = weights.repeat_interleave(2, dim=-1)[..., ::2]
            (grad,) = torch.autograd.grad(y, x, apart)
            assert torch.equal(grad, want[1])
            view.zero_()


@targets
def test_sharp_scores(target):
    """A softmax that is all but one-hot, scores that are all alike, and all of hundreds below zero."""
    with without_a_gpu(target):
        for factor in (0.0, 8.0):
            check((normal(1, 47, 96) * factor).float(), 2, saturated=True, scale=2.0)
        qkv = normal(1, 23, 96).float()
        qkv[..., :32], qkv[..., 32:64] = 6.0 + qkv[..., :32] / 10, -6.0 + qkv[..., 32:64] / 10
        check(qkv, 2, saturated=True, scale=1.0)


@targets
def test_nan_stays_in_its_image_and_head(target):
    qkv = normal(2, 33, 3 * 2 * 16).bfloat16()
    with without_a_gpu(target):
        want = self_attention(qkv, 2, backend="triton")
        qkv[1, 5, 32 + 16] = float("nan")  # a key of head 1
        got = self_attention(qkv, 2, backend="triton")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1, :, :16], want[1, :, :16])
    assert got[1, :, 16:].isnan().all()


def test_what_is_saved_and_the_same_bits_in_every_run():
    qkv = leaves([normal(2, 21, 96).bfloat16()])[0]
    saved: list[Tensor] = []
    with without_a_gpu("sm_90"):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            y = self_attention(qkv, 2, backend="triton")
        assert sorted(x.nbytes for x in saved) == sorted([qkv.nbytes, y.nbytes, 4 * 2 * 2 * 21])
        grads = [torch.autograd.grad(y.sum(), qkv, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*grads)
        with torch.no_grad():
            assert torch.equal(self_attention(qkv, 2, backend="triton"), y)


def test_second_derivatives_and_the_operator_itself():
    """Through the definition; torch's own check of operators takes schema, fakes and autograd."""
    qkv = normal(1, 5, 48).float()
    with without_a_gpu("sm_80"):
        found = []
        for backend in ("triton", "reference"):
            (x,) = leaves([qkv])
            y = self_attention(x, 1, backend=backend)
            (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), x)[0])
        check_values(found[0], found[1], found[1].double())
        (x,) = leaves([qkv])
        torch.library.opcheck(gpu_op.FORWARD, (x, 1, 0.25, torch.float32, True))


def test_autocast_and_compiling():
    qkv = normal(1, 9, 96).float()
    with without_a_gpu("sm_80"):
        want = self_attention(qkv.bfloat16(), 2, backend="triton").float()
        with torch.autocast("cpu", torch.bfloat16):
            low = self_attention(qkv, 2, backend="triton")
        assert low.dtype == torch.float32
        check_values(low.bfloat16(), want.bfloat16(), reference.output(qkv.double(), 2, 0.25, torch.float64))

        def through(x: Tensor) -> Tensor:
            return self_attention(x, 2, backend="triton") * 2

        compiled = torch.compile(through, fullgraph=True, backend="aot_eager")
        (a,), (b,) = leaves([qkv]), leaves([qkv])
        torch.testing.assert_close(compiled(a), through(b), rtol=0, atol=0)
        grads = [torch.autograd.grad(f(x).sum(), x)[0] for f, x in ((compiled, a), (through, b))]
        torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_another_length_or_batch_compiles_nothing():
    """But for the width of the tile behind the whole steps, which is the same for these."""
    with without_a_gpu("sm_80") as recorder:
        counts = []
        for batch, tokens, heads in ((1, 70, 2), (2, 80, 1), (1, 112, 2), (3, 67, 1)):
            both(normal(batch, tokens, 48 * heads).bfloat16(), heads, "triton")
            counts.append(recorder.compilations)
    assert len(set(counts)) == 1


def test_the_batch_grows_along_the_first_axis():
    with without_a_gpu("sm_80") as recorder:
        both(normal(33, 3, 96).bfloat16(), 2, "triton")
    assert {launch.name: tuple(launch.grid)[1:] for launch in recorder.launches} == dict.fromkeys(
        ("attend", "to_queries", "to_keys"), (1, 1)
    )
    assert {launch.grid[0] for launch in recorder.launches} == {66}


def test_no_tokens_at_all():
    with without_a_gpu() as recorder:
        for shape in ((0, 5, 96), (2, 0, 96)):
            x = torch.zeros(shape, requires_grad=True)
            y = self_attention(x, 2, backend="triton")
            assert y.shape == (*shape[:2], 32)
            assert torch.autograd.grad(y.sum(), x)[0].shape == shape
    assert not recorder.launches


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        (72, {}, r"triton: it takes heads of 16, 32, … 128 channels, got 8"),
        (3 * 3 * 144, {}, "got 144"),
        (144, {"scale": -0.5}, "triton: it takes positive scales, got -0.5"),
        (144, {"dropout_p": 0.1}, "triton: it has no dropout, got dropout_p = 0.1"),
        (144, {"return_attention": True}, "triton: it does not return the attention"),
        (144, {}, "triton: it runs on cuda, the tokens are on cpu"),
    ],
)
def test_what_it_refuses(columns, options, words):
    with pytest.raises(RuntimeError, match=words):
        self_attention(normal(1, 5, columns).float(), 3, backend="triton", **options)


def test_tails():
    """A power of two of at least 16 that covers what whole steps leave."""
    for tokens, step in itertools.product(range(1, 300), (16, 32, 64, 128)):
        rest = tokens % step
        found = triton_launch.tail(tokens, step)
        assert (found == 0) == (rest == 0)
        assert found in (0, 16, 32, 64, 128)
        assert rest <= found < max(2 * rest, 17)
