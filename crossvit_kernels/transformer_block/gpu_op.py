"""A transformer block of the GPU backends as an operator of torch, with its own kernels for gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..library import any_requires_grad, define, differentiate_by, vjp
from . import reference
from .saved import Saved, empty_saved

_WEIGHTS = 12


def transformer_block(
    x: Tensor,
    weights: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    num_heads: int,
    attention_scale: float,
    eps: tuple[float, float],
    dtype: torch.dtype,
) -> Tensor:
    """As the definition, by Triton's kernels; without gradients of the scales."""
    options = (num_heads, attention_scale, *eps, dtype)
    if torch.is_grad_enabled() and any_requires_grad((x, *weights)):
        return TransformerBlock.apply(x, *scales, *options, *weights)[0]
    return FORWARD(x, weights, *scales, *options, False)[0]


def _forward(
    x: Tensor,
    weights: list[Tensor | None],
    scale1: Tensor | None,
    scale2: Tensor | None,
    num_heads: int,
    attention_scale: float,
    eps1: float,
    eps2: float,
    dtype: torch.dtype,
    saves: bool,
) -> tuple[Tensor, ...]:
    from . import triton_launch

    y, saved = triton_launch.forward(
        x, weights, (scale1, scale2), num_heads, attention_scale, (eps1, eps2), dtype, saves
    )
    return y, *saved


def _forward_fake(
    x: Tensor,
    weights: list[Tensor | None],
    scale1: Tensor | None,
    scale2: Tensor | None,
    num_heads: int,
    attention_scale: float,
    eps1: float,
    eps2: float,
    dtype: torch.dtype,
    saves: bool,
) -> tuple[Tensor, ...]:
    fc1 = weights[8]
    assert fc1 is not None
    return x.new_empty(x.shape), *empty_saved(x, fc1.shape[0], num_heads, dtype, saves)


def _backward(
    grad: Tensor,
    x: Tensor | None,
    weights: list[Tensor | None],
    scale1: Tensor | None,
    scale2: Tensor | None,
    saved: list[Tensor],
    num_heads: int,
    attention_scale: float,
    eps1: float,
    eps2: float,
    dtype: torch.dtype,
    wanted: list[bool],
) -> list[Tensor]:
    from . import triton_launch

    if grad.numel() == 0:
        return [g.zero_() for g in _empty_gradients(grad, weights, wanted)]
    kept = Saved(*(t.contiguous() for t in saved))
    dx, found = triton_launch.backward(
        *(grad, x, weights, (scale1, scale2), kept),
        *(num_heads, attention_scale, (eps1, eps2), dtype, wanted),
    )
    return [dx, *(grad.new_empty(0) if g is None else g for g in found)]


def _backward_fake(
    grad: Tensor, x: Tensor | None, weights: list[Tensor | None], *others: Any
) -> list[Tensor]:
    return _empty_gradients(grad, weights, others[-1])


def _empty_gradients(grad: Tensor, weights: list[Tensor | None], wanted: list[bool]) -> list[Tensor]:
    found = [
        w.new_empty(w.shape) if w is not None and want else grad.new_empty(0)
        for w, want in zip(weights, wanted, strict=True)
    ]
    return [grad.new_empty(grad.shape), *found]


_GIVEN = "Tensor?[] weights, Tensor? scale1, Tensor? scale2"
_OPTIONS = "int num_heads, float attention_scale, float eps1, float eps2, ScalarType dtype"
FORWARD = define(
    f"transformer_block_triton(Tensor x, {_GIVEN}, {_OPTIONS}, bool saves) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
BACKWARD = define(
    f"transformer_block_triton_backward(Tensor grad, Tensor? x, {_GIVEN}, Tensor[] saved, {_OPTIONS}, "
    "bool[] wanted) -> Tensor[]",
    _backward,
    _backward_fake,
)


class TransformerBlock(torch.autograd.Function):
    """y, and what forward leaves for backward (`Saved`).

    Saves the weights as they are, and x, but for calls whose matrices have another dtype than x: these save
    its normalised rows in that dtype, which take half of the memory.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        # Takes x, scale1, scale2, num_heads, attention_scale, eps1, eps2, dtype, then the weights.
        return FORWARD(args[0], args[8:], *args[1:8], True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, scale1, scale2, *options = inputs
        ctx.options, weights = options[:5], options[5:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if x.dtype == ctx.options[-1] else None, scale1, scale2, *output[1:], *weights
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, scale1, scale2, *others = ctx.saved_tensors
        saved, weights = others[:-_WEIGHTS], others[-_WEIGHTS:]
        needs = ctx.needs_input_grad
        wanted = [bool(need) for need in needs[8:]]
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            if x is None:
                raise RuntimeError(
                    "transformer_block keeps no input where matrices have another dtype than the tokens, so "
                    "its gradient cannot be differentiated again: call it with backend='torch'"
                )
            num_heads, attention_scale, *eps, dtype = ctx.options

            def of_inputs(x: Tensor, *weights: Tensor | None) -> tuple[Tensor]:
                options = (num_heads, attention_scale, (eps[0], eps[1]), dtype)
                return (reference.transformer_block(x, weights, (scale1, scale2), *options),)

            found = vjp(of_inputs, (x, *weights), (grad,))
        else:
            found = BACKWARD(grad, x, weights, scale1, scale2, saved, *ctx.options, wanted)
        results = (found[0], *(None,) * 7, *found[1:])
        return tuple(g if need else None for g, need in zip(results, needs, strict=True))


def _differentiable(
    x: Tensor, weights: list[Tensor | None], scale1: Tensor | None, scale2: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    return TransformerBlock.apply(x, scale1, scale2, *options[:-1], *weights)


differentiate_by(FORWARD, _differentiable)
