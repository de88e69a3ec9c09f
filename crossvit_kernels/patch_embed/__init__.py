"""From an image to the tokens of a branch: resized, cut into patches, projected, with the CLS token in front.

Shapes: B images, P patches of p x p pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import kernel_preference
from ..backends import Call, choose
from ..cross_attention.checks import check_devices_and_dtypes, check_vector, got, matrix_dtype
from ..library import any_requires_grad
from ..modes import autocast_enabled, plain_operators_only, without_autocast
from . import gpu_op, op, reference

__all__ = ["add_position", "patch_embed"]

# Best first: the order in which "auto" tries them.
IMPLEMENTATIONS: dict[str, Callable] = {
    "cpu": op.patch_embed,
    "torch": reference.patch_embed,  # the definition is what PyTorch has the fastest operators for
    "triton": gpu_op.patch_embed,
    "reference": reference.patch_embed,
}
# Where a gradient is wanted: PyTorch's operators keep what their backward needs, and that of `cpu` computes
# the definition once more. And where float32 images are not resized: packing the weight is not paid back.
TORCH_FIRST = {name: IMPLEMENTATIONS[name] for name in ("torch", "cpu", "triton", "reference")}


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    cls_token: Tensor,
    *,
    size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = cat(cls_token, patches W^T + bias) + position.

    The linear projection of Sec. 3.1 of CrossViT (Chen, Fan, Panda, ICCV 2021): a convolution whose kernel
    and stride are one patch.

    Args:
        image: [B, in, height, width], any strides; a remainder below one patch at the right and at the bottom
            is not seen. uint8 pixels are taken as (pixel / 255 - mean) / std.
        weight: [C, in, p, p], as torch.nn.Conv2d holds it.
        bias: [C] or None.
        position: [1 + P, C] or [1, 1 + P, C], added to the tokens, the CLS token's first.
        cls_token: [C] or [1, 1, C].
        size: (height, width) to which the image is resized first, bicubic as by F.interpolate with
            align_corners=False; None for as it is.
        mean, std: of each channel, for uint8 images alone; None for 0 and 1.
        backend: "auto" or a name from `crossvit_kernels.backends()`; a named one never falls back.

    Returns:
        y [B, 1 + P, C] in the dtype of the image, or of the weights where that is uint8.

    Differentiable any number of times. `cpu` computes forward natively and gradients through the definition
    in PyTorch's operators, from the inputs, which are all that is saved: "auto" takes `torch` where a
    gradient is wanted. It does so too where nothing is resized and the weight is not bfloat16, because
    packing that takes longer than is gained. `triton` has kernels for the gradients, but that of the image is
    put together by PyTorch, and saves its inputs; "auto" takes it where it is ahead (kernel_preference.py),
    for now where the image has to be resized or converted.

    Dtypes: outside autocast all tensors share one floating-point dtype, a uint8 image aside. Under autocast
    position and cls_token take the dtype of the image, weight and bias take autocast's. Sums are float32 at
    least.

    Raises:
        ValueError: a shape or a size is wrong, mean and std do not fit, or no backend has that name.
        TypeError: dtypes differ, or are not floating-point.
        RuntimeError: devices differ, or the backend cannot take this call; all reasons are listed.
    """
    if not torch.jit.is_tracing():  # a trace would record every comparison of sizes
        _check_shapes(image, weight, bias, position, cls_token, size)
    _check_standardisation(image, mean, std)
    device = image.device.type
    autocast = autocast_enabled(device)
    others = {"weight": weight, "bias": bias, "position": position, "cls_token": cls_token}
    first, floating = "image", image
    if image.dtype == torch.uint8:
        if image.device != position.device:
            raise RuntimeError(
                f"position is on {position.device}, image on {image.device}: move them together"
            )
        first, floating = "position", position
    check_devices_and_dtypes(first, floating, others, (), (), autocast)
    position, cls_token = position.reshape(-1, position.shape[-1]), cls_token.reshape(-1)
    if autocast:
        dtype = matrix_dtype(floating, weight, autocast)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        position, cls_token = position.to(floating.dtype), cls_token.to(floating.dtype)
    call = Call(device, floating.dtype, weight.dtype, plain=plain_operators_only())
    tensors = (image, weight, bias, position, cls_token)
    wants_gradients = torch.is_grad_enabled() and any_requires_grad(tensors)
    if kernel_preference.has_a_say(backend, call):
        backend = kernel_preference.chosen(
            *("patch_embed", call, image),
            shape=(weight.shape[-1], weight.shape[0], gpu_op.cuts_first(image, weight, size)),
            number=image.shape[0],
            training=wants_gradients,
            widths=(weight.shape[0], weight.shape[-1]),
        )
    torch_first = wants_gradients or (size is None and weight.dtype != torch.bfloat16)
    compute = choose("patch_embed", backend, call, TORCH_FIRST if torch_first else IMPLEMENTATIONS)
    with without_autocast(device):  # the operands have the right dtypes
        return compute(*tensors, size, mean, std)


ADD_POSITION: dict[str, Callable] = {
    "torch": reference.add_position,
    "triton": gpu_op.add_position,
    "reference": reference.add_position,
}


def add_position(patches: Tensor, position: Tensor, cls_token: Tensor, *, backend: str = "auto") -> Tensor:
    """y = cat(cls_token, patches) + position: the end of an embedding by several convolutions.

    Args:
        patches: [B, P, C], any strides: often a view of what a convolution has left channel by channel.
        position: [1 + P, C] or [1, 1 + P, C], the CLS token's first.
        cls_token: [C] or [1, 1, C].
        backend: "auto" or a name from `crossvit_kernels.backends()`; a named one never falls back.

    Returns:
        y [B, 1 + P, C] in the widest of the three dtypes, which may differ, as under autocast.

    Differentiable any number of times. `triton` reads and writes everything once, and saves nothing.

    Raises:
        ValueError: a shape is wrong, or no backend has that name.
        TypeError: a tensor is not floating-point.
        RuntimeError: devices differ, or the backend cannot take this call; all reasons are listed.
    """
    if not torch.jit.is_tracing():  # a trace would record every comparison of sizes
        _check_tokens(patches, position, cls_token)
    others = {"position": position, "cls_token": cls_token}
    check_devices_and_dtypes("patches", patches, others, tuple(others))
    position, cls_token = position.reshape(-1, position.shape[-1]), cls_token.reshape(-1)
    tensors = (patches, position, cls_token)
    wide = any(x.dtype == torch.float64 for x in tensors)
    call = Call(
        *(patches.device.type, patches.dtype, patches.dtype),
        plain=plain_operators_only(),
        against=(("triton", "it does not take float64"),) if wide else (),
    )
    if kernel_preference.has_a_say(backend, call):
        backend = kernel_preference.chosen(
            *("add_position", call, patches),
            shape=(patches.shape[1], patches.shape[2]),
            number=patches.shape[0],
            training=torch.is_grad_enabled() and any_requires_grad(tensors),
            widths=(patches.shape[2],),
        )
    with without_autocast(patches.device.type):  # which sums in the widest dtype anyway
        return choose("add_position", backend, call, ADD_POSITION)(*tensors)


def _check_tokens(patches: Tensor, position: Tensor, cls_token: Tensor) -> None:
    if patches.ndim != 3 or patches.shape[2] < 1:
        raise ValueError(
            f"patches must have shape [B, P, C] with C at least 1, {got(patches)}: "
            "flatten the grid, and move the channels to the end"
        )
    _, count, channels = patches.shape
    if position.shape not in ((1 + count, channels), (1, 1 + count, channels)):
        raise ValueError(
            f"position must have shape [1 + P, C] = [{1 + count}, {channels}] (of patches), {got(position)}: "
            "resize it to the grid of patches"
        )
    _check_cls_token(cls_token, channels)


def _check_cls_token(cls_token: Tensor, channels: int) -> None:
    if cls_token.shape not in ((channels,), (1, 1, channels)):
        raise ValueError(
            f"cls_token must have shape [C] = [{channels}] or [1, 1, {channels}], {got(cls_token)}"
        )


def _check_shapes(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    cls_token: Tensor,
    size: tuple[int, int] | None,
) -> None:
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or 0 in weight.shape:
        raise ValueError(
            f"weight must have shape [C, in, p, p] with square patches, {got(weight)}: "
            "pass it as torch.nn.Conv2d holds it"
        )
    channels, planes, patch, _ = weight.shape
    if image.ndim != 4 or image.shape[1] != planes:
        raise ValueError(
            f"image must have shape [B, in, height, width] with in = {planes} (of weight), {got(image)}: "
            "add the dimension of the batch, or permute the channels to the front"
        )
    if size is not None and len(size) != 2:
        raise ValueError(f"size must be (height, width) or None, got {size}")
    height, width = image.shape[2:] if size is None else size
    if min(height, width, *image.shape[2:]) < 1 or min(height, width) < patch:
        name = f"image, {got(image)}," if size is None else f"size, got {tuple(size)},"
        raise ValueError(f"{name} must hold at least one patch of {patch} x {patch} pixels")
    check_vector("bias", bias, "C", channels)
    tokens = 1 + height // patch * (width // patch)
    if position.shape not in ((tokens, channels), (1, tokens, channels)):
        raise ValueError(
            f"position must have shape [1 + P, C] = [{tokens}, {channels}] (of the patches in "
            f"{height} x {width} pixels and of weight), {got(position)}: resize it to the grid of patches"
        )
    _check_cls_token(cls_token, channels)


def _check_standardisation(image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    if (mean is None) != (std is None):
        raise ValueError("mean and std must be given together, or neither")
    if mean is None or std is None:
        return
    if image.dtype != torch.uint8:
        raise ValueError(
            f"mean and std are for uint8 images, got one in {image.dtype}: standardise it, or pass its bytes"
        )
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != image.shape[1]:
            raise ValueError(
                f"{name} must have a number for each of the {image.shape[1]} channels, got {len(values)}"
            )
    if any(x == 0 for x in std):
        raise ValueError(f"std must not be zero, got {tuple(std)}")
