"""The operations of a block one by one, against PyTorch's and the least time that the machine allows.

Three limits, each measured here: products at the rate of a large matrix product, bytes read and written once
at the rate of a sum and a fill of as many, exponentials at that of torch.exp. The longest one binds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conftest import Race, assert_close, large
from benchmarks.test_fusion import THREADS, bytes_once
from crossvit_kernels import linear, pack_linear, patch_embed, self_attention
from crossvit_kernels.measure import interleaved

BATCH = 8
PEAK_SIZE = 2048
# A megabyte stays in a CPU's caches; a GPU needs more to be busy.
EXPONENTIALS = {"cpu": 1 << 18, "cuda": 1 << 27}
Make = Callable[[torch.dtype, torch.device], "Kernel"]


@dataclass
class Kernel:
    """An operation ready to run.

    Attributes:
        ours, theirs: this package's way, and PyTorch's operators. exact: its definition in float64.
        given: all inputs. flop: of products. exponentials: how many. held: bytes that ours keeps.
    """

    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    exact: Callable[[], Tensor]
    given: list[Tensor]
    flop: float
    exponentials: int = 0
    held: Callable[[], int] = lambda: 0


def linear_layer(
    tokens: int,
    inputs: int,
    outputs: int,
    norm: bool = False,
    activation: str | None = None,
    residual: bool = False,
) -> Make:
    def make(dtype: torch.dtype, device: torch.device) -> Kernel:
        options = {"dtype": dtype, "device": device}
        x = torch.randn(BATCH, tokens, inputs, **options)
        weight = torch.randn(outputs, inputs, **options) / inputs**0.5
        bias = torch.randn(outputs, **options) / 10
        gain = 1 + torch.randn(inputs, **options) / 10 if norm else None
        shift = torch.randn(inputs, **options) / 10 if norm else None
        other = torch.randn(BATCH, tokens, outputs, **options) if residual else None
        given = [x, weight, bias, *(t for t in (gain, shift, other) if t is not None)]
        layer = pack_linear(weight, bias, gain, shift)

        def theirs() -> Tensor:
            normed = F.layer_norm(x, (inputs,), gain, shift, 1e-6) if norm else x
            y = F.linear(normed, weight, bias)
            y = F.gelu(y) if activation else y
            return y if other is None else y + other

        def exact() -> Tensor:
            norms = {"norm_weight": gain, "norm_bias": shift, "residual": other}
            doubles = {name: t.double() for name, t in norms.items() if t is not None}
            weights = (x.double(), weight.double(), bias.double())
            return linear(*weights, activation=activation, **doubles, backend="reference")

        def ours() -> Tensor:
            return layer(x, activation=activation, residual=other)

        flop = 2.0 * BATCH * tokens * inputs * outputs
        return Kernel(ours, theirs, exact, given, flop, held=lambda: layer.nbytes)

    return make


def attention(tokens: int, channels: int, heads: int) -> Make:
    def make(dtype: torch.dtype, device: torch.device) -> Kernel:
        qkv = torch.randn(BATCH, tokens, 3 * channels, dtype=dtype, device=device)

        def theirs() -> Tensor:
            q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        return Kernel(
            lambda: self_attention(qkv, heads),
            theirs,
            lambda: self_attention(qkv.double(), heads, backend="reference"),
            [qkv],
            4.0 * BATCH * tokens**2 * channels,
            BATCH * heads * tokens**2,
        )

    return make


def patches(patch: int, size: int, channels: int) -> Make:
    def make(dtype: torch.dtype, device: torch.device) -> Kernel:
        options = {"dtype": dtype, "device": device}
        image = torch.randn(BATCH, 3, 240, 240, **options)
        weight = torch.randn(channels, 3, patch, patch, **options) / (3 * patch * patch) ** 0.5
        count = (size // patch) ** 2
        bias, cls = torch.randn(channels, **options), torch.randn(1, 1, channels, **options)
        position = torch.randn(1, 1 + count, channels, **options)
        given = [image, weight, bias, position, cls]

        def theirs() -> Tensor:
            seen = image if size == 240 else F.interpolate(image, size=(size, size), mode="bicubic")
            x = F.conv2d(seen, weight, bias, stride=patch).flatten(2).mT
            return torch.cat((cls.expand(BATCH, -1, -1), x), dim=1) + position

        resized = None if size == 240 else (size, size)
        return Kernel(
            lambda: patch_embed(*given, size=resized),
            theirs,
            lambda: patch_embed(*(t.double() for t in given), size=resized, backend="reference"),
            given,
            2.0 * BATCH * count * 3 * patch * patch * channels,
        )

    return make


KERNELS: dict[str, Make] = {
    "S, LayerNorm and qkv": linear_layer(401, 224, 672, norm=True),
    "L, LayerNorm and qkv": linear_layer(197, 448, 1344, norm=True),
    "L, LayerNorm, fc1 and GELU": linear_layer(197, 448, 1344, norm=True, activation="gelu"),
    "L, fc2 and residual": linear_layer(197, 1344, 448, residual=True),
    "S, attention": attention(401, 224, 7),
    "L, attention": attention(197, 448, 7),
    "S, patches": patches(12, 240, 224),
    "L, resized image and patches": patches(16, 224, 448),
}
CASES = [THREADS[0]] if len(THREADS) == 1 else [THREADS[0], large(THREADS[1])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("threads", CASES, indirect=True)
@pytest.mark.benchmark(group="operations of crossvit_18, eight images")
def test_kernels(name, threads, dtype, device, race: Race, benchmark):
    torch.manual_seed(0)
    kernel = KERNELS[name](dtype, device)  # with parameters as a model's, which have versions
    with torch.inference_mode():
        bound = 5e-2 if dtype == torch.bfloat16 else 1e-5 if device.type == "cpu" else 5e-3
        result = kernel.ours()
        assert_close([result], [kernel.exact()], bound)
        assert_close([kernel.theirs()], [kernel.exact()], 10 * bound)
        limit = bytes_once(kernel.given, [result])
        rivals = {"PyTorch": kernel.theirs, "bytes once": limit}
        race(kernel.ours, rivals, held=lambda name: kernel.held() if name == "ours" else 0)
        rates = limits(dtype, device)
    info = benchmark.extra_info
    bytes_row = info.pop("against bytes once")
    info["seconds"] = {"ours": bytes_row["ours_seconds"]}
    info["limits"] = {"bytes, once": bytes_row["rival_seconds"], "products": kernel.flop / rates["flop"]}
    if kernel.exponentials:
        info["limits"]["exponentials"] = kernel.exponentials / rates["exponentials"]


def limits(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Products in FLOP a second, and exponentials a second, that torch reaches on the threads of now."""
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, device=device).to(dtype) for _ in range(2))
    ways = {"flop": lambda: a @ b}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        x, weight = a.to_mkldnn(), b.to_mkldnn()
        ways["flop, oneDNN"] = lambda: torch._C._nn.mkldnn_linear(x, weight, None)
    count = EXPONENTIALS[device.type]
    numbers, out = torch.randn(2, count, device=device)
    samples = interleaved({**ways, "exponentials": lambda: torch.exp(numbers, out=out)}, 5, device)
    times = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "flop": 2 * PEAK_SIZE**3 / min(times[name] for name in ways),
        "exponentials": count / times["exponentials"],
    }
