"""Importing timm where torchvision's compiled operators do not load (a CPU-only torch beside the wheel that
was built for CUDA). timm needs none of these operators, but importing torchvision fails without them."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

# Only the names matter: they are declared so that torchvision can be imported, and never called.
_OPERATORS = (
    "nms",
    "qnms",
    "roi_align",
    "_roi_align_backward",
    "qroi_align",
    "roi_pool",
    "_roi_pool_backward",
    "ps_roi_align",
    "_ps_roi_align_backward",
    "ps_roi_pool",
    "_ps_roi_pool_backward",
    "deform_conv2d",
    "_deform_conv2d_backward",
)


@cache
def import_timm() -> ModuleType:
    """timm, imported.

    Raises:
        ImportError: timm is not installed or does not import; the message says how to install it.
    """
    if importlib.util.find_spec("timm") is None:
        raise ImportError("timm is not installed: pip install 'crossvit-kernels[demo]'")
    _declare_missing_operators()
    import timm

    return timm


_library: torch.library.Library | None = None


def _declare_missing_operators() -> None:
    global _library
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    for binary in Path(spec.origin).parent.glob("_C*.*"):
        try:
            torch.ops.load_library(str(binary))
            return
        except OSError:
            continue
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        _library.define(f"{name}() -> ()")
