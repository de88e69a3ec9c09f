"""Shared by all tests: timm imports everywhere, every test starts from seed 0."""

from __future__ import annotations

import os
import zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator

import pytest
import torch

from crossvit._timm import import_timm
from tests.contract import Subject

import_timm()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="I/N", help="of the tests marked interpreted, the I-th part of N")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the contract of interpreted kernels, and takes a part of it; parts mix all tests."""
    part, parts = map(int, (config.getoption("--part") or "0/1").split("/"))
    kept, dropped = [], []
    for item in items:
        callspec = getattr(item, "callspec", None)
        subject = callspec.params.get("subject") if callspec else None
        if isinstance(subject, Subject) and subject.interpreted:
            item.add_marker(pytest.mark.interpreted)
        mine = item.get_closest_marker("interpreted") is None or zlib.crc32(item.nodeid.encode()) % parts == (
            part % parts
        )
        (kept if mine else dropped).append(item)
    items[:] = kept
    if dropped:
        config.hook.pytest_deselected(items=dropped)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    """Workers share the cores: with a full pool each, they would wait for one another."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """An operation on a backend; see tests/contract.py."""
    with request.param.ready():
        yield request.param
