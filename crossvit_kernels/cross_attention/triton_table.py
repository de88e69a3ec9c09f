"""Which tile each kernel uses, by architecture, width and dtype.

`_CHOSEN` was chosen from what the kernels compile to (docs/compile_table.md): nothing in a thread's local
memory, then as many warps on a multiprocessor as possible, then the fewest instructions a token. `_MEASURED`
goes before it: `python -m benchmarks.tune_triton` writes it on a GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .directions import Direction


@dataclass(frozen=True)
class Configuration:
    """Tiles and warps.

    Attributes:
        tokens: tokens a step of the attention.
        head_tile: heads of a program of `attend`, 8 or 16.
        warps, stages: of the attention. Every warp has a slice of the channels, so that more warps mean fewer
            registers of each, but more of what all warps do alike: the softmax.
        block: channels of a tile of the chain; block_warps its warps.
    """

    tokens: int
    head_tile: int
    warps: int
    stages: int
    block: int = 64
    block_warps: int = 4


# Architectures that are compiled for and tested, and their families: "large" has 163 KB of shared memory or
# more for a block, "small" 99 KB, "amd" 64 KB and waves of 64 lanes.
FAMILIES = {
    "sm_80": "large",
    "sm_86": "small",
    "sm_89": "small",
    "sm_90": "large",
    "sm_100": "large",
    "sm_120": "small",
    "gfx942": "amd",
    "gfx950": "amd",
}

# (family, backward, bytes of the larger element of tokens and weights) -> rows of (largest width, tokens,
# warps, stages). The last row stands for all greater widths too.
#
# Tokens: 16 is the least of a matrix product. 32 halve the barriers and the shared work of a step, where the
# registers suffice. Warps: a slice of at most 112 channels a warp forward, 56 backward, where gradients of
# tokens and queries are kept beside them. Stages: 2 loads one step ahead; 1 where the second buffer and the
# pairs of queries and gradients do not both fit into shared memory.
#
# No row serves these: backward at 768 channels of 12 heads, two tiles of heads, which spills registers
# on all targets and has pairs larger than the shared memory of "small"; on "small", backward of float32
# matrices at 448.
_CHOSEN: dict[tuple[str, bool, int], tuple[tuple[int, int, int, int], ...]] = {
    ("large", False, 2): ((256, 32, 4, 2), (512, 32, 4, 2), (1024, 16, 8, 2)),
    ("small", False, 2): ((256, 32, 4, 2), (512, 32, 4, 2), (1024, 16, 8, 2)),
    ("amd", False, 2): ((256, 16, 4, 2), (512, 16, 8, 2), (1024, 16, 8, 1)),
    ("large", False, 4): ((256, 16, 4, 2), (512, 16, 8, 2), (1024, 16, 8, 2)),
    ("small", False, 4): ((256, 16, 4, 2), (512, 16, 8, 1), (1024, 16, 8, 1)),
    ("amd", False, 4): ((256, 16, 4, 2), (512, 16, 8, 1), (1024, 16, 8, 1)),
    ("large", True, 2): ((256, 16, 4, 2), (512, 16, 8, 2), (1024, 16, 8, 1)),
    ("small", True, 2): ((256, 16, 4, 2), (512, 16, 8, 2), (1024, 16, 8, 1)),
    ("amd", True, 2): ((256, 16, 4, 1), (512, 16, 4, 1), (1024, 16, 8, 1)),
    ("large", True, 4): ((256, 16, 4, 1), (512, 16, 8, 1), (1024, 16, 8, 1)),
    ("small", True, 4): ((256, 16, 4, 1), (512, 16, 8, 1), (1024, 16, 8, 1)),
    ("amd", True, 4): ((256, 16, 4, 1), (512, 16, 4, 1), (1024, 16, 8, 1)),
}

# (architecture, backward, bytes of an element, greatest width, heads) -> what was fastest.
# Written by benchmarks/tune_triton.py from here to the end of the braces.
_MEASURED: dict[tuple[str, bool, int, int, int], Configuration] = {}


def nearest(architecture: str) -> str:
    """The architecture of `FAMILIES` that stands for another one: of NVIDIA's the next lower."""
    if architecture in FAMILIES:
        return architecture
    found = re.fullmatch(r"sm_(\d+)[a-z]?", architecture)
    if found is None:  # "gfx90a:sramecc+:xnack-" and the like
        name = architecture.split(":")[0]
        return name if name in FAMILIES else "gfx942"
    lower = [name for name in FAMILIES if name.startswith("sm_") and int(name[3:]) <= int(found[1])]
    return max(lower, key=lambda name: int(name[3:]), default="sm_80")


def configuration(directions: list[Direction], backward: bool, architecture: str) -> Configuration:
    """The configuration for these directions; the wider one decides, for both are in one launch."""
    architecture = nearest(architecture)
    width = max(d.patches.shape[2] for d in directions)
    heads = max(d.num_heads for d in directions)
    size = max(x.element_size() for d in directions for x in (d.patches, d.weights[2]))
    measured = _MEASURED.get((architecture, backward, size, width, heads))
    if measured is not None:
        return measured
    family = FAMILIES[architecture]
    rows = _CHOSEN[family, backward, min(size, 4)]
    _, tokens, warps, stages = next((row for row in rows if width <= row[0]), rows[-1])
    # 8 heads are a side of a product on NVIDIA's tensor cores, 16 on AMD's.
    head_tile = 8 if heads <= 8 and family != "amd" else 16
    return Configuration(tokens, head_tile, warps, stages)
