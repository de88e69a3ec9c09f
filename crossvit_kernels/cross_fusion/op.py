"""The fusion of the compiled backends as an operator of torch: schema, shapes, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import validation
from ..cross_attention import absorbed
from ..cross_attention.directions import Direction, ForwardOutputs, Gradients
from ..cross_attention.gpu_preference import chosen
from ..cross_attention.op import (
    empty_as,
    empty_saved,
    engine,
    fake_absent,
    fake_weight_gradients,
    none_as_empty,
    plain,
    settled,
    weight_gradients,
)
from ..library import any_requires_grad, define, differentiate_by, vjp
from .operands import Operands
from .reference import fusion_with

WEIGHTS = 18  # tensors of a direction


def cross_fusion(operands: Operands, backend: str) -> tuple[Tensor, ...]:
    """The new tokens and, if asked for, the attention of both directions."""
    o = operands
    tokens, weights = (o.tokens_s, o.tokens_l), (*o.weights_s, *o.weights_l)
    options = (*o.residual_scales, o.seed, o.num_heads, o.eps, o.dropout_p, o.return_attention, backend)
    if torch.is_grad_enabled() and any_requires_grad((*tokens, *weights, *o.residual_scales)):
        return CrossFusion.apply(*tokens, *options, *weights)[:4]
    return FORWARD(*tokens, weights, *options)[:4]


def _directions(
    tokens_s: Tensor,
    tokens_l: Tensor,
    weights: list[Tensor | None],
    scale_s: Tensor | None,
    scale_l: Tensor | None,
    seed: Tensor | None,
    num_heads: list[int],
) -> tuple[Direction, Direction]:
    w = tuple(weights)
    return (
        Direction(tokens_s[:, :1], tokens_l[:, 1:], w[:WEIGHTS], num_heads[0], scale_s, seed, 0),
        Direction(tokens_l[:, :1], tokens_s[:, 1:], w[WEIGHTS:], num_heads[1], scale_l, seed, 1),
    )


def _forward(
    tokens_s: Tensor,
    tokens_l: Tensor,
    weights: list[Tensor | None],
    scale_s: Tensor | None,
    scale_l: Tensor | None,
    seed: Tensor | None,
    num_heads: list[int],
    eps: float,
    dropout_p: float,
    return_attention: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    tokens = (tokens_s, tokens_l)
    if backend == "auto":
        backend = _chosen(tokens, weights, num_heads, backward=False)
    if backend == "torch":
        operands = _operands(
            tokens, weights, (scale_s, scale_l), seed, num_heads, eps, dropout_p, return_attention
        )
        with torch.no_grad():
            results = fusion_with(absorbed.cross_attention)(operands)
        none = tokens_s.new_empty(0, dtype=torch.float32)
        found = [x.contiguous() if return_attention else none for x in results[2:]]
        kept = [empty_saved(x, h, backend) for x, h in zip(reversed(tokens), num_heads, strict=True)]
        return (*(x.contiguous() for x in results[:2]), *found, *kept)
    directions = _directions(tokens_s, tokens_l, weights, scale_s, scale_l, seed, num_heads)
    new = [empty_as(x) for x in tokens]
    attentions = [
        x.new_empty((x.shape[0], heads, x.shape[1]) if return_attention else (0,), dtype=torch.float32)
        for x, heads in zip(reversed(tokens), num_heads, strict=True)
    ]
    kept = [empty_saved(d.patches, d.num_heads, backend) for d in directions]
    outputs = [
        ForwardOutputs(own[:, :1], other[:, 1:], a if return_attention else None, saved)
        for own, other, a, saved in zip(new, reversed(new), attentions, kept, strict=True)
    ]
    engine(backend).forward(list(zip(directions, outputs, strict=True)), eps, dropout_p)
    return (*new, *attentions, *kept)


def _chosen(
    tokens: Sequence[Tensor], weights: list[Tensor | None], num_heads: Sequence[int], backward: bool
) -> str:
    wq, (tokens_s, tokens_l) = weights[6], tokens
    assert wq is not None
    sizes = ((tokens_s.shape[2], tokens_l.shape[2]), tuple(num_heads))
    kind = validation.Kind("cross_fusion", tokens_s.device, *sizes, tokens_s.dtype, wq.dtype)
    return chosen(kind, tokens_s.shape[0], backward)


def _operands(
    tokens: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    seed: Tensor | None,
    num_heads: Sequence[int],
    *options: Any,
) -> Operands:
    eps, dropout_p, return_attention = options
    return Operands(
        tokens[0], tokens[1], tuple(weights[:WEIGHTS]), tuple(weights[WEIGHTS:]),
        (num_heads[0], num_heads[1]), eps, dropout_p, seed, (scales[0], scales[1]), return_attention,
    )  # fmt: skip


def _differentiated(
    tokens: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    seed: Tensor | None,
    num_heads: Sequence[int],
    options: tuple[float, float, bool],
    incoming: Sequence[Tensor | None],
) -> tuple[Any, ...]:
    """Gradients of tokens, scales and weights by differentiating PyTorch's operators; differentiable."""

    def compute(tokens_s: Tensor, tokens_l: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
        operands = _operands((tokens_s, tokens_l), others[2:], others[:2], seed, num_heads, *options)
        return fusion_with(absorbed.cross_attention)(operands)

    return vjp(compute, (*tokens, *scales, *weights), tuple(incoming))


def _forward_fake(
    tokens_s: Tensor,
    tokens_l: Tensor,
    weights: list[Tensor | None],
    scale_s: Tensor | None,
    scale_l: Tensor | None,
    seed: Tensor | None,
    num_heads: list[int],
    eps: float,
    dropout_p: float,
    return_attention: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    def attention(other: Tensor, heads: int) -> Tensor:
        shape = (other.shape[0], heads, other.shape[1]) if return_attention else (0,)
        return other.new_empty(shape, dtype=torch.float32)

    return (
        tokens_s.new_empty(tokens_s.shape),
        tokens_l.new_empty(tokens_l.shape),
        attention(tokens_l, num_heads[0]),
        attention(tokens_s, num_heads[1]),
        empty_saved(tokens_l, num_heads[0], backend),
        empty_saved(tokens_s, num_heads[1], backend),
    )


def _backward(
    grads: list[Tensor],
    grad_attentions: list[Tensor | None],
    tokens_s: Tensor,
    tokens_l: Tensor,
    weights: list[Tensor | None],
    scale_s: Tensor | None,
    scale_l: Tensor | None,
    seed: Tensor | None,
    attentions: list[Tensor],
    saved: list[Tensor],
    num_heads: list[int],
    eps: float,
    dropout_p: float,
    backend: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    to_tokens, to_scales, to_weights = wanted
    batch = tokens_s.shape[0]
    if (
        attentions[0].numel() == 0
    ):  # they were not asked for, and torch.compile gives their gradients all the same
        grad_attentions = [None, None]
    if backend == "auto":
        backend = _chosen((tokens_s, tokens_l), weights, num_heads, backward=True)
    if backend == "torch":
        options = (eps, dropout_p, any(g is not None for g in grad_attentions))
        with validation.as_outside_of_operators():
            found = _differentiated(
                (tokens_s, tokens_l), weights, (scale_s, scale_l), seed, num_heads, options,
                (*grads, *grad_attentions),
            )  # fmt: skip
        to_scale = [None if g is None or not to_scales else g.float() for g in found[2:4]]
        return (
            settled(found[0] if to_tokens else None, tokens_s),
            settled(found[1] if to_tokens else None, tokens_s),
            settled(to_scale[0], tokens_s),
            settled(to_scale[1], tokens_s),
            [settled(g if to_weights else None, tokens_s) for g in found[4:]],
        )
    directions = _directions(tokens_s, tokens_l, weights, scale_s, scale_l, seed, num_heads)
    new = [empty_as(x) if to_tokens else None for x in (tokens_s, tokens_l)]
    gradients = []
    for stream, direction in enumerate(directions):
        own, other = new[stream], new[1 - stream]
        grad_attention = grad_attentions[stream]
        scale = direction.scale if to_scales else None
        gradients.append(
            Gradients(
                cls=grads[stream][:, :1],
                patches=grads[1 - stream][:, 1:],
                attention=None
                if grad_attention is None
                else (attentions[stream].contiguous(), plain(grad_attention)),
                saved=saved[stream].contiguous(),
                to_cls=None if own is None else own[:, :1],
                to_patches=None if other is None else other[:, 1:],
                to_scale=None if scale is None else scale.new_empty(scale.shape, dtype=torch.float32),
                to_weights=weight_gradients(direction.weights, batch) if to_weights else None,
            )
        )
    engine(backend).backward(list(zip(directions, gradients, strict=True)), eps, dropout_p)
    of_s, of_l = gradients
    return (
        none_as_empty(new[0], tokens_s),
        none_as_empty(new[1], tokens_s),
        none_as_empty(of_s.to_scale, tokens_s),
        none_as_empty(of_l.to_scale, tokens_s),
        [none_as_empty(x, tokens_s) for g in gradients for x in g.to_weights or [None] * WEIGHTS],
    )


def _backward_fake(
    grads: list[Tensor],
    grad_attentions: list[Tensor | None],
    tokens_s: Tensor,
    tokens_l: Tensor,
    weights: list[Tensor | None],
    scale_s: Tensor | None,
    scale_l: Tensor | None,
    seed: Tensor | None,
    attentions: list[Tensor],
    saved: list[Tensor],
    num_heads: list[int],
    eps: float,
    dropout_p: float,
    backend: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    to_tokens, to_scales, to_weights = wanted

    def to_scale(scale: Tensor | None) -> Tensor:
        if scale is None or not to_scales:
            return fake_absent(tokens_s)
        return tokens_s.new_empty(scale.shape, dtype=torch.float32)

    return (
        tokens_s.new_empty(tokens_s.shape) if to_tokens else fake_absent(tokens_s),
        tokens_l.new_empty(tokens_l.shape) if to_tokens else fake_absent(tokens_l),
        to_scale(scale_s),
        to_scale(scale_l),
        fake_weight_gradients(weights, to_weights),
    )


FORWARD = define(
    "cross_fusion(Tensor tokens_s, Tensor tokens_l, Tensor?[] weights, Tensor? scale_s, Tensor? scale_l, "
    "Tensor? seed, int[] num_heads, float eps, float dropout_p, bool return_attention, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
BACKWARD = define(
    "cross_fusion_backward(Tensor[] grads, Tensor?[] grad_attentions, Tensor tokens_s, Tensor tokens_l, "
    "Tensor?[] weights, Tensor? scale_s, Tensor? scale_l, Tensor? seed, Tensor[] attentions, Tensor[] saved, "
    "int[] num_heads, float eps, float dropout_p, str backend, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _backward,
    _backward_fake,
)


class CrossFusion(torch.autograd.Function):
    """The new tokens, the attentions (empty unless asked for) and what forward leaves for backward.

    Saves its inputs, some float32 [B, H C] a direction and the attentions if they were asked for.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        # Takes tokens_s, tokens_l, scale_s, scale_l, seed, num_heads, eps, dropout_p, return_attention,
        # backend, then the weights; not by name, see CrossAttention.
        return FORWARD(args[0], args[1], args[10:], *args[2:10])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        tokens_s, tokens_l, scale_s, scale_l, seed, *options = inputs
        ctx.options, weights = options[:5], options[5:]
        attentions, saved = output[2:4], output[4:]
        return_attention = ctx.options[3]
        ctx.mark_non_differentiable(*(saved if return_attention else (*attentions, *saved)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(tokens_s, tokens_l, scale_s, scale_l, seed, *attentions, *saved, *weights)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        num_heads, eps, dropout_p, return_attention, backend = ctx.options
        stored = ctx.saved_tensors  # read once: checkpointing recomputes at each reading
        tokens, scales, seed = stored[:2], stored[2:4], stored[4]
        attentions, saved, weights = stored[5:7], stored[7:9], stored[9:]
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            options = (eps, dropout_p, return_attention)
            found = _differentiated(tokens, weights, scales, seed, num_heads, options, incoming[:4])
        else:
            grads = [
                torch.zeros_like(x) if g is None else g for x, g in zip(tokens, incoming[:2], strict=True)
            ]
            wanted = (needs[0] or needs[1], needs[2] or needs[3], any(needs[10:]))
            *some, to_weights = BACKWARD(
                grads, incoming[2:4], *tokens, weights, *scales, seed, attentions, saved, num_heads, eps,
                dropout_p, backend, wanted,
            )  # fmt: skip
            to_scales = [g if x is None else g.to(x.dtype) for g, x in zip(some[2:], scales, strict=True)]
            found = (*some[:2], *to_scales, *to_weights)
        results = (*found[:4], *(None,) * 6, *found[4:])
        return tuple(g if n else None for g, n in zip(results, needs, strict=True))


def _differentiable(
    tokens_s: Tensor, tokens_l: Tensor, weights: list[Tensor | None], *options: Any
) -> tuple[Tensor, ...]:
    return CrossFusion.apply(tokens_s, tokens_l, *options, *weights)


differentiate_by(FORWARD, _differentiable)
