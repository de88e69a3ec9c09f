"""Runs CUDA kernels, as compiled, on a machine without a GPU.

It executes the PTX that nvcc and Triton emit for compute capability 8.0 and 9.0, with numpy, and checks while
it does: bounds, alignment, races, uninitialised memory and registers, divergence of barriers and warps, and
the order of asynchronous copies and matrix products. What it does not know is an error, never a guess.

- `triton_driver.interpreted()` lets ordinary Triton launches run on it,
- `host_library.HostLibrary` lets launchers compiled by nvcc run on it,
- `run_kernel(parse(text), name, grid, block, shared_bytes, arguments)` runs PTX text directly.

A large grid runs in parts, one after another, unless its blocks may wait for one another by atomic
operations; races between parts are found all the same. Launches run one after another too: of a dependent one
it is checked that each thread waits before it touches global memory.

Not modelled: weak memory order (a missing fence is seen only as a race); barriers of a part of a block,
mbarriers and copies to another block of a cluster, device functions, printf (all refused); the order of
summation of tensor cores and the error of approximate functions (compare with tolerances). An access that
leaves one argument and lands in another one is not seen, as the addresses are real ones.
"""

from . import access, asynchronous, clusters, floating, scalar, tensor, warp  # noqa: F401  (they register their instructions)
from .formats import PtxError
from .machine import Machine, run_kernel
from .memory import GlobalMemory
from .parser import Module, parse

__all__ = ["GlobalMemory", "Machine", "Module", "PtxError", "parse", "run_kernel"]
