"""`python -m benchmarks.tune_linear`: measures tiles of the products of linear layers on this GPU.

Each candidate runs the package's own launch in a CUDA graph, with other data in the L2 cache before each
replay; the fastest goes into the `_MEASURED` of crossvit_kernels/linear/triton_table.py. Candidates that do
not compile or do not fit are passed over.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from rich.progress import track

from crossvit.variants import VARIANTS
from crossvit_kernels.cross_attention.triton_table import nearest
from crossvit_kernels.linear import triton_launch, triton_table
from crossvit_kernels.linear.triton_table import Tiles, has_tma

from . import tune_triton
from .compiled_layers import linear_layers

TABLE = Path(triton_table.__file__)
BATCH = 256
Key = tuple[str, torch.dtype, int, int, bool, bool]
Shape = tuple[int, int, int, str]  # rows, depth, columns, and what stands around the product


def candidates(architecture: str, narrow: bool) -> Iterator[Tiles]:
    """What is worth a measurement."""
    tma = has_tma(architecture)
    large = ((256, 128, 8), (128, 256, 8)) if tma else ()
    steps = ((64, 3), (64, 4), (32, 4)) if tma else ((32, 3), (32, 4), (64, 3))
    for (rows, columns, warps), (step, stages) in itertools.product(
        (*large, (128, 128, 8), (64, 128, 4), (128, 64, 4)), steps
    ):
        limit = None if tma and warps == 8 else 128
        slice_ = max(32 if narrow else 64, columns // 4)  # at most four of them
        yield Tiles(rows, columns, step, slice_, warps, stages, tma, limit)


def shapes(variant: str) -> list[Shape]:
    """Of the layers of both branches at a batch of 256: forward, and the gradients of their inputs."""
    row = next(v for v in VARIANTS.values() if variant in v.names)
    found = []
    for size, patch, channels in zip(row.image_sizes, row.patch_sizes, row.widths, strict=True):
        rows = BATCH * (1 + (size // patch) ** 2)
        for _, (k, n, norm, activation, residual) in linear_layers(channels, row.mlp_ratio * channels):
            around = activation or ("residual" if residual else "norm")
            found.append((rows, k, n, around))
            found.append((rows, n, k, "norm_gradient" if norm else "activation_gradient"))
    return list(dict.fromkeys(found))


def prepared(shape: Shape) -> tuple[Key, Callable[[], None]]:
    """The table's key of a product on this GPU, and its launch."""
    rows, depth, columns, around = shape
    gradient = around.endswith("gradient")

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(size, dtype=dtype, device="cuda")

    x, y = empty(rows, depth), empty(rows, columns)
    weight = empty(depth, columns) if gradient else empty(columns, depth)
    colsum, bias = (empty(columns, dtype=torch.float32) for _ in range(2))
    statistics = triton_launch.Statistics(triton_launch.statistics(x))
    norm = {"bias": bias, "colsum": colsum, "statistics": statistics, "eps": 1e-6}
    sums = empty(1, 2, rows, dtype=torch.float32)
    options = {
        "norm": norm,
        "gelu": {"activation": "gelu", **norm},
        "residual": {"bias": bias, "residual": empty(rows, columns)},
        "norm_gradient": {
            "statistics": statistics,
            "eps": 1e-6,
            "scaled": True,
            "z": empty(rows, columns),
            "sums": sums,
        },
        "activation_gradient": {"activation": "gelu", "z": empty(rows, columns)},
    }[around]
    if gradient:
        options |= {"epilogue": around, "transposed": False}
    tma = has_tma(triton_launch.architecture_of_device())
    narrow = around == "activation_gradient" or (not tma and around in ("norm_gradient", "gelu"))
    key = (nearest(triton_launch.architecture_of_device()), x.dtype, depth, columns, narrow, False)
    return key, partial(triton_launch.product, x, weight, y, **options)


def fastest(
    call: Callable[[], None], tried: Sequence[Tiles], seconds: Callable[[Callable[[], None]], float]
) -> tuple[Tiles, float] | None:
    """The best of the candidates; None if none runs."""
    times = {}
    for tiles in tried:
        try:
            with mock.patch.object(triton_launch, "tiles_of_product", return_value=tiles):
                times[tiles] = seconds(call)
        except Exception as error:  # a configuration that this GPU has no room for
            print(f"{tiles}: {type(error).__name__}", file=sys.stderr)
    return min(times.items(), key=lambda item: item[1]) if times else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_linear", description=__doc__)
    parser.add_argument("--variant", default="crossvit_18", help="whose layers are measured")
    options = parser.parse_args(arguments)
    if not any(options.variant in v.names for v in VARIANTS.values()):
        parser.error(f"--variant: there is no {options.variant}: see `crossvit models`")
    if not torch.cuda.is_available():
        print("a GPU is needed to measure on", file=sys.stderr)
        return 2
    measured = dict(triton_table._MEASURED)
    for shape in track(shapes(options.variant), "measuring"):
        key, call = prepared(shape)
        found = fastest(call, list(candidates(key[0], key[4])), tune_triton.seconds)
        if found is not None:
            measured[key] = found[0]
            print(f"{shape}: {found[0]}, {found[1] * 1e6:.1f} us")
            tune_triton.write(measured, TABLE)  # what is measured stays, if the run ends early
    return 0


if __name__ == "__main__":
    sys.exit(main())
