"""Every kernel of this machine against its definition in float64, on small odd shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import native
from .backends import BACKENDS
from .cross_attention import IMPLEMENTATIONS, cross_attention


def check_all() -> Iterator[tuple[str, bool]]:
    """What was compared, and whether it agreed, one after the other: on the CPU, then on a GPU if any."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for backend in IMPLEMENTATIONS:
            if BACKENDS[backend].missing() is None:
                yield _check_cross_attention(backend, device)
    if native.load_error() is None:
        for isa in native.load().isas():
            yield _check_layer_norm_statistics(isa, "cpu")
        if "cuda" in devices and native.has_cuda():
            yield _check_layer_norm_statistics("auto", "cuda")


def _relative_error(got: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp_min(1e-30)
    return ((got.double() - expected).abs().max() / scale).item()


def _check_cross_attention(backend: str, device: str) -> tuple[str, bool]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width = 96
    tensors = [normal(3, 1, width), normal(3, 41, width), 1 + normal(width) / 10, normal(width)]
    for _ in range(4):
        tensors += [normal(width, width) / width**0.5, normal(width)]

    def outputs(dtype: torch.dtype, name: str) -> list[Tensor]:
        leaves = [x.to(device, dtype).requires_grad_() for x in tensors]
        y = cross_attention(*leaves, num_heads=3, backend=name)
        # Squared, so that the incoming gradient is not constant.
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    pairs = zip(outputs(torch.float32, backend), outputs(torch.float64, "reference"), strict=True)
    # wk's bias has gradient zero: only rounding is left of it, which has no relative size.
    errors = [_relative_error(got, want) for i, (got, want) in enumerate(pairs) if i != 8]
    worst = max(errors)
    return (
        f"cross_attention, {backend} on {device}, forward and gradients: {worst:.1e} relative",
        worst < 1e-5,
    )


def _check_layer_norm_statistics(isa: str, device: str) -> tuple[str, bool]:
    x = torch.randn(37, 231, generator=torch.Generator().manual_seed(0)) * 3 + 30
    mean, rstd = (y.cpu() for y in native.layer_norm_statistics(x.to(device), isa=isa))
    wide = x.double()
    want = wide.mean(1), (wide.var(1, correction=0) + 1e-6).rsqrt()
    error = max(_relative_error(mean, want[0]), _relative_error(rstd, want[1]))
    where = f"native {isa}" if device == "cpu" else "native CUDA"
    return f"layer_norm_statistics, {where}: {error:.1e} relative", error < 1e-5
