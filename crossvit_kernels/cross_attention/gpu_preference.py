"""Which backend of a GPU "auto" asks first.

`_MEASURED` comes from measurements on GPUs, and goes before the rule in `preferred`, which is a prediction.
"""

from __future__ import annotations

import torch

from .. import validation
from .gpu import gpu_of

Names = tuple[str, ...]

# (architecture, operation, backward, dtype of the matrices) -> rows of (largest batch, names, fastest first).
# The last row stands for all greater batches too.
_MEASURED: dict[tuple[str, str, bool, torch.dtype], tuple[tuple[int, Names], ...]] = {}

_DIRECTIONS = {"cross_attention": 1, "cross_fusion": 2}


def preferred(
    architecture: str, multiprocessors: int, operation: str, backward: bool, batch: int, matrices: torch.dtype
) -> Names:
    """Backends, fastest first.

    Predicted, not measured: while images times directions are fewer than multiprocessors, most time goes into
    launches and into reading weights, which the CUDA kernels overlap; from then on into reading tokens.
    """
    rows = _MEASURED.get((architecture, operation, backward, matrices))
    if rows is not None:
        return next((names for largest, names in rows if batch <= largest), rows[-1][1])
    small = batch * _DIRECTIONS[operation] < multiprocessors
    return ("cuda", "triton") if small else ("triton", "cuda")


def chosen(kind: validation.Kind, batch: int, backward: bool) -> str:
    """The backend that "auto" takes on a GPU: the first that can take the call and is right, else "torch"."""
    gpu = gpu_of(kind.device)
    architecture = f"sm_{gpu.capability}"
    for name in preferred(architecture, gpu.multiprocessors, kind.operation, backward, batch, kind.weights):
        if not kind.reasons_against(name) and validation.trusted(name, kind, backward):
            return name
    return "torch"
