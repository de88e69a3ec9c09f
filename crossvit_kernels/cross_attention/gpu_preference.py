"""Which backend of a GPU "auto" asks first.

`_MEASURED` comes from measurements on GPUs, and goes before `_PREDICTED`.
"""

from __future__ import annotations

import torch

from .. import validation
from .gpu import architecture_of

Names = tuple[str, ...]

# (architecture, operation, backward, dtype of the matrices) -> rows of (largest batch, names, fastest first).
# The last row stands for all greater batches too.
_MEASURED: dict[tuple[str, str, bool, torch.dtype], tuple[tuple[int, Names], ...]] = {}

# The static model (docs/compile_table.md), for lack of measurements. It is of bfloat16, where CUDA's kernels
# are ahead or level but for a backward of one image on an A100; in other dtypes they execute more a tile.
_PREDICTED: dict[torch.dtype, Names] = {torch.bfloat16: ("cuda", "triton")}
_OTHERWISE: Names = ("triton", "cuda")


def preferred(architecture: str, operation: str, backward: bool, batch: int, matrices: torch.dtype) -> Names:
    """Backends, fastest first: as measured on this architecture, else as predicted."""
    rows = _MEASURED.get((architecture, operation, backward, matrices))
    if rows is None:
        return _PREDICTED.get(matrices, _OTHERWISE)
    return next((names for largest, names in rows if batch <= largest), rows[-1][1])


def chosen(kind: validation.Kind, batch: int, backward: bool) -> str:
    """The backend that "auto" takes on a GPU: the first that can take the call and is right, else "torch"."""
    architecture = architecture_of(kind.device)
    for name in preferred(architecture, kind.operation, backward, batch, kind.weights):
        if not kind.reasons_against(name) and validation.trusted(name, kind, backward):
            return name
    return "torch"
