"""Shared by all tests: timm imports everywhere, every test starts from seed 0."""

from __future__ import annotations

import ctypes
import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crossvit._timm import import_timm
from tests import compile_cache, tiers
from tests.contract import Subject

import_timm()


# Bytes that a test has to leave behind for its process to give them back.
LARGE, _STATM = 2**26, Path("/proc/self/statm")


def _workers() -> int:
    return int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", default="0/1", help="of what is selected, the I-th part of N")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is drawn, before pytest selects by markers."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        subject = callspec.params.get("subject") if callspec else None
        if isinstance(subject, Subject) and subject.interpreted:
            item.add_marker(pytest.mark.sweep)
        if item.get_closest_marker("sweep"):
            item.add_marker(pytest.mark.drawn)
    tiers.mark_drawn(items)


class _Selection:
    """Draws a shard of what pytest selected, and orders it."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        part, parts = map(int, config.getoption("--shard").split("/"))
        kept = tiers.shard(items, part, parts)
        if len(kept) < len(items):
            config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        if config.getoption("maxfail") == 1:
            kept = tiers.shortest_first(kept)
        elif "PYTEST_XDIST_WORKER" in os.environ:
            kept = tiers.longest_first(kept, _workers())
        items[:] = kept


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Selection())
    if not hasattr(config, "workerinput"):
        compile_cache.prune()


def pytest_collection_finish() -> None:
    """What was imported lives to the end: collections need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    """glibc keeps what a large model took: a worker would stay as large as its largest test."""
    before = _resident_bytes()
    yield
    if _resident_bytes() - before > LARGE:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes() -> int:
    """0 where Linux does not tell."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if _STATM.exists() else 0


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    """Workers share the cores: with a full pool each, they would wait for one another."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // _workers()))


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """An operation on a backend; see tests/contract.py."""
    with request.param.ready():
        yield request.param
