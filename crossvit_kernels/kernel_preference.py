"""Where "auto" takes Triton's kernels for the layers of a block on a GPU, and where PyTorch's operators.

PyTorch has good kernels for all of these, so that Triton's are taken where they are known or predicted to be
ahead. `_MEASURED` comes from measurements on GPUs, and goes before the predictions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import validation
from .backends import BACKENDS, Call, selected
from .cross_attention.gpu import architecture_of

Shape = tuple[int | str | bool, ...]

# (architecture, operation, shape, training, dtype of the matrices) -> rows of (largest number, whether
# Triton's kernels are ahead). Shapes and numbers are those of `predicted`; the last row stands for greater
# numbers too. Written by benchmarks/preference.py from here to the end of the braces.
_MEASURED: dict[tuple[str, str, Shape, bool, torch.dtype], tuple[tuple[int, bool], ...]] = {}


def predicted(architecture: str, operation: str, shape: Shape, number: int, training: bool) -> bool:
    """By the static model (docs/triton.md), for bfloat16, and forward alone but for what only moves bytes.

    operation, shape, number:
        "linear", (C_in, C_out, epilogue), rows: where a GELU would be a pass of its own over its output.
        "self_attention", (N, d), heads of all images: where much of a library's tiles would be padding.
        "patch_embed", (side of a patch, C, whether the image is written anew), images: where it is resized.
        "add_position", (P, C), images: everywhere but for few images, for it moves half of the bytes.
        "transformer_block", (N, C, hidden), images: in training, where PyTorch's operators write and read
            between products what is done within them here; not where the launches are what takes the time.
        "frozen_model", (C of S, C of L), images: the whole forward in a CUDA graph, against PyTorch's
            operators in one: everywhere, for it launches a third as many kernels and moves half of the bytes.
        "dependent_launches", as "frozen_model": of its kernels, against ordinary ones: where they are short.
    """
    if operation == "add_position":
        return number >= 16
    if operation == "transformer_block":
        tokens = shape[0]
        return training and architecture == "sm_90" and isinstance(tokens, int) and number * tokens >= 16_384
    if training or architecture != "sm_90":
        return False
    if operation == "frozen_model":
        return True
    if operation == "dependent_launches":
        return number <= 32
    if operation == "linear":
        return shape[2] == "norm, gelu" and number >= 16_384
    if operation == "self_attention":
        tokens, channels = shape
        return (tokens, channels) in ((197, 64), (401, 32)) and number >= 896
    return bool(shape[2]) and number >= 16


def ahead(
    architecture: str, operation: str, shape: Shape, number: int, training: bool, dtype: torch.dtype
) -> bool:
    """Whether Triton's kernels are ahead: as measured on this architecture, else as predicted."""
    rows = _MEASURED.get((architecture, operation, shape, training, dtype))
    if rows is None:
        return dtype == torch.bfloat16 and predicted(architecture, operation, shape, number, training)
    return next((found for largest, found in rows if number <= largest), rows[-1][1])


def has_a_say(requested: str, call: Call) -> bool:
    """Whether `chosen` is to be asked: "auto" on a GPU.

    Not within torch.compile, which keeps PyTorch's operators, nor under torch.func or a mode that sees
    operators, where nothing can be tried.
    """
    automatic = (selected() if requested == "auto" else requested) == "auto"
    of_gpu = call.device in (BACKENDS["triton"].devices or ())
    if not (automatic and of_gpu) or torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None and not torch._C._len_torch_dispatch_stack()


def chosen(
    operation: str,
    call: Call,
    x: Tensor,
    *,
    shape: Shape,
    number: int,
    training: bool,
    widths: tuple[int, ...],
    heads: tuple[int, ...] = (),
) -> str:
    """Gives "triton" where its kernels are ahead, can take the call and are right, else "auto".

    They are tried for `widths` and `heads`.
    """
    architecture = architecture_of(x.device)
    if not ahead(architecture, operation, shape, number, training, call.weights):
        return "auto"
    if BACKENDS["triton"].reasons_against(call):
        return "auto"
    kind = validation.Kind(operation, x.device, widths, heads, call.tokens, call.weights)
    return "triton" if validation.trusted("triton", kind, training) else "auto"
