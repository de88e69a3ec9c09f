"""A plugin of pytest: which lines and branches of GPU kernels each test executes on the interpreter.

Each worker writes a file into the folder that KERNEL_LINES names: a line of JSON for each test.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.ptx.machine import Machine

_touched: set[str] = set()
_PLACE = re.compile(r"\[([^\]]*)\]$")


def _place(step: Any) -> str:
    found = _PLACE.search(step.line)
    return found[1].partition(" in ")[0] if found else ""


def pytest_configure(config: pytest.Config) -> None:
    active = Machine._active

    def seen(self: Any, step: Any, mask: Any) -> Any:
        lanes = active(self, step, mask)
        if lanes is None or lanes.any():
            _touched.add(_place(step))
        if step.control and step.guard is not None:
            taken = lanes is None or bool(lanes.any())
            left = lanes is not None and bool((~lanes if mask is None else mask & ~lanes).any())
            _touched.update(
                f"branch {_place(step)} {way}" for way, on in (("taken", taken), ("not", left)) if on
            )
        return lanes

    patch = mock.patch.object(Machine, "_active", seen)
    patch.start()
    config.add_cleanup(patch.stop)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _touched.clear()
    result = yield
    if _touched:
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        with open(Path(os.environ["KERNEL_LINES"], f"{worker}.jsonl"), "a") as file:
            file.write(json.dumps({"test": item.nodeid, "touched": sorted(_touched - {""})}) + "\n")
    return result
