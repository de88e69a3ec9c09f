"""Backends: who can compute an operation, why not, and which one a call gets.

A backend is data: a name and what it needs. An operation maps backend names to functions and asks `choose`.
"auto" takes the first backend of that map that can take the call; a backend that the caller names never
falls back to another one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from . import native, triton_runtime

# Read once: torch.compile traces the choice, and not the cache of load_error.
_NATIVE_ERROR = native.load_error()
_CUDA_ERROR = native.cuda_missing()
_TRITON_ERROR = triton_runtime.load_error()
_NATIVE = (torch.float32, torch.bfloat16, torch.float16)
_STORED = tuple((tokens, weights) for tokens in _NATIVE for weights in _NATIVE)
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """What a choice of backend depends on.

    Attributes:
        device: type of the tokens' device ("cpu", "cuda", …).
        tokens: dtype of the tokens.
        weights: dtype of the matrices; differs from `tokens` only under autocast.
        widths: channels of the patches, one number a direction.
        heads: the same of heads.
        plain: only PyTorch's own operators may be used (`modes.plain_operators_only`).
        against: (backend, why) for what this call asks of the operation and that backend does not do.
    """

    device: str
    tokens: torch.dtype
    weights: torch.dtype
    widths: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    plain: bool = False
    against: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Backend:
    """One way to compute operations.

    Attributes:
        name: what `backend=`, `use_backend` and CROSSVIT_BACKEND say.
        summary: one line for `python -m crossvit_kernels`.
        devices: device types it runs on; None means every one.
        dtypes: (tokens, weights) pairs it takes; None means every floating-point pair.
        widest, most_heads: the largest width and number of heads that it takes; None means any.
        plain: whether it consists of PyTorch's own operators.
        tried_first: whether "auto" tries it on this machine before it uses it (`validation`). Which of these
            it takes is decided when the operator runs (cross_attention/gpu_preference.py).
        missing: why it cannot run on this machine at all, or None.
    """

    name: str
    summary: str
    devices: tuple[str, ...] | None = None
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...] | None = None
    widest: int | None = None
    most_heads: int | None = None
    plain: bool = True
    tried_first: bool = False
    missing: Callable[[], str | None] = lambda: None

    def reasons_against(self, call: Call) -> list[str]:
        """Every reason why this backend cannot take `call`; empty means that it can."""
        reasons = []
        missing = self.missing()
        if missing is not None:
            reasons.append(missing)
        if self.devices is not None and call.device not in self.devices:
            reasons.append(f"it runs on {', '.join(self.devices)}, the tokens are on {call.device}")
        if call.plain and not self.plain:
            reasons.append(
                "torch.jit.trace, ONNX exports and forward-mode differentiation need PyTorch's own operators"
            )
        for what, limit, found in (
            ("widths up to {}", self.widest, call.widths),
            ("up to {} heads", self.most_heads, call.heads),
        ):
            if limit is not None and any(x > limit for x in found):
                reasons.append(f"it takes {what.format(limit)}, got {max(found)}")
        if self.dtypes is None:
            if call.tokens not in _FLOATING or call.weights not in _FLOATING:
                reasons.append(f"it takes floating-point tensors, got {call.tokens} and {call.weights}")
        elif (call.tokens, call.weights) not in self.dtypes:
            reasons.append(f"it does not take {call.tokens} tokens with {call.weights} weights")
        return reasons + [why for name, why in call.against if name == self.name]


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "cpu",
            "C++ for AVX-512, AVX2, baseline x86 or NEON, on PyTorch's threads",
            devices=("cpu",),
            dtypes=_STORED,
            plain=False,
            missing=lambda: _NATIVE_ERROR,
        ),
        Backend(
            "cuda",
            "CUDA C++ kernels for NVIDIA GPUs",
            devices=("cuda",),
            dtypes=_STORED,
            widest=1024,
            most_heads=64,
            plain=False,
            tried_first=True,
            missing=lambda: _CUDA_ERROR,
        ),
        Backend(
            "triton",
            "Triton kernels for NVIDIA and AMD GPUs",
            devices=("cuda",),
            dtypes=_STORED,
            widest=1024,  # all channels of a block of tokens are in registers
            most_heads=64,
            plain=False,
            tried_first=True,
            missing=lambda: _TRITON_ERROR,
        ),
        Backend("torch", "the fastest algorithm in PyTorch operators, on any device"),
        Backend("reference", "the definition, as the paper writes it, in PyTorch operators"),
    )
}

# One value for the process, as torch's own backend flags are; a plain global is what torch.compile guards.
_selected = os.environ.get("CROSSVIT_BACKEND") or "auto"


def _check_name(name: str, source: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source} must be one of auto, {', '.join(BACKENDS)}, got {name!r}")


def backends() -> tuple[str, ...]:
    """Names of all backends, in the order in which "auto" tries them."""
    return tuple(BACKENDS)


def selected() -> str:
    """What backend="auto" stands for now: the name of `use_backend` or of CROSSVIT_BACKEND, else "auto"."""
    return _selected


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, calls with backend="auto" use `name`, in every thread of the process.

    Blocks of several threads must not overlap; there, say `backend=` at the call or at the model instead.

    Raises:
        ValueError: there is no such backend.
    """
    global _selected
    _check_name(name, "the argument of use_backend")
    previous, _selected = _selected, name
    try:
        yield
    finally:
        _selected = previous


def choose(operation: str, requested: str, call: Call, implementations: Mapping[str, Callable]) -> Callable:
    """The function that computes `operation` for `call`.

    Args:
        operation: its name, for messages.
        requested: the caller's `backend=`; "auto" defers to `use_backend`, then CROSSVIT_BACKEND.
        call: what is to be computed.
        implementations: backend name -> function, best first.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend, or every backend, has reasons against this call; all are listed.
    """
    _check_name(requested, "backend")
    if requested == "auto":
        requested = _selected
        _check_name(requested, "CROSSVIT_BACKEND")
    automatic = requested == "auto"
    candidates = tuple(implementations) if automatic else (requested,)
    refusals = []
    for name in candidates:
        if name not in implementations:
            refusals.append(f"  {name}: it does not implement {operation}")
            continue
        reasons = BACKENDS[name].reasons_against(call)
        if not reasons:
            chosen = implementations[name]
            return partial(chosen, backend="auto") if automatic and BACKENDS[name].tried_first else chosen
        refusals += [f"  {name}: {reason}" for reason in reasons]
    raise RuntimeError(
        f"no backend can compute {operation} on {call.device} "
        f"with {call.tokens} tokens and {call.weights} weights:\n" + "\n".join(refusals)
    )
