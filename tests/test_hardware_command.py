"""The hardware command, as far as it needs no GPU."""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_cases, gpu_timing, hardware, preference, tune_triton
from benchmarks.gpu_cases import CASES, OURS, TARGETS, Case, Subject, of_backend
from crossvit_kernels.backends import BACKENDS
from tests.operations import OPERATIONS, Size, leaves

SMALL = Size(2, 6, 24, 3, 5, 16, 2)
TABLE = """# Ledger

| kernel | GPU | date | commit | result |
|---|---|---|---|---|
| one | - | - | - | not run |
| two | A | 2026-01-01 | aaa | passed |

The end.
"""
GPU = {"gpu": "Some GPU 3000", "memory": 1}


def small(operation, mode: str = "forward + backward", dtype: str = "fp32", alone: bool = False) -> Case:
    return Case(Subject(operation.name, operation, SMALL, alone), mode, 3, dtype)


@pytest.fixture
def report(tmp_path, monkeypatch) -> hardware.Report:
    """Writes into a folder of the test's own."""
    monkeypatch.setattr(hardware, "ROOT", tmp_path)
    monkeypatch.setattr(hardware, "LEDGER", tmp_path / "hardware.md")
    monkeypatch.setattr(hardware, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(hardware, "machine", lambda: GPU)
    hardware.LEDGER.write_text(TABLE)
    return hardware.Report(hardware.Budget(100), "abc")


# The ledger and the results


def test_a_row_takes_the_place_of_not_run_and_of_itself():
    once = hardware.with_row(TABLE, "one", "A", "2026-02-02", "bbb", "passed")
    assert once == TABLE.replace("| one | - | - | - | not run |", "| one | A | 2026-02-02 | bbb | passed |")
    assert hardware.with_row(once, "one", "A", "2026-02-02", "bbb", "passed") == once
    later = hardware.with_row(once, "one", "A", "2026-03-03", "ccc", "FAILED")
    assert later == once.replace("| 2026-02-02 | bbb | passed |", "| 2026-03-03 | ccc | FAILED |")


def test_rows_of_other_gpus_and_new_rows():
    another = hardware.with_row(TABLE, "two", "B", "2026-02-02", "bbb", "passed")
    assert another.replace("| two | B | 2026-02-02 | bbb | passed |\n", "") == TABLE
    assert another.index("| two | A") < another.index("| two | B")
    new = hardware.with_row(TABLE, "three", "B", "2026-02-02", "bbb", "passed")
    assert new.replace("| three | B | 2026-02-02 | bbb | passed |\n", "") == TABLE
    assert new.index("| two |") < new.index("| three |") < new.index("The end.")


def test_the_ledger_has_every_row():
    rows = [
        line.split("|")[1].strip() for line in hardware.LEDGER.read_text().splitlines() if line[:1] == "|"
    ]
    assert [row for row in hardware.rows() if row not in rows] == []


def test_results_are_kept_until_there_are_new_ones(report):
    report.keep("one", {"value": 1}, "passed")
    report.keep("two", {"value": 2}, "passed")
    later = hardware.Results(report.results.path, "a later run", {"gpu": "Some GPU 3000", "memory": 2})
    later.add("two", {"value": 3})
    data = json.loads(later.path.read_text())
    assert (data["entries"]["one"]["value"], data["entries"]["two"]["value"]) == (1, 3)
    assert [facts["memory"] for facts in data["runs"].values()] == [1, 2]
    later.add("one", {"value": 4})
    assert list(json.loads(later.path.read_text())["runs"]) == ["a later run"]
    assert "| one | Some GPU 3000 |" in hardware.LEDGER.read_text()


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    hardware.write(path, "old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hardware.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hardware.write(path, "new")
    assert path.read_text() == "old"
    hardware.write(path, "new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


# Time


def test_the_budget():
    now = [100.0]
    budget = hardware.Budget(60, lambda: now[0])
    assert budget.grant(20) == 20
    assert budget.grant(50, keep=30) == 30
    now[0] += 40
    assert budget.spent == 40
    assert budget.grant(50) == 20
    assert budget.grant(50, keep=16) == 0
    now[0] += 100
    assert budget.grant(50) == 0


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["as is", "background"])
def test_a_command_is_interrupted_at_its_limit(handler):
    """In the background too, where shells let processes ignore interruptions."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        check_interruption()
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def check_interruption():
    code = (
        "import time\ntry: print('begun', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print('end')"
    )
    began = time.monotonic()
    outcome = hardware.run([sys.executable, "-c", code], 4)  # Python itself takes a while to start
    assert outcome.lines == ["begun", "end"]
    assert outcome.stopped
    assert time.monotonic() - began < 12
    done = hardware.run(
        [sys.executable, "-c", "import os; print(os.environ['X'])"], 60, environment={"X": "y"}
    )
    assert (done.code, done.stopped, done.lines) == (0, False, ["y"])


@pytest.mark.parametrize(
    ("code", "stopped", "line", "want"),
    [
        (0, False, "3 passed, 1 skipped in 2.50s", "passed after 7 s: 3 passed, 1 skipped"),
        (0, False, "= 12 passed in 75.10s (0:01:15) =", "passed after 7 s: 12 passed"),
        (1, False, "= 1 failed, 3 passed in 2.50s =", "FAILED after 7 s: 1 failed, 3 passed"),
        (1, False, "1 error in 2.50s", "FAILED after 7 s: 1 error"),
        (0, False, "36 skipped in 2.01s", "not run: 36 skipped"),
        (5, False, "8 deselected in 2.01s", "not run: there are no such tests"),
        (2, True, "8 passed in 2.01s", "stopped after 7 s: 8 passed"),
        (-9, True, "..F.s.  [ 12%]", "stopped after 7 s: 1 failed, 4 passed"),
        (-9, True, "", "stopped after 7 s"),
        (0, False, "", "passed after 7 s"),
    ],
)
def test_verdicts(code, stopped, line, want):
    assert hardware.verdict(hardware.Outcome(code, 7.4, stopped, ["bringing up nodes...", line])) == want


def test_lines_of_the_check_become_rows():
    lines = [
        "  ok   cross_attention, triton on cuda: forward and gradients 1.0e-06 relative",
        "  ok   cross_attention, cuda on cuda: forward and gradients 2.0e-06 relative",
        "  FAIL cross_fusion, torch on cuda: forward and gradients 1.0e-01 relative",
        "  ok   cross_fusion, torch on cpu: forward and gradients 1.0e-06 relative",
        "  ok   layer_norm_statistics, native CUDA: 1.0e-07 relative",
    ]
    found = dict(hardware.checks(lines))
    assert found == {
        "cross_attention, backend triton": "passed: forward and gradients 1.0e-06 relative",
        "cross_attention, backend cuda": "passed: forward and gradients 2.0e-06 relative",
        "cross_fusion, backend torch": "FAILED: forward and gradients 1.0e-01 relative",
        "layer_norm_statistics (CUDA C++)": "passed: 1.0e-07 relative",
    }
    assert set(found) <= set(hardware.rows())


# The command


def test_without_a_gpu_nothing_is_run(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "write", None)
    for arguments in ([], ["--part", "measure"]):
        assert hardware.main(arguments) == 2
        assert capsys.readouterr().out.count("No GPU was found") == 1


def test_steps_that_pass_fail_and_cannot_run(report, monkeypatch, capsys):
    def step(row: str, code: str, *needs: str) -> hardware.Step:
        return hardware.Step(row, (sys.executable, "-c", code), 30, needs)

    steps = [step("one", "print('5 passed in 1.0s')"), step("two", "", "a_module_that_nobody_has")]
    monkeypatch.setattr(hardware, "_steps", lambda: steps)
    monkeypatch.setattr(hardware, "MEASURING", 10)
    assert hardware.run_steps(report)
    assert "| one | Some GPU 3000 |" in hardware.LEDGER.read_text()
    assert "| two | A | 2026-01-01 | aaa | passed |" in hardware.LEDGER.read_text()
    assert "two: not run: a_module_that_nobody_has not found" in capsys.readouterr().out
    steps[:] = [step("one", "print('the reason'); raise SystemExit(3)")]
    assert not hardware.run_steps(report)
    assert json.loads(report.results.path.read_text())["entries"]["one"]["output"] == ["the reason"]
    assert "FAILED" in hardware.LEDGER.read_text()
    monkeypatch.setattr(hardware, "MEASURING", 1000)
    assert hardware.run_steps(report)
    assert "one: not run: no time left" in capsys.readouterr().out


def test_measurements_are_written_as_they_come(report, monkeypatch, capsys):
    interval = {"median": 3e-5, "low": 2e-5, "high": 4e-5}
    ratio = {"median": 9.0, "low": 8.0, "high": 10.0}
    fusion = [
        of_backend(f"cross_fusion, {mode}, B=256, bf16", "cuda") for mode in ("forward", "forward + backward")
    ]
    entries = [
        {"name": "copy from device to device", "bytes_per_second": 4e12},
        {
            "name": fusion[0],
            "seconds": interval,
            "of_floor": 1.5,
            "error": 1e-3,
            "rivals": {"eager": {"seconds": interval, "ratio": ratio}, "SDPA": {"failed": "no memory"}},
        },
        {"name": fusion[1], "rivals": {}, "error": 0.5},
    ]
    lines = ["a warning", *map(json.dumps, entries)]

    def run(_: object, __: float, on_line) -> hardware.Outcome:
        for line in lines:
            on_line(line)
        assert fusion[1] in json.loads(report.results.path.read_text())["entries"]
        return hardware.Outcome(0, 1.0, False, lines)

    monkeypatch.setattr(hardware, "run", run)
    assert not hardware.run_measurements(report)
    text = hardware.LEDGER.read_text()
    assert "30.0 us (20.0-40.0), 1.50 times its bytes' time; times as long as ours: eager 9.0 |" in text
    assert "WRONG: relative error 5.0e-01" in text
    said = capsys.readouterr().out
    assert "cross_fusion, forward, B=256: 36 us, backend cuda: met" in said
    assert "cross_fusion, forward, B=256: 36 us, backend triton: not measured" in said
    assert "cross_fusion, forward + backward: at least 8 times eager, backend cuda: not measured" in said
    lines[:] = lines[:3]
    assert hardware.run_measurements(report)


# What is measured


def test_the_cases():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    rows = {of_backend(name, backend) for name in names for backend in OURS}
    assert {target.case for target in TARGETS} <= rows
    assert rows & set(hardware.rows()) == {r for r in rows if r.split(",")[-2] == " bf16"}
    whole = {("forward", False), ("forward + backward", False)}
    for operation in OPERATIONS:
        for batch in (1, 8, 64, 256):
            for dtype in ("bf16", "fp32"):
                modes = {
                    (case.mode, case.subject.kernel_alone)
                    for case in CASES
                    if (case.subject.operation, case.batch, case.dtype) == (operation, batch, dtype)
                }
                if dtype == "bf16":
                    assert modes == whole | {("forward", True), ("backward", True)}
                else:
                    assert modes == (whole if batch in (1, 256) else set())


def test_both_backends_have_the_same_rows():
    rows = hardware.rows()
    for of_cuda in rows:
        if of_cuda.endswith(", backend cuda"):
            assert of_cuda.replace("cuda", "triton") in rows
    steps = {step.row: step for step in hardware._steps()}
    for backend in OURS:
        assert f"{backend}-cuda" in steps[f"the contract of both operations, backend {backend}"].command
        assert f"small-{backend}" in steps[f"compute-sanitizer memcheck, backend {backend}"].command
        assert f"small-{backend}" in hardware.PARTS


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_the_sdpa_rival_is_the_definition(operation):
    tensors = leaves(operation.inputs(SMALL, torch.float64))
    grads = [torch.randn_like(x) for x in operation.run(tensors, SMALL, "reference")]
    want = gpu_cases.call(lambda x: operation.run(x, SMALL, "reference"), tensors, grads)
    got = gpu_cases.call(lambda x: gpu_cases.with_sdpa(operation, x, SMALL), tensors, grads)
    assert gpu_cases.error(got, want) < 1e-12


@pytest.fixture
def no_graphs(monkeypatch):
    """Calls for replays of graphs, each of a second."""
    monkeypatch.setattr(gpu_cases, "ROUNDS", 2)
    monkeypatch.setattr(gpu_timing, "capture", lambda function: function)
    monkeypatch.setattr(gpu_timing, "seconds", lambda replay, prepare: float(replay() is not None))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
def test_a_measurement(operation, mode, monkeypatch, no_graphs):
    """With the definition for one backend; the other one cannot run."""
    monkeypatch.setattr(gpu_cases, "OURS", ("reference", "cuda"))
    case = small(operation, mode)
    results = gpu_cases.measure(case, 1e9, lambda: None, "cpu")
    assert list(results) == ["reference", "cuda"]
    assert results["cuda"]["failed"].startswith("RuntimeError: ")
    assert hardware.words(results["cuda"]).startswith("FAILED: RuntimeError")
    result = results["reference"]
    tensors, grads = gpu_cases.draw(case, "cpu")
    inputs, outputs = (
        sum(x.nbytes for x in y) for y in (tensors, operation.run(tensors, case.size, "reference"))
    )
    once = inputs + outputs if mode == "forward" else 3 * inputs + 2 * outputs
    assert result["bytes"] == once
    assert result["of_floor"] == pytest.approx(1e9 / once)
    assert result["error"] < gpu_cases.BOUNDS["fp32"]
    assert set(result["rivals"]) == {"eager", "torch", "SDPA"}
    assert all(rival["ratio"]["median"] == 1 for rival in result["rivals"].values())
    assert len(grads) == (0 if mode == "forward" else len(operation.outputs))
    json.dumps(results)


def test_two_backends_are_rivals(monkeypatch, no_graphs):
    monkeypatch.setattr(gpu_cases, "OURS", ("reference", "cpu"))
    if why := BACKENDS["cpu"].missing():
        pytest.skip(why)
    results = gpu_cases.measure(small(OPERATIONS[0]), 1e9, lambda: None, "cpu")
    assert list(results["reference"]["rivals"]) == ["cpu", "eager", "torch", "SDPA"]
    assert list(results["cpu"]["rivals"]) == ["reference", "eager", "torch", "SDPA"]


def test_a_rival_that_fails_loses_nothing(monkeypatch, no_graphs):
    monkeypatch.setattr(gpu_cases, "OURS", ("reference",))

    def capture(function):
        if function.args[0].func is gpu_cases.with_sdpa:
            raise MemoryError("no room")
        return function

    found = gpu_cases.functions(small(OPERATIONS[0]))
    assert found["SDPA"].func is gpu_cases.with_sdpa
    monkeypatch.setattr(gpu_timing, "capture", lambda f: capture(f) if hasattr(f.args[0], "func") else f)
    (result,) = gpu_cases.measure(small(OPERATIONS[0]), 1e9, lambda: None, "cpu").values()
    assert result["rivals"]["SDPA"] == {"failed": "MemoryError: no room"}
    assert "eager 1.0" in hardware.words(result)


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu_cases, "OURS", ("reference",))
    case = small(OPERATIONS[0])
    monkeypatch.setitem(gpu_cases.BOUNDS, case.dtype, 1e-30)
    result = gpu_cases.measure(case, 1e9, lambda: None, "cpu")["reference"]
    assert "seconds" not in result
    assert hardware.words(result).startswith("WRONG")


@pytest.mark.parametrize("backward", [False, True])
def test_the_attention_kernel_is_found_in_a_trace(backward):
    names = ("attend", "attend_backward")
    cuda = [
        f"void crossvit::(anonymous namespace)::{n}_kernel<(crossvit::Product)0, true>(Call)" for n in names
    ]
    others = ("absorb", "memset", "void add_attention_sums_kernel(Call)")
    pattern = gpu_cases.attention_kernel(backward)
    for found in (names, cuda):
        events = [(name, 10.0 * i) for i, name in enumerate((*found, *others), 1)]
        assert gpu_timing.seconds_of(events, pattern, 1) == pytest.approx([2e-5 if backward else 1e-5])
    with pytest.raises(RuntimeError, match=r"0 kernels .* instead of 1"):
        gpu_timing.seconds_of([("absorb", 1.0)], pattern, 1)


def test_the_bytes_of_the_attention_kernel():
    """Per image: the patches once, what a fusion copies, and in backward what it reads and writes besides."""
    attention, fusion = OPERATIONS
    tensors = [torch.empty(0, dtype=torch.bfloat16)]
    for operation, mode, elements in (
        (attention, "forward", 6 * 24),
        (attention, "backward", 2 * 6 * 24),
        (fusion, "forward", 2 * (6 * 24 + 5 * 16)),
        (fusion, "backward", 3 * (6 * 24 + 5 * 16)),
    ):
        case = small(operation, mode, "bf16", alone=True)
        assert gpu_cases.floor_bytes(case, tensors) == 3 * 2 * elements


def test_nan_is_an_error():
    assert not gpu_cases.error([torch.tensor([float("nan"), 1.0])], [torch.ones(2)]) < 1e9
    assert (
        not gpu_cases.error([torch.ones(2), torch.tensor([float("nan")])], [torch.ones(2), torch.ones(1)])
        < 1e9
    )


def test_rivals_take_turns():
    seen = []
    rivals = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    samples = gpu_timing.in_turn(rivals, 4, lambda call: float(len(seen)) if call() is None else 0.0)
    assert "".join(seen[-12:]) == "abccbaabccba"
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abc", 4)


def test_another_size_of_a_case_differs_in_the_batch_alone():
    case = CASES[0]
    assert replace(case.size, batch=1) == case.subject.size
    assert case.size.batch == 256


# Which backend comes first


def results_of(seconds: dict[tuple[str, int, str], float]) -> dict:
    """A results file of a GPU where (mode, batch, backend) took so long, at every size and in bf16 alone."""
    entries = {
        of_backend(case.name, backend): {"seconds": {"median": seconds[case.mode, case.batch, backend]}}
        for case in CASES
        for backend in OURS
        if case.dtype == "bf16" and (case.mode, case.batch, backend) in seconds
    }
    return {"runs": {"one": {"capability": "9.0"}}, "entries": entries}


def test_what_was_faster_comes_first():
    forward = {(1, "cuda"): 1.0, (1, "triton"): 2.0, (8, "cuda"): 1.0, (8, "triton"): 2.0}
    forward |= {(64, "cuda"): 3.0, (64, "triton"): 2.0, (256, "cuda"): 4.0, (256, "triton"): 3.0}
    seconds = {("forward", *k): v for k, v in forward.items()}
    # Backward triton is faster at every batch, but together with forward it is not.
    seconds |= {("forward + backward", *k): v + (5.5 if k[1] == "cuda" else 5.0) for k, v in forward.items()}
    del seconds["forward", 8, "cuda"]
    found = preference.preferences(results_of(seconds))
    cuda, triton = ("cuda", "triton"), ("triton", "cuda")
    for operation in ("cross_attention", "cross_fusion"):
        assert found.pop(("sm_90", operation, False, torch.bfloat16)) == ((1, cuda), (256, triton))
        assert found.pop(("sm_90", operation, True, torch.bfloat16)) == ((256, triton),)
    assert found == {}
    assert preference.preferences(results_of({})) == {}


def test_the_order_is_written_into_the_package(tmp_path, monkeypatch, capsys):
    table, results = tmp_path / "gpu_preference.py", tmp_path / "gpu.json"
    table.write_text(preference.TABLE.read_text())
    monkeypatch.setattr(preference, "TABLE", table)
    results.write_text(json.dumps(results_of({})))
    assert preference.main([str(results)]) == 2
    assert table.read_text() == gpu_preference_source()
    seconds = {(m, 64, b): 1.0 + (b == "cuda") for m in ("forward", "forward + backward") for b in OURS}
    results.write_text(json.dumps(results_of(seconds)))
    assert preference.main([str(results)]) == 0
    assert "cross_fusion forward bfloat16 ((64, ('triton', 'cuda')),)" in capsys.readouterr().out
    scope: dict = {"__package__": "crossvit_kernels.cross_attention", "__name__": "measured"}
    exec(compile(table.read_text(), table, "exec"), scope)
    assert scope["preferred"]("sm_90", "cross_fusion", False, 1, torch.bfloat16) == ("triton", "cuda")
    assert scope["preferred"]("sm_80", "cross_fusion", False, 1, torch.bfloat16) == ("cuda", "triton")
    tune_triton.write({}, table)
    assert table.read_text() == gpu_preference_source()


def gpu_preference_source() -> str:
    return Path(preference.gpu_preference.__file__).read_text()
