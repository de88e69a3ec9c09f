"""The stopwatch and the memory count, on things whose time and size are known."""

from __future__ import annotations

import time

import pytest
import torch

from crossvit_kernels.measure import Comparison, Interval, compare, interleaved, peak_bytes


def test_the_interval_is_that_of_order_statistics():
    """For 25 values: the 8th and the 18th, as tables of the sign test say; few values give their range."""
    interval = Interval.of([float(x) for x in range(1, 26)])
    assert (interval.low, interval.median, interval.high) == (8.0, 13.0, 18.0)
    few = Interval.of([3.0, 1.0, 2.0])
    assert (few.low, few.median, few.high) == (1.0, 2.0, 3.0)


def test_the_interval_holds_the_median_as_often_as_it_says():
    draws = torch.distributions.LogNormal(0.0, 1.0).sample((2000, 25))
    held = [Interval.of(row.tolist()) for row in draws]
    share = sum(i.low <= 1.0 <= i.high for i in held) / 2000
    assert 0.95 <= share < 0.99


def test_a_difference_is_found_and_none_is_invented():
    samples = interleaved({"fast": lambda: time.sleep(0.004), "slow": lambda: time.sleep(0.008)}, 11)
    comparison = compare(samples["fast"], samples["slow"])
    assert comparison.distinguishable
    assert comparison.ratio.median == pytest.approx(2, rel=0.3)
    assert "times faster" in comparison.words()
    assert "times slower" in compare(samples["slow"], samples["fast"]).words()
    slower = compare([2.0, 2.1, 2.2], [1.0, 1.0, 1.0])
    assert slower.words() == "2.10 times slower (2.00-2.20)"
    one = Interval(1.0, 0.9, 1.1)
    assert Comparison(one, one, one).words() == "no measurable difference"


def test_rounds_are_reported_and_short_calls_repeated():
    calls, rounds = [], []
    interleaved({"a": lambda: calls.append(1)}, 5, on_round=lambda: rounds.append(1))
    assert len(rounds) == 5
    assert len(calls) > 500, "a call of a microsecond must be repeated to be timed"


def test_peak_memory():
    x = torch.zeros(1000, 1000)
    one = x.nbytes
    for function, want in ((lambda: x + 1, one), (lambda: (x + 1) * 2, 2 * one), (lambda: x.sum(), 0)):
        assert abs(peak_bytes(function) - want) < 1e4
