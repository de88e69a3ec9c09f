"""What PyTorch is doing around a call: autocast, recording, forward-mode differentiation."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad


def autocast_enabled(device: str) -> bool:
    """torch.is_autocast_enabled, for every device type: it raises on "meta", which has no autocast.

    (torch.amp.is_autocast_available would tell, but torch.compile cannot trace it before torch 2.12.)
    """
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager:
    """Switches autocast off within the block; it would round float32 sums that are wanted."""
    return torch.autocast(device, enabled=False) if autocast_enabled(device) else nullcontext()


def forward_mode() -> bool:
    """Whether within torch.func.jvp or forward_ad.dual_level, for which no kernel has a rule."""
    return forward_ad._current_level >= 0


def plain_operators_only() -> bool:
    """Whether a call has to consist of PyTorch's own operators.

    torch.jit.trace and ONNX exports record them, and forward-mode differentiation has rules for them.
    """
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or forward_mode()


def only_values_count(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call is for its values now, and may be computed past PyTorch from the memory of its tensors.

    No gradient is wanted, nothing records or transforms the call (torch.compile, exports, torch.func, modes
    that see operators), and the tensors are PyTorch's own, dense ones.
    """
    if torch.compiler.is_compiling() or plain_operators_only():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    differentiates = torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
            return False
        if x.layout is not torch.strided or (differentiates and x.requires_grad):
            return False
    return True
