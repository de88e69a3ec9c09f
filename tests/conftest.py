"""Shared by all tests: timm imports everywhere, every test starts from seed 0."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator

import pytest
import torch

from crossvit._timm import import_timm
from tests.contract import Subject

import_timm()


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
