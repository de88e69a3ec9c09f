"""What the operators of torch.library have in common.

An operation's op.py defines `crossvit_kernels::<operation>` and its backward, functions of tensors without
side effects, and an autograd.Function around them. The public functions call that Function themselves;
`differentiate_by` lets the operator do the same for whoever calls it directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .modes import forward_mode, without_autocast

LIBRARY = torch.library.Library("crossvit_kernels", "DEF")


def define(schema: str, kernel: Callable, fake: Callable, devices: Sequence[str] = ("CPU", "CUDA")) -> Any:
    """The operator of this schema with its kernel and its shapes; under vmap it runs once a slice."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in devices:
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"crossvit_kernels::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.crossvit_kernels, name).default
    torch.library.register_vmap(f"crossvit_kernels::{name}", _once_a_slice(operator), lib=LIBRARY)
    return operator


def differentiate_by(operator: Any, differentiable: Callable) -> None:
    """Calls with anything that requires a gradient go to `differentiable`, which has the same arguments."""

    def dispatch(*args: Any) -> Any:
        if torch.is_grad_enabled() and any_requires_grad(args):
            return differentiable(*args)
        if forward_mode():
            raise NotImplementedError(f"{operator} has no forward-mode derivative: use the backend torch")
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    LIBRARY.impl(operator._schema.name.partition("::")[2], dispatch, "Autograd")


def any_requires_grad(args: Sequence[Any]) -> bool:
    """Whether a tensor among them, or in a list among them, requires a gradient."""
    for x in args:
        if isinstance(x, Tensor):
            if x.requires_grad:
                return True
        elif isinstance(x, (list, tuple)) and any_requires_grad(x):
            return True
    return False


def vjp(function: Any, inputs: tuple, grads: tuple) -> tuple[Tensor | None, ...]:
    """Gradients of `inputs`, of which some are None, by differentiating `function` once more; differentiable.

    An incoming gradient that is None belongs to an output that is not looked at.
    """
    given = [i for i, x in enumerate(inputs) if x is not None]
    looked_at = [i for i, g in enumerate(grads) if g is not None]

    def present(*tensors: Tensor) -> tuple[Tensor, ...]:
        arguments = dict(zip(given, tensors, strict=True))
        outputs = function(*(arguments.get(i) for i in range(len(inputs))))
        return tuple(outputs[i] for i in looked_at)

    with without_autocast(inputs[0].device.type):
        outputs, pull_back = torch.func.vjp(present, *(inputs[i] for i in given))  # type: ignore[misc]
        found = pull_back(tuple(grads[i].to(y.dtype) for i, y in zip(looked_at, outputs, strict=True)))
    results = dict(zip(given, found, strict=True))
    return tuple(results.get(i) for i in range(len(inputs)))


def _once_a_slice(operator: Any) -> Callable:
    def without_dimension(arg: Any, dim: Any, take: Callable[[Tensor, int], Tensor]) -> Any:
        if isinstance(arg, (list, tuple)):
            dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(arg)
            return [without_dimension(x, d, take) for x, d in zip(arg, dims, strict=True)]
        return arg if dim is None else take(arg, dim)

    def together(results: Sequence[Any]) -> Any:
        if isinstance(results[0], Tensor):
            return torch.stack(tuple(results))
        return [together(parts) for parts in zip(*results, strict=True)]

    def of_each(result: Any, function: Callable[[Tensor], Any]) -> Any:
        if isinstance(result, Tensor):
            return function(result)
        return [of_each(part, function) for part in result]

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        def call(take: Callable[[Tensor, int], Tensor]) -> Any:
            return operator(*(without_dimension(x, d, take) for x, d in zip(args, in_dims, strict=True)))

        if info.batch_size > 0:
            calls = [call(partial(torch.select, index=i)) for i in range(info.batch_size)]
            results = together(calls)
        else:  # no slice tells the shapes: those of one slice of zeros, none of them
            calls = [call(lambda x, dim: x.new_zeros(x.shape[:dim] + x.shape[dim + 1 :]))]
            results = of_each(calls[0], lambda y: y.new_empty((0, *y.shape)))
        dims = of_each(results, lambda y: 0)
        if isinstance(calls[0], tuple):
            return tuple(results), tuple(dims)
        return results, dims

    return rule
