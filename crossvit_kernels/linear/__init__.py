"""Linear layers with what stands around them in a transformer block: LayerNorm, activation, residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import kernel_preference
from ..backends import BACKENDS, Call, choose, selected
from ..cross_attention.checks import check_devices_and_dtypes, check_vector, got, matrix_dtype
from ..library import any_requires_grad
from ..modes import autocast_enabled, only_values_count, plain_operators_only, without_autocast
from ..program import precision_of
from . import gpu_op, native, op, reference
from .packed import PackedCache, PackedLinear

__all__ = ["PreparedLinear", "linear", "pack_linear"]

ACTIVATIONS = (None, "gelu", "relu")

# Best first: the order in which "auto" tries them. A single call does not pay back the packing of the weight.
IMPLEMENTATIONS: dict[str, Callable] = {
    "torch": reference.linear,  # the definition is what PyTorch has the fastest operators for
    "cpu": op.linear,
    "triton": gpu_op.linear,
    "reference": reference.linear,
}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = residual_scale * activation(LayerNorm(x) weight^T + bias) + residual.

    The linear layers of Eq. 1 of CrossViT (Chen, Fan, Panda, ICCV 2021) with what stands around them:
    LayerNorm in front of qkv and of the MLP, GELU within it, the residual behind it.

    The backend `cpu` packs the weight in each call, so "auto" takes `torch`; `pack_linear` packs it once. On
    GPUs "auto" takes `triton` where it is ahead (kernel_preference.py), for now behind a LayerNorm with GELU.

    Args:
        x: [..., C_in]; any strides.
        weight: [C_out, C_in], as torch.nn.Linear holds it.
        bias: [C_out] or None.
        norm_weight, norm_bias: [C_in], affine part of the LayerNorm over x. Without norm_weight there is no
            LayerNorm, and norm_bias must be None too.
        eps: added to the variance in the LayerNorm.
        activation: None, "gelu" (exact, by the error function) or "relu".
        residual: [..., C_out], added last; or None.
        residual_scale: None, or [B] for x of [B, ..., C_in]: one number an image, as drop-path draws them.
        backend: "auto" or a name from `crossvit_kernels.backends()`; a named one never falls back.

    Returns:
        y [..., C_out] in the dtype of x.

    Differentiable any number of times. `cpu` computes forward natively and gradients through the definition
    in PyTorch's operators, from the inputs, which are all that is saved; it has no residual_scale. `triton`
    has kernels for the gradients, the same bits in every run, but none for residual_scale's; with a LayerNorm
    or an activation it saves what the activation was taken of, which may be y itself (do not change it in
    place), and the weight with norm_weight in it.

    Dtypes: outside autocast all tensors share one floating-point dtype; the LayerNorm's may stay in float32.
    Under autocast the residual takes the dtype of x, weight and bias take autocast's dtype. Sums are float32
    at least. `cpu` multiplies bfloat16 weights in bfloat16, others in float32. `triton` multiplies in the
    dtype of the weights, float32 as torch.backends.cuda.matmul says.

    Raises:
        ValueError: a shape is wrong, or no activation or backend has that name.
        TypeError: dtypes differ, or are not floating-point.
        RuntimeError: devices differ, or the backend cannot take this call; all reasons are listed.
    """
    if not torch.jit.is_tracing():  # a trace would record every comparison of sizes
        _check_weights(weight, bias, norm_weight, norm_bias)
        _check_tokens(x, residual, weight)
        _check_scale(residual_scale, x)
    _check_activation(activation)
    device = x.device.type
    autocast = autocast_enabled(device)
    norms = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    others = {"weight": weight, "bias": bias, **norms, "residual": residual, "residual_scale": residual_scale}
    check_devices_and_dtypes("x", x, others, ("residual_scale",), tuple(norms), autocast)
    if autocast:
        dtype = matrix_dtype(x, weight, autocast)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        residual = None if residual is None else residual.to(x.dtype)
    against = []
    if residual_scale is not None:
        against.append(("cpu", "it has no residual_scale"))
        if torch.is_grad_enabled() and any_requires_grad((residual_scale,)):
            against.append(("triton", "it has no gradient of residual_scale"))
    call = Call(device, x.dtype, weight.dtype, plain=plain_operators_only(), against=tuple(against))
    if kernel_preference.has_a_say(backend, call):
        backend = kernel_preference.chosen(
            *("linear", call, x),
            shape=(*weight.shape[::-1], _epilogue(norm_weight, activation, residual)),
            number=x.numel() // max(x.shape[-1], 1),
            training=torch.is_grad_enabled() and any_requires_grad((x, weight, bias, norm_weight, norm_bias)),
            widths=tuple(weight.shape[::-1]),
        )
    compute = choose("linear", backend, call, IMPLEMENTATIONS)
    scale = () if residual_scale is None else (residual_scale,)
    with without_autocast(device):  # the operands have the right dtypes
        return compute(x, weight, bias, norm_weight, norm_bias, residual, eps, activation, *scale)


def _epilogue(norm_weight: Tensor | None, activation: str | None, residual: Tensor | None) -> str:
    """What stands around the product, as kernel_preference.py names it."""
    parts = (
        "norm" if norm_weight is not None else None,
        activation,
        "residual" if residual is not None else None,
    )
    return ", ".join(part for part in parts if part)


def pack_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> PreparedLinear:
    """A linear layer whose weight is laid out once for the CPU's kernels, LayerNorm's parameters folded in.

    Args: as those of `linear`.

    Returns:
        A function of x, which takes the options of `linear`: see `PreparedLinear`.

    Raises:
        ValueError: a shape is wrong.
        TypeError: dtypes differ, or are not floating-point.
        RuntimeError: devices differ.
    """
    _check_weights(weight, bias, norm_weight, norm_bias)
    norms = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    check_devices_and_dtypes("weight", weight, {"bias": bias, **norms}, (), tuple(norms))
    return PreparedLinear(weight, bias, norm_weight, norm_bias)


class PreparedLinear:
    """`linear` with the parameters that `pack_linear` was given: a function of x.

    The parameters stay the caller's and may change: what is packed of them is a copy, made when it is first
    needed, and again when they are no longer what they were. Writes past torch's count of them (through
    `.data`, by NumPy, by another process) are seen where they meet the first element of every 4 KiB of a
    parameter, or its last. Copies and pickles pack for themselves.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None
    ) -> None:
        self._parameters = (weight, bias, norm_weight, norm_bias)
        self._cache = PackedCache()

    @property
    def nbytes(self) -> int:
        """Bytes of what is packed now."""
        return self._cache.nbytes

    def __call__(
        self,
        x: Tensor,
        *,
        eps: float = 1e-6,
        activation: str | None = None,
        residual: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """As `linear`, which computes what the packed weight cannot be used for: calls that are to be
        differentiated, compiled or exported, that are under autocast or torch.func, or on other backends.
        """
        weight, bias, norm_weight, norm_bias = self._parameters
        if not self._takes(x, residual, backend):
            return linear(
                *(x, weight, bias),
                norm_weight=norm_weight,
                norm_bias=norm_bias,
                eps=eps,
                activation=activation,
                residual=residual,
                backend=backend,
            )
        _check_tokens(x, residual, weight)
        _check_activation(activation)
        norms = {"norm_weight": norm_weight, "norm_bias": norm_bias}
        check_devices_and_dtypes("x", x, {"weight": weight, **norms, "residual": residual}, (), tuple(norms))
        packed = self._cache.get(
            self._parameters,
            lambda: PackedLinear(*self._parameters, precision=precision_of(weight.dtype)),
        )
        return native.with_packed(x, packed, residual, eps if norm_weight is not None else None, activation)

    def _takes(self, x: Tensor, residual: Tensor | None, backend: str) -> bool:
        if (selected() if backend == "auto" else backend) not in ("auto", "cpu"):
            return False
        if not only_values_count((x, residual, *self._parameters)) or autocast_enabled(x.device.type):
            return False
        call = Call(x.device.type, x.dtype, self._parameters[0].dtype)
        return not BACKENDS["cpu"].reasons_against(call)


def _check_weights(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight must have shape [C_out, C_in], both at least 1, {got(weight)}: "
            "pass it as torch.nn.Linear holds it"
        )
    outputs, channels = weight.shape
    check_vector("bias", bias, "C_out", outputs)
    check_vector("norm_weight", norm_weight, "C_in", channels)
    check_vector("norm_bias", norm_bias, "C_in", channels)
    if norm_bias is not None and norm_weight is None:
        raise ValueError("norm_bias must be None where norm_weight is: pass ones as norm_weight")


def _check_tokens(x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    outputs, channels = weight.shape
    if x.ndim < 1 or x.shape[-1] != channels:
        raise ValueError(
            f"x must have shape [..., C_in] with C_in = {channels} (columns of weight), {got(x)}: "
            "is the weight transposed?"
        )
    shape = (*x.shape[:-1], outputs)
    if residual is not None and residual.shape != shape:
        raise ValueError(
            f"residual must have shape [..., C_out] = {list(shape)} (of x and weight), {got(residual)}: "
            "expand it first"
        )


def _check_scale(residual_scale: Tensor | None, x: Tensor) -> None:
    if residual_scale is not None and (x.ndim < 2 or residual_scale.shape != x.shape[:1]):
        raise ValueError(
            f"residual_scale must have shape [B] = {list(x.shape[:1])} for x of [B, ..., C_in], "
            f"{got(residual_scale)}: pass one number for each image"
        )


def _check_activation(activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None, 'gelu' or 'relu', got {activation!r}")
