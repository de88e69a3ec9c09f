"""Patch embedding of the GPU backends as an operator of torch, with kernels of its own for the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..library import any_requires_grad, define, differentiate_by, vjp
from ..modes import without_autocast
from . import reference


def cuts_first(image: Tensor, weight: Tensor, size: Sequence[int] | None) -> bool:
    """Whether the patches have to be written before they are multiplied."""
    return image.dtype != weight.dtype or (size is not None and tuple(size) != tuple(image.shape[-2:]))


def patch_embed(*args: Any) -> Tensor:
    """As the definition, by Triton's kernels."""
    if torch.is_grad_enabled() and any_requires_grad(args):
        return PatchEmbed.apply(*args)
    return FORWARD(*args)


def _forward(*args: Any) -> Tensor:
    from . import triton_launch

    return triton_launch.forward(*args)


def _forward_fake(image: Tensor, weight: Tensor, bias: Any, position: Tensor, *_: Any) -> Tensor:
    return position.new_empty((image.shape[0], *position.shape))


def _backward(grad: Tensor, image: Tensor, weight: Tensor, *args: Any) -> list[Tensor]:
    from . import triton_launch

    wanted = args[-1]
    if grad.numel() == 0:
        return [empty.zero_() for empty in _backward_fake(grad, image, weight, *args)]
    with without_autocast(grad.device.type):
        found = triton_launch.backward(grad, image, weight, *args)
    return [
        x.clone() if x is not None and want else grad.new_empty(0)
        for x, want in zip(found, wanted, strict=True)
    ]


def _backward_fake(grad: Tensor, image: Tensor, weight: Tensor, *args: Any) -> list[Tensor]:
    shapes = (image.shape, weight.shape, weight.shape[:1], grad.shape[1:], grad.shape[2:])
    dtypes = (image, weight, weight, grad, grad)
    return [
        like.new_empty(shape) if want else grad.new_empty(0)
        for like, shape, want in zip(dtypes, shapes, args[-1], strict=True)
    ]


_OPTIONS = "SymInt[]? size, float[]? mean, float[]? std"
FORWARD = define(
    "patch_embed_triton(Tensor image, Tensor weight, Tensor? bias, Tensor position, Tensor cls_token, "
    f"{_OPTIONS}) -> Tensor",
    _forward,
    _forward_fake,
)
BACKWARD = define(
    f"patch_embed_triton_backward(Tensor grad, Tensor image, Tensor weight, {_OPTIONS}, bool[] wanted) "
    "-> Tensor[]",
    _backward,
    _backward_fake,
)


class PatchEmbed(torch.autograd.Function):
    """Saves the image and the weight; the bias, position and CLS token for second derivatives alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return FORWARD(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.options = inputs[5:]
        ctx.save_for_backward(*inputs[:5])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        tensors = ctx.saved_tensors
        wanted = [bool(need) for need in ctx.needs_input_grad[:5]]
        found: Sequence[Tensor | None]
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            given = [i for i, want in enumerate(wanted) if want]

            def of_wanted(*some: Tensor) -> tuple[Tensor]:
                filled = list(tensors)
                for i, x in zip(given, some, strict=True):
                    filled[i] = x
                return (reference.patch_embed(*filled, *ctx.options),)

            by_place = dict(
                zip(given, vjp(of_wanted, tuple(tensors[i] for i in given), (grad,)), strict=True)
            )
            found = [by_place.get(i) for i in range(5)]
        else:
            found = BACKWARD(grad, *tensors[:2], *ctx.options, wanted)
        return *(g if want else None for g, want in zip(found, wanted, strict=True)), None, None, None


differentiate_by(FORWARD, PatchEmbed.apply)


def add_position(patches: Tensor, position: Tensor, cls_token: Tensor) -> Tensor:
    """As the definition, by a Triton kernel."""
    if torch.is_grad_enabled() and any_requires_grad((patches, position, cls_token)):
        return AddPosition.apply(patches, position, cls_token)
    return PLACE(patches, position, cls_token)


def _place(patches: Tensor, position: Tensor, cls_token: Tensor) -> Tensor:
    from . import triton_launch

    return triton_launch.add_position(patches, position, cls_token)


def _place_fake(patches: Tensor, position: Tensor, cls_token: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(patches.dtype, position.dtype), cls_token.dtype)
    return patches.new_empty((patches.shape[0], *position.shape), dtype=dtype)


PLACE = define(
    "add_position_triton(Tensor patches, Tensor position, Tensor cls_token) -> Tensor", _place, _place_fake
)


class AddPosition(torch.autograd.Function):
    """Its gradients are a part of the incoming one, and sums of it over the images; nothing is saved."""

    generate_vmap_rule = True

    @staticmethod
    def forward(patches: Tensor, position: Tensor, cls_token: Tensor) -> Tensor:
        return PLACE(patches, position, cls_token)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.dtypes = [x.dtype for x in inputs]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        patches, position, cls_token = ctx.dtypes
        wide = torch.promote_types(grad.dtype, torch.float32)
        of_patches = grad[:, 1:].to(patches) if ctx.needs_input_grad[0] else None
        of_position = grad.sum(0, dtype=wide).to(position) if ctx.needs_input_grad[1] else None
        of_cls = grad[:, 0].sum(0, dtype=wide).to(cls_token) if ctx.needs_input_grad[2] else None
        return of_patches, of_position, of_cls


differentiate_by(PLACE, AddPosition.apply)
