"""Which tile each kernel uses, by architecture, width and dtype.

`_CHOSEN` was chosen from what the kernels compile to (docs/compile_table.md): nothing in a thread's local
memory, then as many warps on a multiprocessor as possible, then the fewest instructions a token. `_MEASURED`
goes before it: `python -m benchmarks.tune_triton` writes it on a GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from .directions import Direction


@dataclass(frozen=True)
class Configuration:
    """Tiles and warps.

    Attributes:
        tokens: tokens a step of the attention.
        head_tile: heads of a program of `attend`, 8 or 16.
        warps, stages: of the attention. Every warp has a slice of the channels, so that more warps mean fewer
            registers of each, but more of what all warps do alike: the softmax.
        piece: channels of a slice that are one operand.
        head_warps: of the chain's kernels whose programs are a head each.
        block: channels of a tile of the chain; block_warps its warps.
    """

    tokens: int
    head_tile: int
    warps: int
    stages: int
    piece: int
    head_warps: int
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

# (family, backward, operands) -> rows of (largest width, tokens, warps, stages, piece). The last row stands
# for all greater widths too.
#
# Tokens: 16 is the least of a matrix product. 32 halve the barriers and the shared work of a step, where the
# registers suffice. Warps: a slice of at most 112 channels a warp forward, 96 backward, where gradients of
# tokens and queries are kept beside them. Stages: 2 loads one step ahead, 3 two, which 16 tokens of 448
# channels need to keep the memory busy; 1 where further buffers do not fit into shared memory. Pieces of one
# size share the addresses in shared memory that products read, which otherwise fill the registers; small ones
# need fewer registers and more instructions.
#
# No row serves these, whose operands are larger than the shared memory of "small": float32 matrices backward
# at 768 channels and, with tf32, at 448, and forward at 768.
_CHOSEN: dict[tuple[str, bool, str], tuple[tuple[int, int, int, int, int], ...]] = {
    ("large", False, "as they are"): ((384, 32, 4, 2, 32), (512, 16, 4, 3, 32), (1024, 16, 8, 2, 32)),
    ("large", False, "normalised"): ((512, 16, 4, 2, 32), (1024, 16, 8, 2, 32)),
    ("large", False, "float32"): ((256, 16, 4, 2, 32), (1024, 16, 8, 2, 32)),
    ("large", True, "as they are"): ((256, 16, 4, 2, 16), (1024, 16, 8, 2, 16)),
    ("large", True, "normalised"): ((256, 16, 4, 2, 32), (1024, 16, 8, 1, 16)),
    ("large", True, "float32"): ((256, 16, 4, 1, 16), (1024, 16, 8, 1, 16)),
    ("small", False, "as they are"): ((384, 32, 4, 2, 32), (512, 16, 4, 3, 32), (1024, 16, 8, 2, 32)),
    ("small", False, "normalised"): ((512, 16, 4, 2, 32), (1024, 16, 8, 1, 32)),
    ("small", False, "float32"): ((256, 16, 4, 2, 32), (1024, 16, 8, 1, 32)),
    ("small", True, "as they are"): ((192, 16, 4, 2, 32), (256, 16, 4, 2, 16), (1024, 16, 8, 2, 16)),
    ("small", True, "normalised"): ((256, 16, 4, 2, 32), (1024, 16, 8, 1, 16)),
    ("small", True, "float32"): ((512, 16, 4, 1, 16), (1024, 16, 8, 1, 16)),
    ("amd", False, "as they are"): ((256, 16, 4, 2, 32), (512, 16, 8, 2, 32), (1024, 16, 8, 1, 32)),
    ("amd", False, "normalised"): ((256, 16, 4, 2, 32), (1024, 16, 8, 1, 32)),
    ("amd", False, "float32"): ((256, 16, 4, 2, 32), (1024, 16, 8, 1, 32)),
    ("amd", True, "as they are"): ((512, 16, 4, 1, 16), (1024, 16, 8, 1, 16)),
    ("amd", True, "normalised"): ((512, 16, 4, 1, 16), (1024, 16, 8, 1, 16)),
    ("amd", True, "float32"): ((512, 16, 4, 1, 16), (1024, 16, 8, 1, 16)),
}

# (architecture, backward, operands, greatest width, heads) -> what was fastest.
# Written by benchmarks/tune_triton.py from here to the end of the braces.
_MEASURED: dict[tuple[str, bool, str, int, int], Configuration] = {}


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


def operands(tokens: torch.dtype, matrices: torch.dtype) -> str:
    """How tokens go into products: bfloat16 as they are, others normalised first, in the matrices' dtype."""
    if matrices == torch.float32:
        return "float32"
    return "as they are" if tokens == matrices == torch.bfloat16 else "normalised"


def allows_tf32(architecture: str) -> bool:
    """Whether its matrix products have it: of AMD's GPUs only gfx942."""
    name = nearest(architecture)
    return FAMILIES[name] != "amd" or name == "gfx942"


def head_warps(architecture: str, backward: bool) -> int:
    """Of a program of a head. Its operands are too much for the registers of four warps forward and on
    Blackwell; elsewhere the compiler spills at eight warps backward."""
    return 8 if not backward or nearest(architecture) in ("sm_100", "sm_120") else 4


# Registers of a thread in the chain's kernels, by warps. Without a limit, ptxas aims at 48, 64, 72 or 96 of
# them and keeps a predicate in memory, on Blackwell with some limits as well. These allow three blocks on a
# multiprocessor, on Blackwell two, which shared memory or the grid allow hardly more of.
_REGISTERS = {4: 168}
_REGISTERS_OF_BLACKWELL = {4: 200, 8: 128}


def register_limit(architecture: str, warps: int) -> dict[str, int]:
    """That of a thread in the chain's kernels, as options of a launch; AMD has none."""
    architecture = nearest(architecture)
    if FAMILIES[architecture] == "amd":
        return {}
    limits = _REGISTERS_OF_BLACKWELL if architecture in ("sm_100", "sm_120") else _REGISTERS
    return {"maxnreg": limits[warps]} if warps in limits else {}


def configuration(directions: list[Direction], backward: bool, architecture: str) -> Configuration:
    """The configuration for these directions; the wider one decides, for both are in one launch."""
    architecture = nearest(architecture)
    width = max(d.patches.shape[2] for d in directions)
    heads = max(d.num_heads for d in directions)
    kind = operands(directions[0].patches.dtype, directions[0].weights[2].dtype)
    measured = _MEASURED.get((architecture, backward, kind, width, heads))
    if measured is not None:
        return measured
    family = FAMILIES[architecture]
    rows = _CHOSEN[family, backward, kind]
    _, tokens, warps, stages, piece = next((row for row in rows if width <= row[0]), rows[-1])
    # 8 heads are a side of a product on NVIDIA's tensor cores, 16 on AMD's. Float32 queries of 16 heads leave
    # no shared memory of "small" for the tokens.
    sixteen = family == "amd" or (heads > 8 and (family, kind) != ("small", "float32"))
    return Configuration(
        tokens, 16 if sixteen else 8, warps, stages, piece, head_warps(architecture, backward)
    )
