"""The same values, laid out in memory in every way that a caller may have them; NaN around them."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Layout = Callable[[Tensor], Tensor]


def contiguous(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def embedded_in_nan(x: Tensor, pad: int = 3) -> Tensor:
    """A view into a wider buffer of NaN, no stride contiguous with the next."""
    wide = torch.full([size + 2 * pad for size in x.shape], float("nan"), dtype=x.dtype)
    view = wide[tuple(slice(pad, pad + size) for size in x.shape)]
    view.copy_(x)
    return view


def every_second(x: Tensor) -> Tensor:
    """Two elements apart, NaN between."""
    wide = torch.full((*x.shape, 2), float("nan"), dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def one_element_in(x: Tensor) -> Tensor:
    """One element behind an aligned address."""
    buffer = torch.full((x.numel() + 2,), float("nan"), dtype=x.dtype)
    view = buffer[1:-1].view(x.shape)
    view.copy_(x)
    return view


def backwards_in_memory(x: Tensor) -> Tensor:
    """The order of the dimensions in memory turned round."""
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def wild_singletons(x: Tensor) -> Tensor:
    """Dimensions of size 1 have strides that mean nothing."""
    x = contiguous(x)
    strides = [7919 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return x.as_strided(x.shape, strides)


def before_a_fence(x: Tensor) -> Tensor:
    """Its last byte is that of a page, and the page behind may not be read. For Linux; never freed."""
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype = ctypes.c_void_p
    system.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    system.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    pages = (-(-x.nbytes // mmap.PAGESIZE) or 1) * mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = system.mmap(None, pages + mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert system.mprotect(base + pages, mmap.PAGESIZE, 0) == 0
    memory = (ctypes.c_char * max(1, x.nbytes)).from_address(base + pages - x.nbytes)
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel()).view(x.shape).copy_(x)


ALL: tuple[Layout, ...] = (
    contiguous,
    embedded_in_nan,
    every_second,
    one_element_in,
    backwards_in_memory,
    wild_singletons,
)


class _LaidOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        return layout(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def lay_out(x: Tensor, layout: Layout) -> Tensor:
    """The tensor in another layout; its gradient is that of the tensor."""
    return _LaidOut.apply(x, layout)
