"""The operations whose gradients are those of their definition: inputs, and oracles that others wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crossvit_kernels import linear, patch_embed, self_attention


@dataclass(frozen=True)
class Operation:
    """`run` of tensors (some None), a backend and options; `operator_call` gives an operator's arguments."""

    name: str
    names: tuple[str, ...]
    inputs: Callable[[], list[Tensor]]  # in float64
    run: Callable[..., Tensor]
    oracle: Callable[[Sequence[Tensor]], Tensor]
    operator_arguments: Callable[[Sequence[Tensor]], tuple[Any, ...]]

    def __str__(self) -> str:
        return self.name


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# Linear


def linear_inputs(shape: Sequence[int] = (2, 5), channels: int = 7, outputs: int = 9) -> list[Tensor]:
    """x, weight, bias, norm_weight, norm_bias, residual."""
    return [
        normal(*shape, channels) * 2 + 1,
        normal(outputs, channels) / channels**0.5,
        normal(outputs),
        1 + 0.3 * normal(channels),
        0.3 * normal(channels),
        normal(*shape, outputs),
    ]


def run_linear(
    x: Sequence[Tensor | None], backend: str = "cpu", activation: str | None = "gelu", **options: Any
) -> Tensor:
    tokens, weight, bias, norm_weight, norm_bias, residual = x
    return linear(
        *(tokens, weight, bias),
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        residual=residual,
        activation=activation,
        backend=backend,
        **options,
    )


def linear_oracle(x: Sequence[Tensor | None], activation: str | None = "gelu", eps: float = 1e-6) -> Tensor:
    tokens, weight, bias, norm_weight, norm_bias, residual = x
    y = tokens
    if norm_weight is not None:
        y = F.layer_norm(y, norm_weight.shape, norm_weight, norm_bias, eps)
    y = F.linear(y, weight, bias)
    y = {None: lambda y: y, "gelu": F.gelu, "relu": F.relu}[activation](y)
    return y if residual is None else y + residual


# Self-attention


def heads_of(qkv: Tensor, heads: int) -> list[Tensor]:
    """Queries, keys and values, [B, H, N, d] each."""
    return [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1)]


def attention_oracle(qkv: Tensor, heads: int, scale: float | None = None) -> Tensor:
    return F.scaled_dot_product_attention(*heads_of(qkv, heads), scale=scale).transpose(1, 2).flatten(2)


# Patches


def patch_inputs(
    image: Sequence[int] = (2, 3, 13, 17), patch: int = 4, channels: int = 9, grid: tuple[int, int] = (3, 4)
) -> list[Tensor]:
    """image, weight, bias, position, cls_token."""
    return [
        normal(*image),
        normal(channels, image[1], patch, patch) / (image[1] * patch**2) ** 0.5,
        normal(channels),
        normal(1, 1 + grid[0] * grid[1], channels),
        normal(1, 1, channels),
    ]


def patch_oracle(x: Sequence[Tensor | None], size: tuple[int, int] | None = None) -> Tensor:
    image, weight, bias, position, cls_token = x
    if size is not None:
        image = F.interpolate(image, size=size, mode="bicubic", align_corners=False)
    patches = F.conv2d(image, weight, bias, stride=weight.shape[-1]).flatten(2).mT
    return torch.cat((cls_token.expand(len(image), 1, -1), patches), 1) + position


OPERATIONS = (
    Operation(
        "linear",
        ("x", "weight", "bias", "norm_weight", "norm_bias", "residual"),
        linear_inputs,
        run_linear,
        linear_oracle,
        lambda x: (*x, 1e-6, "gelu"),
    ),
    Operation(
        "self_attention",
        ("qkv",),
        lambda: [normal(2, 5, 18)],
        lambda x, backend="cpu", **options: self_attention(x[0], 3, backend=backend, **options),
        lambda x: attention_oracle(x[0], 3),
        lambda x: (x[0], 3, 2**-0.5, x[0].dtype),
    ),
    Operation(
        "patch_embed",
        ("image", "weight", "bias", "position", "cls_token"),
        lambda: patch_inputs(),
        lambda x, backend="cpu", **options: patch_embed(*x, size=(12, 18), backend=backend, **options),
        lambda x: patch_oracle(x, (12, 18)),
        lambda x: (*x[:3], x[3][0], x[4].flatten(), [12, 18], None, None),
    ),
)
