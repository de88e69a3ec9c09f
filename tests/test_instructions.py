"""The command that counts instructions: what it reads of callgrind, and what it says where it cannot."""

from __future__ import annotations

import pytest

from benchmarks import instructions


def test_callgrinds_files_are_read_in_order(tmp_path):
    for number, count in ((10, 30), (2, 20), (1, 10), (3, 0)):
        (tmp_path / f"out.{number}").write_text(
            f"desc: Trigger: x\nsummary: 7\nfn=(1)\n1 {count}\ntotals: {count}\n"
        )
    (tmp_path / "out").write_text("totals: 5\n")
    assert instructions.totals(tmp_path) == [10, 20, 30]


def test_the_table_has_a_row_for_each_call():
    names = [row.what for row in instructions.ROWS]
    lines = instructions.table([10_000_000 * (i + 1) for i in range(len(names))]).splitlines()
    assert len(lines) == 2 + len(names)
    assert lines[2] == f"| {names[0]} | 10.00 | {10e6 / (197 * 448 * 1344 / 8):.2f} |"
    assert [row.function for row in instructions.ROWS] == sorted(
        (row.function for row in instructions.ROWS), key=list(instructions.FUNCTIONS).index
    )


def test_what_valgrind_does_not_count_is_an_error(monkeypatch):
    done = instructions.subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(instructions.subprocess, "run", lambda *args, **options: done)
    with pytest.raises(
        RuntimeError, match="callgrind counted 0 calls of crossvit::avx2::cross_attention_for"
    ):
        instructions.count("forward")


def test_a_machine_without_valgrind_says_so(monkeypatch, capsys):
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    assert instructions.main() == 2
    assert capsys.readouterr().err == "instructions cannot be counted here: valgrind was not found on PATH\n"
