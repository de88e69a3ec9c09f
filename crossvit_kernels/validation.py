"""Whether a GPU kernel may be used on this machine: "auto" asks before it first takes one.

A kernel is tried once a process for each device, width, number of heads and dtype, against the definition in
float64, on a few images. Backends that the caller names are not tried.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_log = logging.getLogger(__package__)
_decisions: dict[tuple, str | None] = {}


def validate(
    operation: str,
    *,
    widths: tuple[int, ...],
    num_heads: tuple[int, ...],
    dtype: torch.dtype,
    weights_dtype: torch.dtype | None = None,
    gradients: bool = True,
    device: torch.device | str = "cuda",
) -> str | None:
    """Tries the GPU kernels of an operation, as "auto" does when it first takes them.

    While a CUDA graph is recorded nothing can be tried, and "auto" uses PyTorch's operators for what was not
    tried before. (One ordinary call tries too, and compiles for the very layout that will be recorded.)

    Args:
        operation: "cross_attention" or "cross_fusion".
        widths: C of each direction's patches; of S and L for the fusion.
        num_heads: H of each direction.
        dtype: of the tokens.
        weights_dtype: autocast's dtype where it is another one.
        gradients: whether to try backward too.
        device: the GPU.

    Returns:
        None if the kernels are right, else what is wrong with them. Tried once a process.
    """
    with torch.device(device) as place:  # "cuda" means the current one
        found = torch.empty(0).device if place.index is None else place
    key = (operation, found, tuple(widths), tuple(num_heads), dtype, weights_dtype or dtype)
    return _tried(*key, False) or (_tried(*key, True) if gradients else None)


def trusted(
    operation: str,
    device: torch.device,
    widths: tuple[int, ...],
    heads: tuple[int, ...],
    tokens: torch.dtype,
    weights: torch.dtype,
    backward: bool,
) -> bool:
    """Whether "auto" may use the kernels, which are tried if they were not before."""
    key = (operation, device, widths, heads, tokens, weights)
    return _tried(*key, False) is None and (not backward or _tried(*key, True) is None)


def forget() -> None:
    """Drops all decisions, so that the next calls try again."""
    _decisions.clear()


def _tried(*key: Any) -> str | None:
    if key not in _decisions:
        # Without a lock: a trial differentiates, on threads of autograd that may themselves want to try.
        wrong = _try(*key)
        if _decisions.setdefault(key, wrong) is wrong and wrong is not None:
            operation, _, widths, _, tokens, _, gradients = key
            what = f"{operation}{', backward,' if gradients else ''} of widths {widths} in {tokens}"
            _log.warning("%s does not use Triton in this process but PyTorch's operators: %s", what, wrong)
    return _decisions[key]


def _try(
    operation: str,
    device: torch.device,
    widths: tuple[int, ...],
    heads: tuple[int, ...],
    tokens: torch.dtype,
    weights: torch.dtype,
    gradients: bool,
) -> str | None:
    from .check import what_is_wrong  # it needs the operations, which need this module

    if _recording(device):
        # The decision stands, so that forward and backward agree on who computes.
        return "it was not tried before a CUDA graph was recorded: call it once, or crossvit_kernels.validate"
    try:
        with as_outside_of_operators():
            return what_is_wrong(
                operation, "triton", device, widths=widths, heads=heads, tokens=tokens, weights=weights,
                gradients=gradients,
            )[1]  # fmt: skip
    except Exception as error:  # whatever a compiler or a driver raises
        return f"{type(error).__name__}: {error}"


def _recording(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def precision_of_float32() -> str:
    """What the tensor cores of GPUs may do with float32: "ieee" or "tf32"."""
    # The older flag, allow_tf32, sets this one too; reading it raises where only this one was set.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@contextmanager
def as_outside_of_operators() -> Iterator[None]:
    """Within the kernel of an operator, where autograd is switched off: differentiates again."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    included = torch._C._dispatch_tls_local_include_set()
    with (
        torch._C._ForceDispatchKeyGuard(included, excluded),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield
