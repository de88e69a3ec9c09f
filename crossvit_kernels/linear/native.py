"""The call into csrc/linear."""

from __future__ import annotations

import torch
from torch import Tensor

from ..program import Activation, Kind, Program, in_images, precision_of, rows_of, run, threads_for
from .packed import PackedLinear

ACTIVATIONS = {None: Activation.NONE, "gelu": Activation.GELU, "relu": Activation.RELU}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    """As the definition, with a weight that is packed for this call alone."""
    packed = PackedLinear(weight, bias, norm_weight, norm_bias, precision=precision_of(weight.dtype))
    return with_packed(x, packed, residual, eps if norm_weight is not None else None, activation)


def with_packed(
    x: Tensor, packed: PackedLinear, residual: Tensor | None, eps: float | None, activation: str | None
) -> Tensor:
    """activation(LayerNorm(x) weight^T + bias) + residual; `eps` is None where there is no LayerNorm.

    Raises:
        ValueError: a tensor would be read wrongly.
    """
    if x.shape[-1] != packed.channels:
        raise ValueError(f"x must have {packed.channels} channels, as the weight has, got {x.shape[-1]}")
    out = torch.empty((*x.shape[:-1], packed.outputs), dtype=x.dtype, device="cpu")
    if residual is not None and (residual.shape != out.shape or residual.dtype != out.dtype):
        raise ValueError(
            f"residual must be {out.dtype} {list(out.shape)}, as the result is, "
            f"got {residual.dtype} {list(residual.shape)}"
        )
    if out.numel() == 0:
        return out
    tensors = in_images(x, out) if residual is None else in_images(x, out, residual)
    images, rows, _ = tensors[0].shape
    places = [rows_of(y) for y in tensors]
    program = Program()
    program.images()
    program.add(
        Kind.LINEAR,
        packed.step(
            *(places[0], places[1], rows, ACTIVATIONS[activation]),
            eps=eps,
            residual=None if residual is None else places[2],
        ),
    )
    operations = 2 * images * rows * packed.channels * packed.outputs
    run(program.packed(), images, threads=threads_for(operations))
    return out
