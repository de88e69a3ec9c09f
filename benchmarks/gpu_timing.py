"""Time on a GPU: captured graphs, replayed with a cold L2 cache between two events, rivals in turn."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping

import torch

_WARM_CALLS = 3
_WARM_ROUNDS = 3  # an idle GPU clocks up first
_CACHES = 4  # times the L2 cache that is read to empty it
_LEAST_BYTES = 512 << 20  # takes long enough to read for the launch that follows to be waiting for the GPU


def capture(function: Callable[[], object]) -> Callable[[], None]:
    """The replay of a CUDA graph of `function`, which is called a few times before.

    What it returns is not kept: the memory is the graph's, and overwritten by each replay.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_CALLS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


class ColdCache:
    """Empties the L2 cache: writes a buffer of several times its size, then reads it.

    The reading matters: lines that are only written would be stored to memory while the next kernel is timed.
    """

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._buffer = torch.empty(max(_CACHES * size, _LEAST_BYTES) // 4, dtype=torch.float32, device="cuda")

    def __call__(self) -> None:
        self._buffer.fill_(1.0)
        self._buffer.sum()


def seconds(replay: Callable[[], object], prepare: Callable[[], object]) -> float:
    """Seconds on the GPU of one call after `prepare`; the latency of a graph's launch is in it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    prepare()
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_turn(
    rivals: Mapping[str, Callable[[], object]],
    rounds: int,
    sample: Callable[[Callable[[], object]], float],
) -> dict[str, list[float]]:
    """`rounds` samples of each rival, taken in turn and in alternating order."""
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    for index in range(-_WARM_ROUNDS, rounds):
        for name in list(rivals) if index % 2 == 0 else reversed(list(rivals)):
            value = sample(rivals[name])
            if index >= 0:
                samples[name].append(value)
    return samples


def kernel_seconds(
    function: Callable[[], object], name: str, rounds: int, prepare: Callable[[], object]
) -> list[float]:
    """Seconds of each run of the one kernel of `function` whose name a regular expression finds.

    As the GPU's own trace has it: where launches overlap, the wait for the kernel before it is in it.
    """
    from torch.profiler import ProfilerActivity, profile

    for _ in range(_WARM_CALLS):
        function()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(rounds):
            prepare()
            function()
        torch.cuda.synchronize()
    return seconds_of(((event.name, event.time_range.elapsed_us()) for event in trace.events()), name, rounds)


def seconds_of(events: Iterable[tuple[str, float]], name: str, rounds: int) -> list[float]:
    """Those that a regular expression finds among (name, microseconds); there must be as many as rounds."""
    found = [microseconds * 1e-6 for kernel, microseconds in events if re.search(name, kernel)]
    if len(found) != rounds:
        raise RuntimeError(f"the trace has {len(found)} kernels {name} instead of {rounds}")
    return found


def copy_bandwidth(rounds: int = 15) -> float:
    """Bytes read and written a second by a large copy from device to device, the median."""
    size = min(2 << 30, torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory // 8)
    return _copied(size, 1, rounds, ColdCache())


def cache_bandwidth(rounds: int = 15, times: int = 64) -> float:
    """The same of a copy within the L2 cache: of an eighth of it, so often that its start does not count."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size // 8
    return _copied(size, times, rounds, lambda: None)


def _copied(size: int, times: int, rounds: int, prepare: Callable[[], object]) -> float:
    source = torch.rand(size // 4, device="cuda")
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(times):
            target.copy_(source)

    replay = capture(copies)
    samples = in_turn({"copy": replay}, rounds, lambda call: seconds(call, prepare))["copy"]
    return 2 * times * source.nbytes / statistics.median(samples)
