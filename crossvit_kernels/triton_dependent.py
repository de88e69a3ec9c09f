"""The wait of a dependent launch (dependent_launch.py)."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(DEPENDENT: tl.constexpr):
    """Before anything is read: what was launched before is done. The launch after this one may then begin."""
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
