"""Time and memory of rivals, measured side by side. Private; the demo and the benchmarks use it.

A machine's speed drifts by more than many differences are worth, so rivals take turns within one run and are
compared round by round; a ratio comes with an interval, and an interval that holds 1 is no difference.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.autograd.profiler import profile

# The profiler, which counts memory below, announces every start and stop on stderr unless told not to.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# A sample lasts at least this long, so that neither the clock and the scheduler show in it nor the caches
# that another rival has left behind: what is compared is each rival's steady state.
_SAMPLE_SECONDS = 2e-2
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A median, with the bounds that hold the true median with 95 % confidence (order statistics)."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Interval:
        values = sorted(values)
        count = len(values)
        # Largest k with P(Binomial(count, 1/2) < k) <= (1 - confidence) / 2: no assumption on the noise.
        tail, k = 0.0, 0
        while tail + math.comb(count, k) / 2**count <= (1 - _CONFIDENCE) / 2:
            tail += math.comb(count, k) / 2**count
            k += 1
        low, high = (values[k - 1], values[count - k]) if k else (values[0], values[-1])
        return cls(statistics.median(values), low, high)


@dataclass(frozen=True)
class Comparison:
    """How much longer `rival` takes than `ours`, round by round: above 1, ours is faster."""

    ours: Interval
    rival: Interval
    ratio: Interval

    @property
    def distinguishable(self) -> bool:
        return not self.ratio.low <= 1.0 <= self.ratio.high

    def words(self) -> str:
        if not self.distinguishable:
            return "no measurable difference"
        ratio = self.ratio if self.ratio.median >= 1 else _inverse(self.ratio)
        verdict = "faster" if self.ratio.median >= 1 else "slower"
        return f"{ratio.median:.2f} times {verdict} ({ratio.low:.2f}-{ratio.high:.2f})"


def _inverse(interval: Interval) -> Interval:
    return Interval(1 / interval.median, 1 / interval.high, 1 / interval.low)


def compare(ours: list[float], rival: list[float]) -> Comparison:
    """Compare samples of `interleaved`, the n-th of one with the n-th of the other."""
    ratios = [b / a for a, b in zip(ours, rival, strict=True)]
    return Comparison(Interval.of(ours), Interval.of(rival), Interval.of(ratios))


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def interleaved(
    rivals: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device | str = "cpu",
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds a call of each rival, `rounds` samples of each, taken in turn and in alternating order.

    `on_round` is called after each round, for a progress bar. Each rival is warmed up first.
    """
    device = torch.device(device)

    def sample(function: Callable[[], object], calls: int) -> float:
        _synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        _synchronise(device)
        return (time.perf_counter() - start) / calls

    calls = {}
    for name, function in rivals.items():
        sample(function, 1)
        calls[name] = max(1, round(_SAMPLE_SECONDS / sample(function, 1)))
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    for index in range(rounds):
        for name in list(rivals) if index % 2 == 0 else reversed(list(rivals)):
            samples[name].append(sample(rivals[name], calls[name]))
        on_round()
    return samples


def peak_bytes(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most memory that torch's allocator held for one call beyond what it held before.

    On a CPU it is counted from the profiler's record of every allocation; scratch memory that libraries take
    for themselves is not in it.
    """
    device = torch.device(device)
    function()
    if device.type == "cuda":
        _synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        _synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True) as record:
        result = function()
    del result
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
