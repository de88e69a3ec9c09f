"""Triton kernels in the manner of its tutorials, each with inputs and a check of its results.

A case is a function that launches a kernel on fresh tensors and raises AssertionError if the results are off.
Shapes do not fill the tiles, and memory that must not count is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from crossvit_kernels.dropout import philox


@triton.jit
def vector_add_kernel(x, y, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    tl.store(out + at, tl.load(x + at, mask=inside) + tl.load(y + at, mask=inside), mask=inside)


@triton.jit
def softmax_kernel(x, out, rows, columns, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        at = tl.arange(0, BLOCK)
        values = tl.load(x + row * columns + at, mask=at < columns, other=-float("inf")).to(tl.float32)
        powers = tl.exp(values - tl.max(values, 0))
        tl.store(out + row * columns + at, powers / tl.sum(powers, 0), mask=at < columns)


@triton.jit
def layer_norm_kernel(x, weight, bias, out, mean, scale, columns, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
    centre = tl.sum(total, 0) / columns
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
        distance = tl.where(at < columns, value - centre, 0.0)
        total += distance * distance
    inverse = 1 / tl.sqrt(tl.sum(total, 0) / columns + eps)
    tl.store(mean + row, centre)
    tl.store(scale + row, inverse)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        w, b = tl.load(weight + at, mask=inside), tl.load(bias + at, mask=inside)
        value = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * columns + at, (value - centre) * inverse * w + b, mask=inside)


@triton.jit
def matmul_kernel(  # type: ignore[no-untyped-def]
    a, b, c, M, N, K, stride_a, stride_b, stride_c,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left_inside = (rows[:, None] < M) & (k[None, :] < K)
        left = tl.load(a + rows[:, None] * stride_a + k[None, :], mask=left_inside, other=0.0)
        right_inside = (k[:, None] < K) & (columns[None, :] < N)
        right = tl.load(b + k[:, None] * stride_b + columns[None, :], mask=right_inside, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * stride_c + columns[None, :], total.to(c.dtype.element_ty), mask=inside)


@triton.jit
def attention_kernel(q, k, v, out, length, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    channel = tl.arange(0, D)
    query = tl.load(q + rows[:, None] * D + channel[None, :], mask=rows[:, None] < length, other=0.0)
    highest = tl.full([BM], float("-inf"), tl.float32)
    weights = tl.zeros([BM], tl.float32)
    total = tl.zeros([BM, D], tl.float32)
    for start in range(0, length, BN):
        at = start + tl.arange(0, BN)
        key = tl.load(k + at[:, None] * D + channel[None, :], mask=at[:, None] < length, other=0.0)
        scores = tl.dot(query, tl.trans(key)) * scale
        scores = tl.where(at[None, :] < length, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        powers = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        weights = weights * shrink + tl.sum(powers, 1)
        value = tl.load(v + at[:, None] * D + channel[None, :], mask=at[:, None] < length, other=0.0)
        total = tl.dot(powers.to(value.dtype), value, total * shrink[:, None])
        highest = higher
    tl.store(
        out + rows[:, None] * D + channel[None, :], total / weights[:, None], mask=rows[:, None] < length
    )


@triton.jit
def histogram_kernel(x, sums, counts, largest, slots, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, mask=inside, other=0.0)
    tl.atomic_add(sums + at % 16, value, mask=inside)
    tl.atomic_add(counts + at % 16, 1, mask=inside, sem="relaxed")
    tl.atomic_max(largest + at % 16, value, mask=inside)
    slot = tl.atomic_add(counts + 16, 1)
    tl.store(slots + slot, tl.program_id(0))


@triton.jit
def dropout_kernel(x, out, n, probability, seed, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.rand(seed, at) > probability
    value = tl.load(x + at, mask=at < n, other=0.0)
    tl.store(out + at, tl.where(keep, value / (1 - probability), 0.0), mask=at < n)


@triton.jit
def gelu_kernel(x, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0.0)
    tl.store(out + at, 0.5 * value * (1 + tl.erf(value * 0.7071067811865476)), mask=at < n)


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    got, want = got.double(), want.double()
    assert torch.isfinite(got).all(), f"{(~torch.isfinite(got)).sum()} values are not finite"
    error = ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
    assert error < tolerance, f"relative error {error:.1e}"


def vector_add(n: int = 1000) -> None:
    x, y, out = torch.randn(n), torch.randn(n), unwritten(n)
    vector_add_kernel[(triton.cdiv(n, 256),)](x, y, out, n, BLOCK=256)
    assert torch.equal(out, x + y)


def softmax(rows: int = 9, columns: int = 333, stages: int = 2, num_warps: int = 4) -> None:
    x, out = torch.randn(rows, columns).bfloat16() * 3, unwritten(rows, columns, dtype=torch.bfloat16)
    # in every other row one value so large that the sum overflows if the maximum misses it
    x[torch.arange(0, rows, 2), torch.randint(columns, ((rows + 1) // 2,))] += 300
    softmax_kernel[(4,)](x, out, rows, columns, BLOCK=512, STAGES=stages, num_warps=num_warps)
    close(out, x.double().softmax(1), 4e-3)


def layer_norm(rows: int = 5, columns: int = 600) -> None:
    x, w, b = torch.randn(rows, columns).bfloat16() * 2 + 1, torch.randn(columns), torch.randn(columns)
    out, mean, scale = unwritten(rows, columns, dtype=torch.bfloat16), unwritten(rows), unwritten(rows)
    layer_norm_kernel[(rows,)](x, w, b, out, mean, scale, columns, 1e-5, BLOCK=256)
    close(out, torch.nn.functional.layer_norm(x.double(), (columns,), w.double(), b.double()), 4e-3)
    close(mean, x.double().mean(1), 1e-5)
    close(scale, (x.double().var(1, unbiased=False) + 1e-5).rsqrt(), 1e-5)


TOLERANCES = {"ieee": 1e-6, "tf32": 2e-3, "tf32x3": 1e-5}


def matmul(
    dtype: torch.dtype = torch.bfloat16,
    precision: str = "tf32",
    stages: int = 3,
    shape: tuple[int, int, int] = (70, 72, 104),
    tile: tuple[int, int, int] = (64, 64, 32),
) -> None:
    M, N, K = shape
    a, b, c = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), unwritten(M, N)
    grid = (triton.cdiv(M, tile[0]), triton.cdiv(N, tile[1]))
    matmul_kernel[grid](
        a, b, c, M, N, K, K, N, N, BM=tile[0], BN=tile[1], BK=tile[2], PRECISION=precision, num_stages=stages
    )
    close(c, a.double() @ b.double(), TOLERANCES[precision] if dtype == torch.float32 else 1e-6)


def attention(length: int = 100, channels: int = 64, stages: int = 2) -> None:
    q, k, v = (torch.randn(length, channels).bfloat16() for _ in range(3))
    q[::3] *= 300  # scores so far apart that the sum overflows if the maximum misses one
    out = unwritten(length, channels)
    grid = (triton.cdiv(length, 64),)
    attention_kernel[grid](q, k, v, out, length, 0.1, D=channels, BM=64, BN=64, num_stages=stages)
    scores = q.double() @ k.double().T * 0.1
    close(out, (scores * torch.tensor(2.0).double().log()).softmax(1) @ v.double(), 6e-3)


def histogram(n: int = 500) -> None:
    x = torch.randn(n)
    sums, largest = torch.zeros(16), torch.full((16,), -100.0)
    counts, slots = torch.zeros(17, dtype=torch.int32), torch.full((4,), -1, dtype=torch.int32)
    histogram_kernel[(4,)](x, sums, counts, largest, slots, n, BLOCK=128)
    padded = torch.cat([x, torch.full((-n % 16,), float("nan"))]).reshape(-1, 16)
    close(sums, padded.double().nansum(0), 1e-5)
    assert torch.equal(largest, padded.nan_to_num(-100).max(0)[0])
    assert torch.equal(counts[:16], (~padded.isnan()).sum(0).int())
    assert counts[16] == 4
    assert slots.sort()[0].tolist() == [0, 1, 2, 3]


def dropout(n: int = 3000) -> None:
    x, out = torch.ones(n), unwritten(n)
    dropout_kernel[(triton.cdiv(n, 1024),)](x, out, n, 0.25, 7, BLOCK=1024)
    zero, key = torch.zeros(n, dtype=torch.int64), (torch.tensor([7]), torch.tensor([0]))
    word = philox((torch.arange(n), zero, zero, zero), key)[0]
    number = torch.where(word >= 2**31, 2**32 - 1 - word, word).float() * 4.6566127342e-10
    assert torch.equal(out, torch.where(number > 0.25, 1 / torch.tensor(1 - 0.25), 0.0))


def gelu(n: int = 700) -> None:
    x, out = torch.randn(n) * 3, unwritten(n)
    gelu_kernel[(triton.cdiv(n, 256),)](x, out, n, BLOCK=256)
    close(out, torch.nn.functional.gelu(x.double()), 1e-6)
