"""`python -m benchmarks.tune_triton`: measures configurations of the attention's kernels on this GPU.

Each candidate runs the package's own launches in a CUDA graph, with other data in the L2 cache before each
replay; the fastest goes into the `_MEASURED` of crossvit_kernels/cross_attention/triton_table.py.
Candidates that do not compile or spill are passed over.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.progress import track

from crossvit_kernels.cross_attention import triton_launch, triton_table
from crossvit_kernels.cross_attention.triton_table import Configuration

from . import compiled
from .compile_table import DTYPES, FLOAT32, widths_of_variants
from .compiled import Case

TABLE = Path(triton_table.__file__)
ROUNDS = 30
Key = tuple[str, bool, str, int, int]


def candidates(heads: int, head_warps: int) -> Iterator[Configuration]:
    """What is worth a measurement."""
    head_tiles = (8, 16) if heads <= 8 else (16,)
    of_each = ((16, 32, 64), head_tiles, (4, 8, 16), (1, 2, 3), (16, 32))
    for tokens, tile, warps, stages, piece in itertools.product(*of_each):
        if tokens <= warps * 16:  # or the registers run out at any width
            yield Configuration(tokens, tile, warps, stages, piece, head_warps)


def key(case: Case, architecture: str) -> Key:
    """Of `_MEASURED`."""
    operands = triton_table.operands(compiled.DTYPES[case.tokens], compiled.DTYPES[case.weights])
    return architecture, case.backward, operands, max(case.widths), case.heads


def rewritten(source: str, measured: Mapping[Any, Any]) -> str:
    """The text of a table, such as triton_table.py, with these entries in place of its own."""
    entries = "".join(f"    {k!r}: {v!r},\n" for k, v in sorted(measured.items(), key=repr))
    body = f"{{\n{entries}}}" if entries else "{}"
    pattern = r"(?m)^(_MEASURED: [^\n]* = )\{[^}]*\}"
    text, count = re.subn(pattern, lambda found: found[1] + body, source, count=1)
    if not count:
        raise ValueError("there is no _MEASURED in the table")
    return text


def write(measured: Mapping[Any, Any], path: Path = TABLE) -> None:
    """Rewrites the table: a temporary file beside it first, so that an interrupted run leaves the old one."""
    part = path.with_suffix(".py.part")
    part.write_text(rewritten(path.read_text(), measured))
    os.replace(part, path)


def seconds(call: Callable[[], None]) -> float:
    """Median time of a call in a CUDA graph, with a cold L2 cache."""
    for _ in range(2):  # compiles, and allocates
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    filler = torch.empty(4 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(ROUNDS):
        filler.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def fastest(
    case: Case, tried: Sequence[Configuration], measure: Callable[[Case, Configuration], float]
) -> tuple[Configuration, float] | None:
    """The best of the candidates; None if none runs."""
    times = {}
    for config in tried:
        try:
            times[config] = measure(case, config)
        except Exception as error:  # a configuration that this GPU has no room for
            print(f"{config}: {type(error).__name__}", file=sys.stderr)
    if not times:
        return None
    best = min(times, key=lambda config: times[config])
    return best, times[best]


def measure(case: Case, config: Configuration, batch: int = 256) -> float:
    """Seconds of forward or backward of a case on the GPU."""
    fixed = mock.patch.object(triton_launch, "configuration", return_value=config)
    with torch.device("cuda"), fixed:
        return seconds(compiled.prepared(case, batch, patches=400))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_triton", description=__doc__)
    parser.add_argument("--widths", default="224/448", help="widths of S and L, of a variant")
    parser.add_argument("--dtypes", default="bf16/bf16")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("a GPU is needed to measure on", file=sys.stderr)
        return 2
    if torch.version.hip:
        architecture = torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
    else:
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    pair = tuple(map(int, options.widths.split("/")))
    heads = widths_of_variants()[pair]  # type: ignore[index]
    measured = dict(triton_table._MEASURED)
    for tokens, weights, tf32 in (*DTYPES, *FLOAT32):
        for backward in (False, True):
            case = Case(pair, heads, tokens, weights, tf32, backward)
            if case.dtypes != options.dtypes:
                continue
            tried = list(candidates(heads, triton_table.head_warps(architecture, backward)))
            found = fastest(case, list(track(tried, "measuring")), measure)
            if found is not None:
                measured[key(case, architecture)] = found[0]
                print(f"{case.label} {case.dtypes} {'backward' if backward else 'forward'}: {found}")
    write(measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
