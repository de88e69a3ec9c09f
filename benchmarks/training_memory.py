"""`python -m benchmarks.training_memory`: the memory of a training step by what it is for, ours and timm's.

Forward, loss, backward and AdamW under autocast in bfloat16, with drop-path as the models are trained. On
a GPU the step runs there. Without one it runs on the CPU: of our model with the kernels' launches left out,
which changes no size of what they read or write, so that its numbers are garbage and its memory is right.
Memory grows linearly with the batch, so two batches tell that of a large one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.compiled import compiling
from benchmarks.race import saved_bytes
from crossvit import create_model
from crossvit._timm import import_timm
from crossvit_kernels import use_backend
from crossvit_kernels.backends import BACKENDS
from crossvit_kernels.measure import peak_bytes

MEASURED = (16, 24)  # batches, so large that activations are most of it
DROP_PATH = 0.1
TOTAL = "total"
Report = dict[str, float]  # bytes by what they are for, and in total


@contextmanager
def without_launches(architecture: str = "sm_90") -> Iterator[None]:
    """Triton's kernels are prepared as for a GPU, and not run; tensors are the CPU's."""
    anywhere = replace(BACKENDS["triton"], devices=("cuda", "cpu"), missing=lambda: None)
    no_kernel = "$^"
    with mock.patch.dict(BACKENDS, {"triton": anywhere}), compiling(architecture, only=no_kernel):
        yield


def account(model: nn.Module, batch: int, device: torch.device) -> Report:
    """Bytes by what they are for where a step holds most; steps before it have made the optimiser's state."""
    images = torch.randn(batch, 3, 240, 240, device=device)
    labels = torch.arange(batch, device=device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return F.cross_entropy(model(images), labels)

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    most = peak_bytes(step, device)
    state = sum(t.nbytes for of in optimizer.state.values() for t in of.values())
    kept = saved_bytes(forward, [*parameters, images])
    found = {
        "parameters": float(sum(p.nbytes for p in parameters)),
        "optimiser's state": float(state),
        "kept for backward": float(kept),
        "gradients and work": float(most - kept),
    }
    return {**found, TOTAL: sum(found.values())}


def at(batch: int, reports: Sequence[Report]) -> Report:
    """Of a batch, from those of `MEASURED`."""
    (first, second), (low, high) = MEASURED, reports
    return {name: low[name] + (high[name] - low[name]) * (batch - first) / (second - first) for name in low}


def reports(name: str, batch: int, device: torch.device) -> dict[str, Report]:
    """Of our model and of timm's."""
    found = {}
    for who in ("this package", "timm"):
        ours = who == "this package"
        make = create_model if ours else import_timm().create_model
        model = make(name, drop_path_rate=DROP_PATH).to(device).train()
        launches = without_launches() if ours and device.type == "cpu" else nullcontext()
        with launches, use_backend("triton") if ours else nullcontext():
            found[who] = at(batch, [account(model, few, device) for few in MEASURED])
    return found


def table(found: dict[str, Report]) -> list[str]:
    """Lines in GB, the total last."""
    lines = [f"{'':18}" + "".join(f"{who:>16}" for who in found)]
    for name in next(iter(found.values())):
        lines.append(f"{name:18}" + "".join(f"{of[name] / 1e9:13.2f} GB" for of in found.values()))
    ours, theirs = (of[TOTAL] for of in found.values())
    return [*lines, f"{ours / theirs:.2f} times timm's"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_memory", description=__doc__)
    parser.add_argument("--model", default="crossvit_18_240")
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "counted on the CPU, kernels not run"
    print(f"{options.model}, batch {options.batch}, bfloat16 under autocast, AdamW: {where}")
    print("\n".join(table(reports(options.model, options.batch, device))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
