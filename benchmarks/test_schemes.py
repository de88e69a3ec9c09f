"""The five fusions of the paper as the number of tokens grows: time and memory of one fusion of CrossViT-S.

Cross-attention is linear in both, all-attention quadratic in time; exponents are fitted to larger sizes.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Race, large, print_line
from crossvit import create_model
from crossvit.encoder import FUSIONS

MODEL = "crossvit_small"
SIZES = [112, 240, 480, large(720), large(1024)]
FITTED_FROM = 400  # tokens; below, calls themselves cost more than what they do


def tokens_of(size: int, device: torch.device) -> tuple[list[Tensor], list[tuple[int, int]]]:
    model = create_model(MODEL, device="meta")
    grids = model.grid_sizes((size, size))
    widths = zip(grids, model.embed_dim, strict=True)
    return [torch.randn(1, 1 + rows * columns, c, device=device) for (rows, columns), c in widths], grids


@pytest.fixture(scope="module")
def found() -> dict[str, dict[int, tuple[float, float]]]:
    """Of each fusion: tokens -> (seconds, bytes)."""
    return {name: {} for name in FUSIONS if name != "none"}


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size}px")
@pytest.mark.benchmark(group="fusions as the number of tokens grows")
def test_schemes(size, device, race: Race, benchmark, found):
    torch.manual_seed(0)
    tokens, grids = tokens_of(size, device)
    encoders = {name: create_model(MODEL, fusion=name).blocks[0].eval().to(device) for name in found}

    def run(name: str) -> list[Tensor]:
        with torch.inference_mode():
            return encoders[name].fuse(tokens, grids=grids)

    for name in found:
        assert all(torch.isfinite(y).all() for y in run(name))
    race(lambda: run("cross"), {name: (lambda n=name: run(n)) for name in found if name != "cross"})
    info: dict[str, Any] = benchmark.extra_info
    count = sum(x.shape[1] for x in tokens)
    info |= {"tokens": count, "pixels": size}
    for name in found:
        race_of = next(v for k, v in info.items() if k.startswith("against ")) if name == "cross" else None
        seconds = race_of["ours_seconds"] if race_of else info[f"against {name}"]["rival_seconds"]
        found[name][count] = seconds, info["peak_bytes"]["ours" if name == "cross" else name]


def exponent(points: dict[int, float]) -> float:
    """The slope of a line through the logarithms, by least squares."""
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in sorted(points.items())), strict=True)
    mean = sum(xs) / len(xs)
    return sum((x - mean) * y for x, y in zip(xs, ys, strict=True)) / sum((x - mean) ** 2 for x in xs)


@pytest.mark.benchmark(group="fusions as the number of tokens grows")
def test_schemes_exponents(benchmark, found):
    """Fitted to what the sizes before have taken; alone there is nothing to fit."""
    for name, points in found.items():
        larger = {n: point for n, point in points.items() if n >= FITTED_FROM}
        if len(larger) < 2:
            pytest.skip("the sizes have to run in the same session: pytest benchmarks -k schemes")
        of_time, of_memory = (
            exponent({n: max(p[i], 1) if i else p[i] for n, p in larger.items()}) for i in (0, 1)
        )
        benchmark.extra_info[name] = {"time": of_time, "memory": of_memory}
        print_line(f"{name:10s} time grows with tokens to the power {of_time:.2f}, memory {of_memory:.2f}")
    benchmark.pedantic(lambda: None, rounds=1)
