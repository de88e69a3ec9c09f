"""`python -m crossvit_kernels`: what runs on this machine, what does not, and why."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from . import __version__, native, triton_runtime
from .backends import BACKENDS, Backend
from .check import check_all
from .cross_attention import cuda_launch


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m crossvit_kernels", description=__doc__)
    parser.add_argument("--check", action="store_true", help="run every kernel against its reference")
    options = parser.parse_args()
    print(f"crossvit-kernels {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"machine: {platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, {_gpus()}")
    _print_native()
    print(f"Triton: {_triton()}")
    print("\nbackends, in the order in which auto tries them:")
    for backend in BACKENDS.values():
        print(f"  {backend.name:10s} {_state(backend)}")
        print(f"             {backend.summary}")
    if not options.check:
        return 0
    print("\nchecks against the reference in float64:")
    passed = True
    for line, good in check_all():
        print(f"  {'ok  ' if good else 'FAIL'} {line}")
        passed = passed and good
    return 0 if passed else 1


def _gpus() -> str:
    # The count alone: asking for names would initialise CUDA.
    count = torch.cuda.device_count()
    return f"{count} CUDA device{'s' if count != 1 else ''}"


def _print_native() -> None:
    report = native.build_report()
    error = native.load_error()
    if error is not None:
        print(f"native module: not available: {error}")
    else:
        built = report.get("cpu") or {}
        pool = "torch's OpenMP threads" if built.get("openmp") else "one thread (built without OpenMP)"
        print(f"native module: built by {built.get('compiler', 'an unknown compiler')}, {pool}")
        module = native.load()
        print(f"  instruction sets here, best first: {', '.join(module.isas())}; in use: {module.isa()}")
    cuda = report.get("cuda")
    if cuda and error is None:
        print(f"  CUDA kernels: for {', '.join(cuda['targets'])} by nvcc {cuda['nvcc']}")
    else:
        print(f"  CUDA kernels: left out: {report.get('cuda_left_out') or 'no native module'}")


def _state(backend: Backend) -> str:
    missing = backend.missing()
    if missing is not None:
        return f"does not run: {missing}"
    if backend.devices == ("cuda",) and not torch.cuda.is_available():
        return "does not run: there is no GPU"
    if backend.name == "cuda":
        found = [cuda_launch.unusable(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
        against = "; ".join(why for why in found if why is not None)
        if against:
            return f"{'runs, but not everywhere' if None in found else 'does not run'}: {against}"
    return "runs"


def _triton() -> str:
    # Looked up, not imported: that is left to the first kernel that needs it.
    return (
        triton_runtime.load_error() or f"{triton_runtime.installed()}, imported when a kernel first needs it"
    )


if __name__ == "__main__":
    sys.exit(main())
