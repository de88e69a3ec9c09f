"""Linear layers of the GPU backends as an operator of torch, with kernels of its own for the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..library import any_requires_grad, define, differentiate_by, vjp
from . import reference

_TENSORS = ("x", "weight", "bias", "norm_weight", "norm_bias", "residual", "residual_scale")
_DIFFERENTIABLE = 5  # the first so many have gradients of their own; that of the residual is the incoming one


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    residual_scale: Tensor | None = None,
) -> Tensor:
    """As the definition, by Triton's kernels; without a gradient of residual_scale."""
    args = (x, weight, bias, norm_weight, norm_bias, residual, residual_scale, eps, activation)
    if torch.is_grad_enabled() and any_requires_grad(args):
        return Linear.apply(*args, True)[0]
    return FORWARD(*args, False)[0]


def _keeps_z(args: Sequence[Any]) -> tuple[bool, bool]:
    """Whether backward needs z, the product with its bias, and whether that is another tensor than y."""
    _, _, _, norm_weight, _, residual, residual_scale, _, activation = args[:9]
    needed = activation is not None or norm_weight is not None
    return needed, needed and not (activation is None and residual is None and residual_scale is None)


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _forward(*args: Any) -> tuple[Tensor, ...]:
    from . import triton_launch as launch

    x, weight, bias, gamma, beta, residual, scale, eps, activation, saves = args
    bias, gamma, beta, scale = map(_dense, (bias, gamma, beta, scale))
    y, z, *rest = _forward_fake(*args)
    if y.numel() == 0:
        return y, z, *rest
    outputs = weight.shape[0]
    matrix, to = launch.rows_of(x), y.view(-1, outputs)
    given: dict[str, Any] = {"bias": bias, "activation": activation}
    if gamma is not None:
        folded, vectors = launch.fold(weight, bias, gamma, beta)
        given["bias"] = vectors[1]
        if launch.defers(x, weight):
            statistics = launch.statistics(matrix)
            given |= {"colsum": vectors[0], "statistics": launch.Statistics(statistics), "eps": eps}
        else:
            matrix, statistics = launch.normalise(matrix, eps, weight.dtype)
        rest = [statistics, folded, vectors] if saves else rest
        weight = folded
    launch.product(
        *(launch.rows_of(matrix.to(weight.dtype)), launch.rows_of(weight), to),
        z=z.view(-1, outputs) if z.numel() else None,
        residual=None if residual is None else launch.rows_of(residual),
        scale=scale,
        **given,
    )
    return y, z, *rest


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    x, weight, _, gamma, _, _, _, _, _, saves = args
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    kept, saved = saves and _keeps_z(args)[1], saves and gamma is not None and y.numel() > 0
    return (
        y,
        weight.new_empty(y.shape if kept else (0,)),
        x.new_empty((1, 2, y.numel() // weight.shape[0]) if saved else (0,), dtype=torch.float32),
        weight.new_empty(weight.shape if saved else (0,)),
        x.new_empty((2, weight.shape[0]) if saved else (0,), dtype=torch.float32),
    )


def _backward(grad: Tensor, *args: Any) -> list[Tensor]:
    from . import triton_launch as launch

    x, weight, gamma, beta, scale, z, *kept, eps, activation, wanted = args
    gamma, beta, scale = map(_dense, (gamma, beta, scale))
    results = _backward_fake(grad, *args)
    outputs, channels = weight.shape
    if grad.numel() == 0:
        return [result.zero_() for result in results]
    dy, matrix = launch.rows_of(grad), launch.rows_of(x)
    norm, deferred = None, launch.defers(x, weight)
    if gamma is not None:
        statistics, folded, (colsum, offset) = kept
        norm = launch.Norm(folded, colsum, offset, launch.Statistics(statistics), eps, deferred)
    sums = None
    if gamma is None and activation is None and scale is None:
        dz = launch.rows_of(dy.to(weight.dtype))
        beside = launch.ones_beside(dz)
    else:
        z = None if z is None else z.reshape(-1, outputs)
        dz, sums, beside = launch.gradient_of_rows(
            dy, weight.dtype, activation=activation, z=z, scale=scale, norm=norm, channels=channels
        )
    if norm is not None and not deferred:
        matrix, _ = launch.normalise(matrix, eps, weight.dtype)
    if wanted[0]:
        dx = results[0].view(-1, channels)
        if norm is None:
            launch.product(dz, launch.rows_of(weight), dx, transposed=False)
        else:
            launch.product(
                *(dz, norm.weight, dx),
                epilogue="norm_gradient",
                transposed=False,
                statistics=norm.statistics,
                eps=eps,
                scaled=deferred,
                z=matrix,
                sums=sums,
            )
    if any(wanted[1:]):
        found = launch.weight_gradient(
            *(dz, launch.rows_of(matrix.to(weight.dtype)), beside),
            means=norm is not None and deferred,
            weight=weight,
            gamma=gamma,
            beta=beta,
            bias=wanted[2],
        )
        for i, gradient in enumerate(found, 1):
            if wanted[i] and gradient is not None:
                results[i] = gradient
    return results


def _backward_fake(grad: Tensor, *args: Any) -> list[Tensor]:
    x, weight, gamma, beta = args[:4]
    wanted = args[-1]
    like = (x, weight, weight.new_empty(weight.shape[0]) if wanted[2] else None, gamma, beta)
    return [
        t.new_empty(t.shape) if t is not None and want else grad.new_empty(0)
        for t, want in zip(like, wanted, strict=True)
    ]


_INPUTS = ", ".join(f"Tensor{'?' if i > 1 else ''} {name}" for i, name in enumerate(_TENSORS))
FORWARD = define(
    f"linear_triton({_INPUTS}, float eps, str? activation, bool saves) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
BACKWARD = define(
    "linear_triton_backward(Tensor grad, Tensor x, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? residual_scale, Tensor? z, Tensor statistics, Tensor folded, Tensor vectors, float eps, "
    "str? activation, bool[] wanted) -> Tensor[]",
    _backward,
    _backward_fake,
)


class Linear(torch.autograd.Function):
    """y; the other results of the operator are for backward alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return FORWARD(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, weight, bias, gamma, beta, _, scale, ctx.eps, ctx.activation, _ = inputs
        y, z, *kept = output
        ctx.mark_non_differentiable(z, *kept)
        needed, other = _keeps_z(inputs)
        # The bias is for second derivatives, which go through the definition.
        ctx.save_for_backward(
            *(x, weight, bias, gamma, beta, scale), (z if other else y) if needed else None, *kept
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        x, weight, bias, gamma, beta, scale, z, *kept = ctx.saved_tensors
        wanted = [bool(need) for need in ctx.needs_input_grad[:_DIFFERENTIABLE]]
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():  # the gradient is to be differentiated again

            def without_residual(*some: Any) -> tuple[Tensor]:
                x, weight, bias, gamma, beta = some
                y = reference.linear(x, weight, bias, gamma, beta, None, ctx.eps, ctx.activation, scale)
                return (y,)

            found = vjp(without_residual, (x, weight, bias, gamma, beta), (grad,))
        else:
            found = BACKWARD(grad, x, weight, gamma, beta, scale, z, *kept, ctx.eps, ctx.activation, wanted)
        results = (g if need else None for g, need in zip(found, wanted, strict=True))
        return *results, grad if ctx.needs_input_grad[5] else None, *[None] * 4


differentiate_by(FORWARD, lambda *args: Linear.apply(*args[:-1], True))
