"""One function against rivals that compute the same: what is measured of each, and how it is kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_timing
from benchmarks.energy import joules
from crossvit_kernels.measure import compare, interleaved, peak_bytes

Call = Callable[[], object]

# In the place of a rival: what no kernel can undercut, and this package in another way.
LIMITS = ("bytes once",)
OWN = (
    *("not frozen fp32", "not frozen bf16", "eager fusion"),
    *("backend torch", "backend triton", "backend cuda"),
)
ROUNDS, LEAST_ROUNDS = 15, 6  # of which 6 are the fewest that give a 95 % interval
_SECONDS = 8.0  # for all rounds of a race; large sizes get fewer
_LATENCY_SECONDS, _LATENCY_CALLS = 1.0, 10
BEYOND_MEMORY = "more than this machine's memory"


def run(
    ours: Call,
    rivals: Mapping[str, Call],
    device: torch.device,
    given: Iterable[Tensor] | None = None,
    latency: bool = False,
    held: Callable[[str], int] = lambda name: 0,
    graphs: bool = True,
) -> dict[str, Any]:
    """Times all in turn, and takes their peak memory, and energy where the machine reports it.

    Args:
        given: inputs and parameters of a training step; what else autograd keeps for backward is counted.
        latency: percentiles of single calls as well.
        held: bytes that the function of a name keeps from call to call; they count as memory of a call.
        graphs: on a GPU, whether to capture the calls as well.

    Returns:
        "ours_seconds"; "peak_bytes", "saved_bytes", "joules", "latency" by name, where "ours" is the first;
        "against NAME" with seconds and the ratio rival over ours. A rival that memory does not hold has
        "not run NAME" instead. On a GPU, "graphs" has medians of captured graphs with a cold cache.

    Raises:
        MemoryError: our own function is more than the memory holds.
    """
    calls = {"ours": ours, **rivals}
    found: dict[str, Any] = {}
    seconds = {}
    for name in list(calls):
        try:
            calls[name]()  # torch.compile compiles
            seconds[name] = _seconds(calls[name], device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if name == "ours":
                first_line = str(error).partition("\n")[0]
                raise MemoryError(f"{BEYOND_MEMORY}: {first_line}".removesuffix(": ")) from None
            found[f"not run {name}"] = BEYOND_MEMORY
            del calls[name]
    rounds = min(ROUNDS, max(LEAST_ROUNDS, int(_SECONDS / sum(max(s, 2e-2) for s in seconds.values()))))
    samples = interleaved(calls, rounds, device)
    found["ours_seconds"] = statistics.median(samples["ours"])
    found["peak_bytes"] = {name: peak_bytes(call, device) + held(name) for name, call in calls.items()}
    if given is not None:
        given = list(given)
        found["saved_bytes"] = {
            name: saved_bytes(call, given) for name, call in calls.items() if name not in LIMITS
        }
    energy = {name: joules(call, device) for name, call in calls.items()}
    if energy["ours"] is not None:
        found["joules"] = energy
    if latency:
        found["latency"] = {name: percentiles(t) for name, t in single_calls(calls, device).items()}
    if device.type == "cuda" and given is None and graphs:
        found["graphs"] = _graphs(calls, rounds)
    for name in calls:
        if name != "ours":
            found[f"against {name}"] = comparison(samples["ours"], samples[name])
            memory = found["peak_bytes"]
            found[f"against {name}"]["memory_ratio"] = memory[name] / max(memory["ours"], 1)
    return found


def _graphs(calls: Mapping[str, Call], rounds: int) -> dict[str, float] | str:
    """Medians of the calls as captured graphs, or why there are none: each holds memory of its own."""
    try:
        cold = gpu_timing.ColdCache()
        graphs = {name: gpu_timing.capture(call) for name, call in calls.items()}
        times = gpu_timing.in_turn(graphs, rounds, lambda replay: gpu_timing.seconds(replay, cold))
    except torch.OutOfMemoryError:
        return BEYOND_MEMORY
    return {name: statistics.median(values) for name, values in times.items()}


def comparison(ours: list[float], rival: list[float]) -> dict[str, float]:
    """Medians in seconds, and the ratio rival over ours with its 95 % interval."""
    result = compare(ours, rival)
    return {
        "rival_seconds": result.rival.median,
        "ours_seconds": result.ours.median,
        "ratio": result.ratio.median,
        "low": result.ratio.low,
        "high": result.ratio.high,
    }


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def saved_bytes(training: Call, given: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps from forward to backward in one call, each storage once, `given` left out."""
    ignored = {x.untyped_storage().data_ptr() for x in given}
    kept: dict[int, int] = {}
    alive = []  # else another storage could get the address of one that is gone

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return x.detach()  # a result of the function would keep its node alive, and the node the result

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        training()
    return sum(kept.values())


def single_calls(calls: Mapping[str, Call], device: torch.device) -> dict[str, list[float]]:
    """Seconds of calls one by one, each waited for, the functions in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    total, rounds = 0.0, 0
    while rounds < _LATENCY_CALLS or total < _LATENCY_SECONDS * len(calls):
        for name, function in calls.items():
            times[name].append(_seconds(function, device))
            total += times[name][-1]
        rounds += 1
    return times


def percentiles(times: list[float]) -> dict[str, float]:
    """Those of 50, 90 and 99 %, in seconds: the least time that so many of the calls do not exceed."""
    ordered = sorted(times)
    return {f"p{p}": ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in (50, 90, 99)}


def _seconds(function: Call, device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
