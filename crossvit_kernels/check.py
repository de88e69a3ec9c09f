"""Every kernel of this machine against its definition in float64, on small odd shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from . import native
from .backends import BACKENDS
from .cross_attention import cross_attention
from .cross_fusion import FusionWeights, cross_fusion


def check_all() -> Iterator[tuple[str, bool]]:
    """What was compared, and whether it agreed, one after the other: on the CPU, then on a GPU if any."""
    isas = native.load().isas() if native.load_error() is None else []
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for operation in (_cross_attention, _cross_fusion):
        name = operation.__name__.lstrip("_")
        for device in devices:
            for backend, known in BACKENDS.items():
                if known.missing() is not None or device not in (known.devices or devices):
                    continue
                for isa in isas if backend == "cpu" else [None]:
                    where = f"{backend} on {device}" if isa is None else f"{backend} with {isa}"
                    with nullcontext() if isa is None else native.use_isa(isa):
                        yield _check(f"{name}, {where}", operation, backend, device)
    for isa in isas:
        with native.use_isa(isa):
            yield _check_layer_norm_statistics(f"native {isa}", "cpu")
    if "cuda" in devices and native.has_cuda():
        yield _check_layer_norm_statistics("native CUDA", "cuda")


def _relative_error(got: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp_min(1e-30)
    return ((got.double() - expected).abs().max() / scale).item()


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _norm(width: int) -> list[Tensor]:
    return [1 + _normal(width) / 10, _normal(width)]


def _linear(rows: int, columns: int) -> list[Tensor]:
    return [_normal(rows, columns) / columns**0.5, _normal(rows)]


def _attention_weights(width: int) -> list[Tensor]:
    return [*_norm(width), *(x for _ in range(4) for x in _linear(width, width))]


def _cross_attention(backend: str) -> tuple[list[Tensor], Callable]:
    """Arguments and the operation of them."""
    tensors = [_normal(3, 1, 96), _normal(3, 41, 96), *_attention_weights(96)]
    return tensors, lambda *x: [cross_attention(*x, num_heads=3, backend=backend)]


def _cross_fusion(backend: str) -> tuple[list[Tensor], Callable]:
    tensors = [_normal(3, 42, 40), _normal(3, 18, 96)]
    for own, other in ((40, 96), (96, 40)):
        tensors += [*_norm(own), *_linear(other, own), *_attention_weights(other)]
        tensors += [*_norm(other), *_linear(own, other)]

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        weights = FusionWeights(*x[2:20]), FusionWeights(*x[20:])
        return cross_fusion(x[0], x[1], *weights, num_heads=(3, 4), backend=backend)

    return tensors, run


def _check(what: str, operation: Callable, backend: str, device: str) -> tuple[str, bool]:
    def results(dtype: torch.dtype, name: str) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tensors, run = operation(name)
        leaves = [x.to(device, dtype).requires_grad_() for x in tensors]
        outputs = run(*leaves)
        # Squared, so that the incoming gradient is not constant.
        loss = torch.stack([y.square().sum() for y in outputs]).sum()
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    pairs = zip(results(torch.float32, backend), results(torch.float64, "reference"), strict=True)
    # The gradient of k's bias is zero: only rounding is left of it, which has no relative size.
    worst = max(_relative_error(got, want) for got, want in pairs if want.abs().max() > 1e-9)
    return f"{what}: forward and gradients {worst:.1e} relative", worst < 1e-5


def _check_layer_norm_statistics(where: str, device: str) -> tuple[str, bool]:
    x = torch.randn(37, 231, generator=torch.Generator().manual_seed(0)) * 3 + 30
    mean, rstd = (y.cpu() for y in native.layer_norm_statistics(x.to(device)))
    wide = x.double()
    want = wide.mean(1), (wide.var(1, correction=0) + 1e-6).rsqrt()
    error = max(_relative_error(mean, want[0]), _relative_error(rstd, want[1]))
    return f"layer_norm_statistics, {where}: {error:.1e} relative", error < 1e-5
