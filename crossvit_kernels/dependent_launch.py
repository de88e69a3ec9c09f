"""Launches that begin before the one before them has ended (programmatic dependent launch).

A GPU starts a kernel's programs some microseconds after the last one of the kernel before. A dependent launch
has its programs there by then: each waits, as the first thing it does, until what was launched before on its
stream is done and visible. From compute capability 9.0 on; kernels that know of it have a constant DEPENDENT.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_thread = threading.local()


@contextmanager
def dependent_launches(wanted: bool = True) -> Iterator[None]:
    """Within the block, in this thread, inference's Triton kernels are launched so where the GPU can."""
    before = getattr(_thread, "wanted", False)
    _thread.wanted = wanted
    try:
        yield
    finally:
        _thread.wanted = before


def can(architecture: str) -> bool:
    """Whether GPUs of an architecture, as triton_table.py names it, have such launches."""
    return architecture.startswith("sm_") and int(architecture.removeprefix("sm_")) >= 90


def options(architecture: str) -> dict[str, Any]:
    """Of a launch of a kernel with a constant DEPENDENT."""
    if getattr(_thread, "wanted", False) and can(architecture):
        return {"DEPENDENT": True, "launch_pdl": True}
    return {}
