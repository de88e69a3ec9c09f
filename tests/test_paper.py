"""The paper's tables, recounted."""

from __future__ import annotations

import pytest
import torch

from crossvit import paper
from crossvit.cli import main
from crossvit.paper import PAPER, comparison, count


@pytest.mark.parametrize("row", PAPER, ids=lambda row: f"{row.table} {row.name}")
def test_published_figures_come_out(row):
    """All of them to the last printed digit, but for exceptions that are named, and are exceptions."""
    found = comparison(row, count(row.make(device="meta").eval()))
    assert {what for what, (_, _, equal) in found.items() if not equal} == set(row.exceptions), found


def test_every_row_of_the_ablations_is_there():
    names = [(row.table, row.name[0]) for row in PAPER if row.table == "7"]
    assert [name for _, name in names] == list("ABCDE")
    assert sum(row.table == "6" for row in PAPER) == 5
    assert sum(row.table == "8" for row in PAPER) == 6
    assert [row.top1 for row in PAPER if row.table == "text"] == [80.0, 83.0]
    assert sum(row.table == "2-4" for row in PAPER) == 15


@pytest.mark.parametrize("name", ["DeiT-9", "DeiT-9†"])
def test_single_branches_compute_and_train(name):
    row = next(row for row in PAPER if row.name == name)
    model = row.make().train()
    model(torch.randn(1, 3, 224, 224)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_command_prints_every_row(capsys, monkeypatch):
    some = [row for row in PAPER if row.name == "crossvit_9_240" or row.exceptions]
    monkeypatch.setattr(paper, "PAPER", some)
    main(["models", "--paper"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["table", "model", "params", "M", "recount", "GMACs", "recount", "top-1"]
    assert lines[0].split() == ["2-4", "crossvit_9_240", "8.6", "8.6", "1.8", "1.8", "73.9"]
    assert "27.7" in lines[1]
    assert lines[1].endswith("this one gives the latter")
    assert lines[2].endswith("is 31.155 cut off, not rounded")
