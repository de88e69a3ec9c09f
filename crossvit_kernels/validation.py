"""Whether a GPU kernel may be used on this machine: "auto" asks before it first takes one.

A backend's kernels are tried once a process for each device, width, number of heads and dtype, against the
definition in float64, on a few images. Backends that the caller names are not tried.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .backends import BACKENDS, Call

_log = logging.getLogger(__package__)


# Layers of a block, which Triton's kernels take at every width.
OF_BLOCKS = ("linear", "self_attention", "patch_embed", "add_position", "transformer_block")


class Kind(NamedTuple):
    """What kernels are tried for; widths and heads are those of the operation's directions."""

    operation: str
    device: torch.device
    widths: tuple[int, ...]
    heads: tuple[int, ...]
    tokens: torch.dtype
    weights: torch.dtype

    def reasons_against(self, backend: str) -> list[str]:
        """Why a backend cannot take it; empty means that it can."""
        if self.operation in OF_BLOCKS:
            if backend == "cuda":
                return [f"it does not implement {self.operation}"]
            return BACKENDS[backend].reasons_against(Call(self.device.type, self.tokens, self.weights))
        call = Call(self.device.type, self.tokens, self.weights, self.widths, self.heads)
        return BACKENDS[backend].reasons_against(call)


# (backend, kind, with gradients) -> what is wrong, or None
_decisions: dict[tuple[str, Kind, bool], str | None] = {}


def validate(
    operation: str,
    *,
    widths: tuple[int, ...],
    num_heads: tuple[int, ...],
    dtype: torch.dtype,
    weights_dtype: torch.dtype | None = None,
    gradients: bool = True,
    device: torch.device | str = "cuda",
    backend: str | None = None,
) -> str | None:
    """Tries the GPU kernels of an operation, as "auto" does when it first takes them.

    While a CUDA graph is recorded nothing can be tried, and "auto" leaves out what was not tried before. (One
    ordinary call tries too, and compiles for the very layout that will be recorded.)

    Args:
        operation: "cross_attention", "cross_fusion", "linear", "self_attention", "patch_embed",
            "add_position" or "transformer_block".
        widths: C of each direction's patches, of S and L for the fusion; (C_in, C_out) for "linear", (C, side
            of a patch) for "patch_embed", (C, hidden) for "transformer_block", (C,) for the others.
        num_heads: H of each direction; (H,) for "self_attention" and "transformer_block", () for the others.
        dtype: of the tokens.
        weights_dtype: autocast's dtype where it is another one.
        gradients: whether to try backward too.
        device: the GPU.
        backend: "cuda" or "triton"; None for each that is here.

    Returns:
        None if the kernels are right, else what is wrong with them. Tried once a process.

    Raises:
        ValueError: there is no such backend of a GPU.
    """
    known = [name for name, one in BACKENDS.items() if one.tried_first]
    if backend is not None and backend not in known:
        raise ValueError(f"backend must be one of {', '.join(known)} or None, got {backend!r}")
    with torch.device(device) as place:  # "cuda" means the current one
        found = torch.empty(0).device if place.index is None else place
    kind = Kind(operation, found, tuple(widths), tuple(num_heads), dtype, weights_dtype or dtype)
    absent: dict[str, str | None] = {}
    wrong: dict[str, str | None] = {}
    for name in known if backend is None else [backend]:
        if reasons := kind.reasons_against(name):
            absent[name] = "; ".join(reasons)
        else:
            wrong[name] = _tried(name, kind, False) or (_tried(name, kind, True) if gradients else None)
    # What is not here is no fault of the others.
    return "\n".join(f"{name}: {why}" for name, why in (wrong or absent).items() if why) or None


def trusted(backend: str, kind: Kind, backward: bool) -> bool:
    """Whether "auto" may use a backend's kernels, which are tried if they were not before."""
    return _tried(backend, kind, False) is None and (not backward or _tried(backend, kind, True) is None)


def forget() -> None:
    """Drops all decisions, so that the next calls try again."""
    _decisions.clear()


def _tried(backend: str, kind: Kind, gradients: bool) -> str | None:
    key = (backend, kind, gradients)
    if key not in _decisions:
        # Without a lock: a trial differentiates, on threads of autograd that may themselves want to try.
        try:
            wrong = _try(backend, kind, gradients)
        except torch.OutOfMemoryError:
            return "there was no memory to try it"  # which says nothing of the kernels: tried again later
        if _decisions.setdefault(key, wrong) is wrong and wrong is not None:
            what = f"{kind.operation}{', backward,' if gradients else ''}"
            _log.warning(
                "%s of widths %s in %s does not use the backend %s in this process: %s",
                *(what, kind.widths, kind.tokens, backend, wrong),
            )
    return _decisions[key]


def _try(backend: str, kind: Kind, gradients: bool) -> str | None:
    from .check import what_is_wrong  # it needs the operations, which need this module

    if _recording(kind.device):
        # The decision stands, so that forward and backward agree on who computes.
        return "it was not tried before a CUDA graph was recorded: call it once, or crossvit_kernels.validate"
    operation, device, widths, heads, tokens, weights = kind
    try:
        with as_outside_of_operators():
            return what_is_wrong(
                operation, backend, device, widths=widths, heads=heads, tokens=tokens, weights=weights,
                gradients=gradients,
            )[1]  # fmt: skip
    except torch.OutOfMemoryError:
        raise
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
