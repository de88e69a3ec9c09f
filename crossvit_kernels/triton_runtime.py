"""Whether Triton is here, without importing it: that takes a second, and only its kernels need it."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

OLDEST = (3, 6)  # the first whose kernels take tuples with constants among their elements


@cache
def installed() -> str | None:
    """The version of Triton, which PyTorch for ROCm brings under other names."""
    for name in ("triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


@cache
def load_error() -> str | None:
    """Why Triton's kernels cannot be used, in words; None when they can."""
    oldest, found = ".".join(map(str, OLDEST)), installed()
    if found is None:
        return (
            f"Triton is not installed: it comes with PyTorch for GPUs, or by pip install 'triton>={oldest}'"
        )
    if tuple(int(x) for x in found.split(".")[:2]) < OLDEST:
        return f"Triton {oldest} or newer is needed, {found} is installed"
    return None
