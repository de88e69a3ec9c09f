"""Operators whose forward is a kernel and whose gradients are those of their definition.

The definition is a function of tensors, some of which are None, and of further arguments, in PyTorch's
operators. Forward saves its inputs and nothing else; backward computes the definition again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .library import any_requires_grad, define, differentiate_by, vjp
from .modes import without_autocast
from .validation import as_outside_of_operators


def operator(
    name: str, tensors: Sequence[str], options: Sequence[str], kernel: Callable, definition: Callable
) -> tuple[Any, Any, Callable]:
    """Makes `crossvit_kernels::<name>` and its backward.

    Args:
        tensors: how a schema declares the leading arguments, "Tensor x" or "Tensor? bias".
        options: the same of the other arguments.
        kernel: what computes on the CPU, a function of all of them; the result is contiguous.
        definition: likewise; also what gives shape and dtype of the result.

    Returns:
        Both operators, and the function of all arguments that is differentiable any number of times.
    """
    count = len(tensors)

    def empty_result(*args: Any) -> Tensor:
        like = definition(*args)
        return like.new_empty(like.shape)

    def gradients(grad: Tensor, args: Sequence[Any], wanted: Sequence[bool]) -> list[Tensor | None]:
        """Of the tensors that are wanted, by differentiating the definition; differentiable."""
        given = [i for i in range(count) if wanted[i] and args[i] is not None]

        def of_wanted(*some: Tensor) -> tuple[Tensor]:
            filled = list(args)
            for i, x in zip(given, some, strict=True):
                filled[i] = x
            return (definition(*filled),)

        found = dict(zip(given, vjp(of_wanted, tuple(args[i] for i in given), (grad,)), strict=True))
        return [found.get(i) for i in range(count)]

    def backward_kernel(grad: Tensor, *args: Any) -> list[Tensor]:
        wanted = args[-1]
        with as_outside_of_operators(), without_autocast(grad.device.type):
            leaves = [
                x.detach().requires_grad_(wanted[i]) if isinstance(x, Tensor) else x
                for i, x in enumerate(args[:-1])
            ]
            given = [i for i in range(count) if wanted[i] and leaves[i] is not None]
            y = definition(*leaves)
            of = [leaves[i] for i in given]
            found = torch.autograd.grad(y, of, grad.to(y.dtype), materialize_grads=True) if of else ()
        results = dict(zip(given, map(_settled, found), strict=True))
        return [results.get(i, grad.new_empty(0)) for i in range(count)]

    def empty_gradients(grad: Tensor, *args: Any) -> list[Tensor]:
        wanted = args[-1]
        return [
            x.new_empty(x.shape) if x is not None and wanted[i] else grad.new_empty(0)
            for i, x in enumerate(args[:count])
        ]

    declared = ", ".join((*tensors, *options))
    forward = define(f"{name}({declared}) -> Tensor", kernel, empty_result, ["CPU"])
    backward = define(
        f"{name}_backward(Tensor grad, {declared}, bool[] wanted) -> Tensor[]",
        backward_kernel,
        empty_gradients,
    )

    class ByDefinition(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Tensor:
            return forward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
            ctx.options = inputs[count:]
            ctx.save_for_backward(*inputs[:count])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple:
            args = (*ctx.saved_tensors, *ctx.options)
            wanted = [bool(need) for need in ctx.needs_input_grad[:count]]
            if torch.is_grad_enabled():  # the gradient is to be differentiated again
                found = gradients(grad, args, wanted)
            else:
                found = backward(grad, *args, wanted)
            results = [g if need else None for g, need in zip(found, wanted, strict=True)]
            return (*results, *(None for _ in options))

    def differentiable(*args: Any) -> Tensor:
        if torch.is_grad_enabled() and any_requires_grad(args):
            return ByDefinition.apply(*args)
        return forward(*args)

    differentiate_by(forward, ByDefinition.apply)
    return forward, backward, differentiable


def _settled(x: Tensor) -> Tensor:
    """A result of an operator: contiguous, without a history, and no view of an input."""
    return x.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
