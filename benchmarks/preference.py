"""`python -m benchmarks.preference FILE...`: which backend comes first on GPUs that were measured.

Reads results files of the hardware command (benchmarks/results/hardware/) and writes the `_MEASURED` of
crossvit_kernels/cross_attention/gpu_preference.py, for the cross-attention and the fusion, and of
crossvit_kernels/kernel_preference.py, for the layers of a block.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from crossvit.variants import find_variant
from crossvit_kernels import kernel_preference
from crossvit_kernels.cross_attention import gpu_preference
from crossvit_kernels.cross_attention.gpu_preference import Names

from . import tune_triton
from .gpu_cases import CASES, DTYPES, OURS, of_backend
from .gpu_layer_cases import LAYER_CASES
from .gpu_model_cases import BY_TORCH, DEPENDENT, MODEL_CASES, ORDINARY

TABLE = Path(gpu_preference.__file__)
TABLE_OF_LAYERS = Path(kernel_preference.__file__)
Key = tuple[str, str, bool, torch.dtype]
Rows = tuple[tuple[int, Names], ...]


def architecture_of(results: Mapping[str, Any]) -> str:
    """Of a results file, whose runs are all of one GPU."""
    return "sm_" + next(iter(results["runs"].values()))["capability"].replace(".", "")


def preferences(results: Mapping[str, Any]) -> dict[Key, Rows]:
    """What the measurements of a results file say; nothing of a batch where one backend has none.

    An operation that was measured at several widths counts with the sum. Backward is what forward and
    backward take together, less forward.
    """
    architecture = architecture_of(results)
    medians: dict[tuple[str, str, int, str, str], list[float]] = defaultdict(list)
    for case in CASES:
        if not case.subject.kernel_alone:
            for backend in OURS:
                entry = results["entries"].get(of_backend(case.name, backend), {})
                found = entry.get("seconds", {}).get("median", float("nan"))
                kind = (case.subject.operation.name, case.dtype, case.batch, case.mode, backend)
                medians[kind].append(found)
    tables: dict[Key, list[tuple[int, Names]]] = defaultdict(list)
    for operation, dtype, batch in sorted({kind[:3] for kind in medians}, key=lambda kind: kind[2]):
        forward, both = (
            {b: sum(medians[operation, dtype, batch, mode, b]) for b in OURS}
            for mode in ("forward", "forward + backward")
        )
        for backward in (False, True):
            times = {b: both[b] - forward[b] if backward else forward[b] for b in OURS}
            if all(t == t for t in times.values()):
                names = tuple(sorted(OURS, key=lambda b: times[b]))
                tables[architecture, operation, backward, DTYPES[dtype]].append((batch, names))
    return {key: merged(rows) for key, rows in tables.items()}


LayerKey = tuple[str, str, kernel_preference.Shape, bool, torch.dtype]


def layer_preferences(results: Mapping[str, Any]) -> dict[LayerKey, tuple[tuple[int, bool], ...]]:
    """Whether Triton's kernels are ahead of all that PyTorch has without compiling, layer by layer, and in a
    frozen model of its operators."""
    tables: dict[LayerKey, list[tuple[int, bool]]] = defaultdict(list)
    for case in sorted(LAYER_CASES, key=lambda case: case.batch):
        entry = results["entries"].get(case.name, {})
        rivals = entry.get("rivals", {}).items()
        ratios = [r["ratio"]["median"] for name, r in rivals if "ratio" in r and name != "compiled"]
        if ratios:
            key = (architecture_of(results), case.operation, case.shape, case.trains, DTYPES[case.dtype])
            tables[key].append((case.batch * case.number, min(ratios) > 1))
    for model in sorted(MODEL_CASES, key=lambda case: case.batch):
        entry, widths = results["entries"].get(model.name, {}), find_variant(model.model).widths
        of_torch, ordinary, dependent = (
            entry.get(f"against {name}", {}).get("rival_seconds") for name in (BY_TORCH, ORDINARY, DEPENDENT)
        )
        key = (architecture_of(results), "dependent_launches", widths, False, torch.bfloat16)
        if ordinary and dependent:
            tables[key].append((model.batch, dependent < ordinary))
        if of_torch and ordinary:
            best = min(ordinary, dependent or ordinary)
            frozen = (key[0], "frozen_model", widths, False, torch.bfloat16)
            tables[frozen].append((model.batch, best < of_torch))
    return {key: merged(rows) for key, rows in tables.items()}


def merged(rows: Sequence[tuple[int, Any]]) -> tuple[tuple[int, Any], ...]:
    """Without rows that the next one makes superfluous."""
    return tuple(
        row for row, after in zip(rows, [*rows[1:], None], strict=True) if after is None or after[1] != row[1]
    )


def main(files: Sequence[str]) -> int:
    """Returns 2 if a file has neither both backends nor a layer measured; then nothing is written."""
    measured, of_layers = dict(gpu_preference._MEASURED), dict(kernel_preference._MEASURED)
    for name in files:
        results = json.loads(Path(name).read_text())
        found, layers = preferences(results), layer_preferences(results)
        if not found and not layers:
            print(f"{name} has no operation that was measured with {' and '.join(OURS)}", file=sys.stderr)
            return 2
        measured.update(found)
        of_layers.update(layers)
        for key, rows in found.items():
            print(*key[:2], "backward" if key[2] else "forward", re.sub(r"^torch\.", "", str(key[3])), rows)
        for of_layer, ahead in layers.items():
            print(*of_layer[:3], "training" if of_layer[3] else "forward", ahead)
    tune_triton.write(measured, TABLE)
    tune_triton.write(of_layers, TABLE_OF_LAYERS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
