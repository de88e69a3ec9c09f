"""Energy, where a machine reports it: Intel's and AMD's counters of CPU packages, NVIDIA's of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
_AT_LEAST = 0.5  # seconds; counters are renewed every few milliseconds

Counter = Callable[[], float]  # joules since some moment


def counter(device: torch.device) -> Counter | None:
    """Of the GPU, or of all CPU packages together; None where nothing is reported, or not to this user."""
    return _of_gpu(device) if device.type == "cuda" else _of_packages()


def joules(function: Callable[[], object], device: torch.device) -> float | None:
    """Of one call, what the rest of the device takes meanwhile included; None where no energy is reported."""
    read = counter(device)
    if read is None:
        return None
    function()
    calls, energy, start = 0, read(), time.perf_counter()
    while time.perf_counter() - start < _AT_LEAST:
        function()
        calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (read() - energy) / calls


def _of_gpu(device: torch.device) -> Counter | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no library, no driver, or a GPU that does not report
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _of_packages() -> Counter | None:
    zones = [zone for zone in sorted(POWERCAP.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    try:
        # Beside packages there may be the whole platform, "psys", which has them in it.
        zones = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        ranges = [float((zone / "max_energy_range_uj").read_text()) for zone in zones]
        last = [float((zone / "energy_uj").read_text()) for zone in zones]
    except OSError:
        return None
    if not zones:
        return None
    total = 0.0

    def read() -> float:
        nonlocal total
        for i, zone in enumerate(zones):
            now = float((zone / "energy_uj").read_text())
            total += (now - last[i]) % ranges[i]  # it begins again at its range
            last[i] = now
        return total / 1e6

    return read
