"""`python -m benchmarks scale --check`: the model of scale.py against two processes on this machine."""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import distributed
from torch.multiprocessing.spawn import ProcessException, spawn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks import scale
from benchmarks.gpu_timing import in_turn
from crossvit import create_model, find_variant
from crossvit_kernels.measure import Comparison, compare

MODEL, BATCH = "crossvit_9", 2  # images of each process
ROUNDS = 9
TOLERANCE = 0.2


def run() -> int:
    """Prints what was predicted and what was measured; 0, 1 if that failed, or 130 if it was interrupted."""
    try:
        print("measuring", end="", file=sys.stderr, flush=True)
        print(_table(check(ROUNDS)), end="")
    except (RuntimeError, ProcessException) as error:
        print(f"--check: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


@dataclass(frozen=True)
class Checked:
    """What was predicted, from what, and how the prediction (the rival) compares with the measurement."""

    name: str
    source: str
    comparison: Comparison


def check(rounds: int) -> list[Checked]:
    """Predicts inference and training of two processes of one thread each, and measures both, in turn.

    Raises:
        RuntimeError: torch has no gloo.
        ProcessException: a process failed.
    """
    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise RuntimeError("--check needs torch.distributed with gloo, which this torch was built without")
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = spawn(_process, (store.port, rounds), nprocs=2, join=False, daemon=True)
    try:
        while not context.join(timeout=1.0):
            print(".", end="", file=sys.stderr, flush=True)
    finally:
        print(file=sys.stderr)
        for process in context.processes:
            process.kill()
            process.join()
    samples = json.loads(store.get("samples"))
    return compared(
        [dict(zip(samples, values, strict=True)) for values in zip(*samples.values(), strict=True)]
    )


def compared(rounds: Sequence[Mapping[str, float]]) -> list[Checked]:
    """Predicts round by round: of each, the seconds of what `_process` measures."""
    size, batch = 4 * find_variant(MODEL).parameters, BATCH
    speeds, steps = [], []
    for seconds in rounds:
        speeds.append(scale.inference(2, batch / seconds["alone"], scale.Cluster()).images_per_second)
        cluster = scale.Cluster(link=size / seconds["all-reduce"])
        step, recipe = scale.Step(seconds["compute"], batch), scale.Recipe(batch=2 * batch)
        steps.append(scale.training(2, step, scale.Gradients(size), cluster, recipe).step)
    alone, compute, moved = (
        statistics.median(r[name] for r in rounds) for name in ("alone", "compute", "all-reduce")
    )
    one = f"one process: {batch / alone:.3g} images/s"
    parts = f"without communication: {compute:.3g} s; all-reduce of {size / 1e6:.0f} MB: {moved:.2g} s"
    measured = [2 * batch / r["together"] for r in rounds], [r["step"] for r in rounds]
    return [
        Checked("inference, images/s", one, compare(measured[0], speeds)),
        Checked("training step, s", parts, compare(measured[1], steps)),
    ]


def _process(rank: int, port: int, rounds: int) -> None:
    """One of two; the first leaves the samples in the store."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = next(n for _, n in socket.if_nameindex() if n.startswith("lo"))
    store = distributed.TCPStore("127.0.0.1", port, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    side = find_variant(MODEL).image_sizes[0]
    images = torch.randn(BATCH, 3, side, side)
    labels = torch.zeros(BATCH, dtype=torch.long)
    evaluated = create_model(MODEL).eval()
    trained = DistributedDataParallel(create_model(MODEL).train())
    optimizer = torch.optim.AdamW(trained.parameters())
    gradients = torch.zeros(find_variant(MODEL).parameters)

    @torch.inference_mode()
    def infer() -> None:
        evaluated(images)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(trained(images), labels).backward()
        optimizer.step()

    def compute() -> None:
        with trained.no_sync():
            step()

    rivals: dict[str, Callable[[], object]] = {
        "alone": infer if rank == 0 else lambda: None,
        "together": infer,
        "all-reduce": lambda: distributed.all_reduce(gradients),
        "compute": compute,
        "step": step,
    }
    samples = in_turn(rivals, rounds, _seconds)
    if rank == 0:
        store.set("samples", json.dumps(samples))
    distributed.destroy_process_group()


def _seconds(function: Callable[[], object]) -> float:
    """From the common start of both processes until the slower one has called the function."""
    distributed.barrier()
    start = time.perf_counter()
    function()
    seconds = torch.tensor(time.perf_counter() - start)
    distributed.all_reduce(seconds, distributed.ReduceOp.MAX)
    return seconds.item()


def _table(found: Sequence[Checked]) -> str:
    rows = []
    for checked in found:
        of, ratio = checked.comparison, checked.comparison.ratio
        row = {"": checked.name}
        row |= {"predicted": scale.figure(of.rival.median), "measured": scale.figure(of.ours.median)}
        row["error (95 % interval)"] = (
            f"{ratio.median - 1:+.0%} ({ratio.low - 1:+.0%} to {ratio.high - 1:+.0%})"
        )
        row["verdict"] = "within 20 %" if abs(ratio.median - 1) <= TOLERANCE else "DIFFERS by more than 20 %"
        rows.append(row | {"predicted from": checked.source})
    return scale.table(f"Two processes of one thread, {MODEL}, {BATCH} images each", rows)
