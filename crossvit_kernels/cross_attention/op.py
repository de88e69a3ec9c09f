"""The cross-attention of the compiled backends as an operator of torch: schema, shapes, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import validation
from ..library import any_requires_grad, define, differentiate_by, vjp
from . import absorbed, cuda_launch, native
from .directions import Direction, ForwardOutputs, Gradients
from .gpu_preference import chosen
from .operands import Operands, Weights


def engine(backend: str) -> ModuleType:
    """The module that computes for a backend: `saved_floats`, `forward`, `backward`.

    All of a GPU have the same `saved_floats`, so that "auto", which is settled when the operator runs, has
    it too; one of them may go on in backward where another stopped.
    """
    if backend == "cpu":
        return native
    if backend == "triton":
        from . import triton_launch

        return triton_launch
    return cuda_launch


def cross_attention(operands: Operands, backend: str) -> tuple[Tensor, Tensor]:
    """y and, if asked for, the attention, as `reference.cross_attention` defines them."""
    o = operands
    args = (
        *(o.cls, o.patches, o.residual_scale, o.seed),
        *(o.num_heads, o.eps, o.dropout_p, o.return_attention, backend),
    )
    if torch.is_grad_enabled() and any_requires_grad((*args, *o.weights)):
        y, attention, _ = CrossAttention.apply(*args, *o.weights)
    else:
        y, attention, _ = FORWARD(args[0], args[1], o.weights, *args[2:])
    return y, attention


def _forward(
    cls: Tensor,
    patches: Tensor,
    weights: list[Tensor | None],
    residual_scale: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    eps: float,
    dropout_p: float,
    return_attention: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    direction = Direction(cls, patches, tuple(weights), num_heads, residual_scale, seed)
    batch, count, width = patches.shape
    saved = empty_saved(patches, num_heads, backend)
    if backend == "auto":
        backend = _chosen(patches, weights, num_heads, backward=False)
    if backend == "torch":
        operands = Operands(
            cls, patches, tuple(weights), num_heads, eps, dropout_p, seed, 0, residual_scale, return_attention
        )
        with torch.no_grad():
            y, attention = absorbed.cross_attention(operands)
        absent = patches.new_empty(0, dtype=torch.float32)
        return y.contiguous(), attention.contiguous() if return_attention else absent, saved
    y = patches.new_empty((batch, 1, width))
    shape = (batch, num_heads, 1 + count) if return_attention else (0,)
    attention = patches.new_empty(shape, dtype=torch.float32)
    outputs = ForwardOutputs(y, None, attention if return_attention else None, saved)
    engine(backend).forward([(direction, outputs)], eps, dropout_p)
    return y, attention, outputs.saved


def _chosen(patches: Tensor, weights: list[Tensor | None], num_heads: int, backward: bool) -> str:
    assert weights[2] is not None
    batch, _, width = patches.shape
    dtypes = (patches.dtype, weights[2].dtype)
    kind = validation.Kind("cross_attention", patches.device, (width,), (num_heads,), *dtypes)
    return chosen(kind, batch, backward)


def _forward_fake(
    cls: Tensor,
    patches: Tensor,
    weights: list[Tensor | None],
    residual_scale: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    eps: float,
    dropout_p: float,
    return_attention: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, width = patches.shape
    shape = (batch, num_heads, 1 + count) if return_attention else (0,)
    return (
        patches.new_empty((batch, 1, width)),
        patches.new_empty(shape, dtype=torch.float32),
        empty_saved(patches, num_heads, backend),
    )


def empty_saved(patches: Tensor, num_heads: int, backend: str) -> Tensor:
    """Room for what forward leaves for backward, float32 [B, …]."""
    batch, _, width = patches.shape
    return patches.new_empty((batch, engine(backend).saved_floats(width, num_heads)), dtype=torch.float32)


def _backward(
    grad_y: Tensor,
    grad_attention: Tensor | None,
    cls: Tensor,
    patches: Tensor,
    weights: list[Tensor | None],
    residual_scale: Tensor | None,
    seed: Tensor | None,
    attention: Tensor,
    saved: Tensor,
    num_heads: int,
    eps: float,
    dropout_p: float,
    backend: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    to_patches, to_scale, to_weights = wanted
    if attention.numel() == 0:  # it was not asked for, and torch.compile gives its gradient all the same
        grad_attention = None
    if backend == "auto":
        backend = _chosen(patches, weights, num_heads, backward=True)
    if backend == "torch":
        options = (num_heads, eps, dropout_p, grad_attention is not None)
        with validation.as_outside_of_operators():
            found = _differentiated(
                cls, patches, residual_scale, weights, seed, options, grad_y, grad_attention
            )
        return (
            settled(found[0], cls),
            settled(found[1] if to_patches else None, cls),
            settled(found[2].float() if to_scale else None, cls),
            [settled(g if to_weights else None, cls) for g in found[3:]],
        )
    gradients = Gradients(
        cls=grad_y,
        patches=None,
        attention=None if grad_attention is None else (attention.contiguous(), plain(grad_attention)),
        saved=saved.contiguous(),
        to_cls=empty_as(cls),
        to_patches=empty_as(patches) if to_patches else None,
        to_scale=cls.new_empty(cls.shape, dtype=torch.float32) if to_scale else None,
        to_weights=weight_gradients(tuple(weights), cls.shape[0]) if to_weights else None,
    )
    direction = Direction(cls, patches, tuple(weights), num_heads, residual_scale, seed)
    engine(backend).backward([(direction, gradients)], eps, dropout_p)
    return (
        none_as_empty(gradients.to_cls, cls),
        none_as_empty(gradients.to_patches, cls),
        none_as_empty(gradients.to_scale, cls),
        [none_as_empty(x, cls) for x in gradients.to_weights or [None] * len(weights)],
    )


def _differentiated(
    cls: Tensor,
    patches: Tensor,
    scale: Tensor | None,
    weights: Sequence[Tensor | None],
    seed: Tensor | None,
    options: tuple[int, float, float, bool],
    grad_y: Tensor,
    grad_attention: Tensor | None,
) -> tuple[Any, ...]:
    """Gradients of cls, patches, scale and weights by differentiating PyTorch's operators; differentiable."""
    num_heads, eps, dropout_p, return_attention = options

    def compute(cls: Tensor, patches: Tensor, scale: Tensor | None, *weights: Tensor | None) -> tuple:
        operands = Operands(
            cls, patches, weights, num_heads, eps, dropout_p, seed, 0, scale, return_attention
        )
        return absorbed.cross_attention(operands)

    return vjp(compute, (cls, patches, scale, *weights), (grad_y, grad_attention))


def _backward_fake(
    grad_y: Tensor,
    grad_attention: Tensor | None,
    cls: Tensor,
    patches: Tensor,
    weights: list[Tensor | None],
    residual_scale: Tensor | None,
    seed: Tensor | None,
    attention: Tensor,
    saved: Tensor,
    num_heads: int,
    eps: float,
    dropout_p: float,
    backend: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    to_patches, to_scale, to_weights = wanted
    return (
        cls.new_empty(cls.shape),
        patches.new_empty(patches.shape) if to_patches else fake_absent(patches),
        cls.new_empty(cls.shape, dtype=torch.float32) if to_scale else fake_absent(cls),
        fake_weight_gradients(weights, to_weights),
    )


def weight_gradients(weights: Weights, batch: int) -> Weights:
    """Room for the gradient of each weight; zeros for k's bias, and for all where no image adds to them."""
    key_bias = 9 if len(weights) == 18 else 5

    found = [None if w is None else empty_as(w) for w in weights]
    for i, gradient in enumerate(found):
        if gradient is not None and (i == key_bias or batch == 0):
            gradient.zero_()
    return tuple(found)


def plain(x: Tensor) -> Tensor:
    """Contiguous, and no view that stands for -x."""
    return x.resolve_neg().contiguous()


def empty_as(x: Tensor) -> Tensor:
    """Contiguous, of the shape and dtype of x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def fake_weight_gradients(weights: list[Tensor | None], wanted: bool) -> list[Tensor]:
    """The shapes that `none_as_empty` gives to `weight_gradients`."""
    some = next(w for w in weights if w is not None)
    return [fake_absent(some) if w is None or not wanted else w.new_empty(w.shape) for w in weights]


def settled(x: Tensor | None, like: Tensor) -> Tensor:
    """A gradient by autograd as the kernels give it: contiguous, without a history, empty if absent."""
    return none_as_empty(None if x is None else x.detach().contiguous(), like)


def none_as_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors: an absent one has no elements."""
    return like.new_empty(0, dtype=torch.float32) if x is None else x


def fake_absent(like: Tensor) -> Tensor:
    """The shape of what `none_as_empty` gives for None."""
    return like.new_empty(0, dtype=torch.float32)


FORWARD = define(
    "cross_attention(Tensor cls, Tensor patches, Tensor?[] weights, Tensor? residual_scale, Tensor? seed, "
    "int num_heads, float eps, float dropout_p, bool return_attention, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
BACKWARD = define(
    "cross_attention_backward(Tensor grad_y, Tensor? grad_attention, Tensor cls, Tensor patches, "
    "Tensor?[] weights, Tensor? residual_scale, Tensor? seed, Tensor attention, Tensor saved, int num_heads, "
    "float eps, float dropout_p, str backend, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor[])",
    _backward,
    _backward_fake,
)


class CrossAttention(torch.autograd.Function):
    """y, the attention (empty unless asked for) and what forward leaves for backward.

    Saves its inputs, some float32 [B, H C] and the attention if it was asked for; nothing of size B P C.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        # Takes cls, patches, residual_scale, seed, num_heads, eps, dropout_p, return_attention, backend, then
        # the weights. Not by name: PyTorch builds and binds the signature at every call, microseconds a name.
        return FORWARD(args[0], args[1], args[9:], *args[2:9])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        cls, patches, residual_scale, seed, *options = inputs
        ctx.options, weights = options[:5], options[5:]
        _, attention, saved = output
        return_attention = options[3]
        ctx.mark_non_differentiable(*([saved] if return_attention else [attention, saved]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cls, patches, residual_scale, seed, attention, saved, *weights)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_attention: Tensor | None, _: Any) -> tuple:
        num_heads, eps, dropout_p, return_attention, backend = ctx.options
        needs = ctx.needs_input_grad
        cls, patches, scale, seed, attention, saved, *weights = ctx.saved_tensors  # read once: checkpointing
        grad_y = torch.zeros_like(cls) if grad_y is None else grad_y
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            options = (num_heads, eps, dropout_p, return_attention)
            results = _differentiated(cls, patches, scale, weights, seed, options, grad_y, grad_attention)
        else:
            wanted = (needs[1], needs[2], any(needs[9:]))
            to_cls, to_patches, to_scale, to_weights = BACKWARD(
                grad_y, grad_attention, cls, patches, weights, scale, seed, attention, saved, num_heads, eps,
                dropout_p, backend, wanted,
            )  # fmt: skip
            results = (
                to_cls,
                to_patches,
                to_scale if scale is None else to_scale.to(scale.dtype),
                *to_weights,
            )
        results = (*results[:3], *(None,) * 6, *results[3:])
        return tuple(g if n else None for g, n in zip(results, needs, strict=True))


def _differentiable(
    cls: Tensor, patches: Tensor, weights: list[Tensor | None], *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return CrossAttention.apply(cls, patches, *options, *weights)


differentiate_by(FORWARD, _differentiable)
