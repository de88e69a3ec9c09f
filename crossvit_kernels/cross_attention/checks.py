"""What the arguments of the cross-attention and of the fusion have to be; every refusal is in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def got(tensor: Tensor) -> str:
    return f"got {list(tensor.shape)}"


def check_matrix(name: str, matrix: Tensor, letters: str, rows: int, columns: int) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != rows or matrix.shape[1] != columns:
        raise ValueError(f"{name} must have shape [{letters}] = [{rows}, {columns}], {got(matrix)}")


def check_vector(name: str, vector: Tensor | None, letter: str, length: int) -> None:
    if vector is not None and (vector.ndim != 1 or vector.shape[0] != length):
        raise ValueError(f"{name} must have shape [{letter}] = [{length}], {got(vector)}")


def check_heads(name: str, num_heads: int, letter: str, width: int) -> None:
    if width < 1:
        raise ValueError(f"{letter} must be at least 1, got {width}: a token needs channels")
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"{name} must divide {letter} = {width}, got {num_heads}")


def check_scale(name: str, scale: Tensor | None, batch: int, width: int, letter: str) -> None:
    if scale is not None and scale.shape not in ((batch,), (batch, 1, width)):
        raise ValueError(
            f"{name} must have shape [B] = [{batch}] or [B, 1, {letter}] = [{batch}, 1, {width}], "
            f"{got(scale)}"
        )


def check_devices_and_dtypes(
    first: str,
    tokens: Tensor,
    others: Mapping[str, Tensor | None],
    any_dtype: Iterable[str] = (),
    or_float32: Iterable[str] = (),
    autocast: bool = False,
) -> None:
    """`others` are on the device of `tokens`, called `first`, and of its dtype.

    Except for `any_dtype`; those called `or_float32` may be float32 as well.

    Raises:
        TypeError: a tensor is not floating-point, or its dtype differs outside autocast.
        RuntimeError: a device differs.
    """
    device, dtype = tokens.device, tokens.dtype
    if not tokens.is_floating_point():
        raise TypeError(f"{first} must be a floating-point tensor, got {dtype}")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise RuntimeError(f"{name} is on {tensor.device}, {first} on {device}: move them together")
        if tensor.dtype == dtype:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        kept = tensor.dtype == torch.float32 and dtype != torch.float64 and name in or_float32
        if not (autocast or kept or name in any_dtype):
            raise TypeError(
                f"{name} must have the dtype of {first}, {dtype}, got {tensor.dtype}: "
                "cast it, or run under torch.autocast to mix tokens and weights"
            )


def check_probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")


def matrix_dtype(tokens: Tensor, weight: Tensor, autocast: bool) -> torch.dtype:
    """The dtype of the projections: autocast's where it is on, but float64 is never rounded."""
    if not autocast:
        return weight.dtype
    return tokens.dtype if tokens.dtype == torch.float64 else torch.get_autocast_dtype(tokens.device.type)
