"""The report of the benchmarks, and its charts."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgba

from benchmarks import charts, report, results
from benchmarks.results import Benchmark, load
from tests.benchmark_results import benchmark, failing, file_text, row, sections, table, tables

RACES = [
    benchmark("test_a[slow]", "first", {"against eager": row(0.8, 0.7, 0.9), "against timm": row(2, 1.5, 3)}),
    benchmark("test_a[even]", "first", {"against eager": row(0.9, 0.8, 1.0), "against timm": row(1, 1, 3)}),
    benchmark(
        "test_b[x[1]-y_z]",
        "second",
        {
            "against eager": row(0.25, 0.2, 0.3, ours=8.0),
            "against bytes once": row(0.1, 0.1, 0.1),
            "against not frozen fp32": row(0.5, 0.5, 0.5),
            "against not frozen bf16": row(0.5, 0.5, 0.5),
        },
    ),
]


def test_what_is_slower_comes_first():
    """Of five races: 2 is won; 0.8 and 0.25 are lost; up to 1, and from 1 on, is no difference."""
    text = report.markdown("a-machine", RACES)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    slower = "## Where this package is slower"
    assert headings == ["# Benchmarks on a-machine", slower, "## First", "## Second"]
    assert "Of 5 races this package wins 1, loses 2, and 2 show no difference." in text
    before = text[: text.index(slower)]
    assert "|" not in before
    assert before.count("- all.json: a machine.") == 1
    assert tables(text)[0] == [
        ["benchmark", "rival", "ours", "rival's", "ratio"],
        ["second: x[1], y z", "eager", "8 s", "2 s", "0.25 (0.20-0.30)"],
        ["first: slow", "eager", "1 ms", "800 µs", "0.80 (0.70-0.90)"],
    ]


def test_other_fusions_are_no_races():
    """They make other models; they stand in the tables of their own sections alone."""
    slower, faster = row(0.5, 0.4, 0.6), row(2, 1.5, 3)
    info = {"against all-attention": slower, "against timm": faster}
    rows = [benchmark("test_a[x]", "model", info), fusion(400, {"cross": (1e-3, 1)})]
    rows[1].info.update({"against class": slower, "not run all": "no room"})
    text = report.markdown("a-machine", rows)
    assert "Of 1 races this package wins 1, loses 0, and 0 show no difference." in text
    assert "|" not in sections(text)["Where this package is slower"]
    of_models, of_fusions = (cells for cells in tables(text) if cells[0][0] == "time")
    assert of_models[1] == ["x", "1 ms", "0.50 (0.40-0.60)", "2.00 (1.50-3.00)"]
    assert of_fusions == [
        ["time", "this package", "class", "all"],
        ["fusion, forward, 400", "1 ms", "0.50 (0.40-0.60)", "no room"],
    ]


def test_the_order_of_the_sections():
    """The usual ones first, whatever was run first; others as they come."""
    groups = ["new", "cross_attention", "another", "model"]
    text = report.markdown("a-machine", [benchmark("test_a", group, {}) for group in groups])
    titles = [report.TITLES["model"], report.TITLES["cross_attention"], "New", "Another"]
    assert list(sections(text))[2:] == titles


def test_the_table_of_races():
    text = report.markdown("a-machine", RACES)
    first, second = (cells for cells in tables(text) if cells[0][0] == "time")
    assert first == [
        ["time", "this package", "eager", "timm"],
        ["slow", "1 ms", "0.80 (0.70-0.90)", "2.00 (1.50-3.00)"],
        ["even", "1 ms", "0.90 (0.80-1.00)", "1.00 (1.00-3.00)"],
    ]
    own = ["0.50 (0.50-0.50)"] * 2
    assert second == [
        ["time", "this package", "eager", "not frozen fp32", "not frozen bf16"],
        ["x[1], y z", "8 s", "0.25 (0.20-0.30)", *own],
    ]
    limits = table(text, "share of the least time that hardware allows")
    assert limits[1:] == [["x[1], y z", "1 ms", "bytes, once", "10%"]]


def test_a_report_without_losses_and_one_of_nothing():
    text = report.markdown("a-machine", [benchmark("test_a", "first", {"against timm": row(2, 1.5, 3)})])
    assert "Of 1 races this package wins 1, loses 0, and 0 show no difference." in text
    assert [cells[0][0] for cells in tables(text)] == ["time"]
    assert "Of 0 races this package wins 0, loses 0" in report.markdown("a-machine", [])


def test_what_was_not_run_is_said():
    info = {"against timm": row(2, 1.5, 3), "not run eager": "no room", "not run bytes once": "no room"}
    text = report.markdown(
        "a-machine",
        [
            benchmark("test_a[x]", "first", info),
            benchmark("test_a[y]", "first", {"not run ours": "too large"}),
        ],
    )
    assert table(text, "time") == [
        ["time", "this package", "timm", "eager"],
        ["x", "1 ms", "2.00 (1.50-3.00)", "no room"],
        ["y", "too large", "", ""],
    ]


def test_that_ours_was_not_run_is_said_without_rivals():
    text = report.markdown("a-machine", [benchmark("test_a[x]", "first", {"not run ours": "too large"})])
    assert table(text, "time")[1:] == [["x", "too large"]]


def test_memory_and_energy():
    info = {
        "against timm": row(2, 1.5, 3),
        "against eager": row(2, 1.5, 3),
        "not run compiled": "no room",
        "against bytes once": row(0.5, 0.5, 0.5),
        "peak_bytes": {"ours": 0, "timm": 1_500_000, "eager": 999, "bytes once": 123},
        "saved_bytes": {"ours": 2_000, "timm": 3_210_000_000, "eager": 1},
        "joules": {"ours": 0.25, "timm": 12.0, "eager": None, "bytes once": 1.0},
    }
    others = benchmark("test_a[y]", "first", {"against timm": row(2, 1.5, 3)})
    text = report.markdown("a-machine", [benchmark("test_a[x]", "first", info), others])
    names = ["this package", "timm", "eager", "compiled"]
    assert table(text, "peak memory") == [["peak memory", *names], ["x", "0 B", "1.5 MB", "999 B", ""]]
    assert table(text, "kept for backward")[1:] == [["x", "2 kB", "3.21 GB", "1 B", ""]]
    assert table(text, "energy")[1:] == [["x", "0.25 J", "12 J", "", ""]]


def test_limits_latency_and_what_has_no_rival():
    """Of 0.5 and 0.2 ms, the larger binds: half of our 1 ms. 256 images in 12.8 ms are 20,000 a second."""
    limits = {"products": 2e-4, "bytes, once": 5e-4}
    latency = {
        "ours": {"p50": 0.0128, "p90": 0.02, "p99": 1.5},
        "timm": {"p50": 2.0, "p90": 3.0, "p99": 4.0},
    }
    kernel = {"against PyTorch": row(2, 1.5, 3), "seconds": {"ours": 1e-3}, "limits": limits}
    model = {"against timm": row(2, 1.5, 3), "latency": latency, "images": 256}
    text = report.markdown(
        "a-machine",
        [
            benchmark("test_a[x]", "first", kernel),
            benchmark("test_b[y]", "second", model),
            benchmark("test_c", "third", {"measured": {"pip install": 61.25}}),
            benchmark("test_d[z]", "fourth", {"latency": {"ours": latency["timm"]}}),
        ],
    )
    assert table(text, "share of the least time that hardware allows")[1:] == [
        ["x", "1 ms", "bytes, once", "50%"]
    ]
    assert table(text, "alone") == [["alone", "time"], ["pip install", "61.2 s"]]
    (_, ours, timm), (_, without) = (c for c in tables(text) if c[0][0] == "latency of single calls")
    assert ours[:-1] == ["y", "this package", "12.8 ms", "20 ms", "1.5 s"]
    assert ours[-1] == "20,000"
    assert timm == ["y", "timm", "2 s", "3 s", "4 s", "128"]
    assert without[-1] == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0 µs"),
        (1.234e-5, "12.3 µs"),
        (9.99e-4, "999 µs"),
        (9.999e-4, "1 ms"),
        (1e-3, "1 ms"),
        (0.0566, "56.6 ms"),
        (0.9996, "1 s"),
        (1.0, "1 s"),
        (75.126, "75.1 s"),
        (3600.0, "3,600 s"),
    ],
)
def test_durations(seconds, words):
    assert report._duration(seconds) == words


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (12_340, "12.3 kB"),
        (999_900, "1 MB"),
        (1_000_000, "1 MB"),
        (999_700_000, "1 GB"),
        (16_700_000_000, "16.7 GB"),
        (1_536_000_000_000, "1,536 GB"),
    ],
)
def test_sizes(size, words):
    assert report._size(size) == words


def fusion(
    tokens: int, curves: Mapping[str, tuple[float, int]], mode: str = "forward", memory: int = 16_000_000_000
) -> Benchmark:
    """Seconds and bytes of fusions at a number of tokens."""
    info = {
        "what": "fusion",
        "mode": mode,
        "tokens": tokens,
        "seconds": {name: seconds for name, (seconds, _) in curves.items()},
        "bytes": {name: size for name, (_, size) in curves.items()},
    }
    return benchmark(f"test_schemes[fusion-{mode}-{tokens}]", report.SCHEMES, info, memory)


GROWTH = [
    # Those of 100 tokens are on no line, and the sizes are in no order.
    fusion(1600, {"cross": (16e-3, 4_000_000)}),
    fusion(100, {"cross": (1.0, 9_000_000), "all": (1.0, 9_000_000)}),
    fusion(400, {"cross": (1e-3, 1_000_000), "all": (1e-3, 1_000_000)}),
    fusion(800, {"cross": (4e-3, 2_000_000), "all": (8e-3, 4_000_000)}),
    fusion(400, {"cross": (1e-3, 1_000_000)}, "training"),
]


def test_growth_by_hand():
    """Time n^2 and n^3, memory n and n^2: 16 GB are 16,000 times the memory at 400 tokens.

    All-attention did not run with 1600 tokens.
    """
    text = report.markdown("a-machine", GROWTH)
    assert "fusion, forward; powers of the number of tokens, fitted from a fifth of the most on:" in text
    assert "fusion, training" not in text, "one point has no power"
    header, cross, everything = table(text, "fusion")
    assert header[-1] == "tokens that 16 GB hold (extrapolated)"
    assert cross == ["cross", "2.00", "1.00", "1,600: 16 ms, 4 MB", "6,400,000"]
    assert everything == ["all", "3.00", "2.00", "800: 8 ms, 4 MB", f"{400 * math.sqrt(16_000):,.0f}"]


@pytest.mark.filterwarnings("ignore:Data has no positive values")
@pytest.mark.parametrize(
    ("sizes", "power", "fits"),
    [
        ((0, 0), "", ""),
        ((0, 1000), "", ""),
        ((1000, 0), "", ""),
        ((8000, 8000), "0.00", "1,600,000,000"),
        ((10**9, 10**9 + 1), "0.00", "12,800"),
    ],
)
def test_memory_without_a_power(sizes, power, fits):
    """No bytes, or as many for 800 tokens as for 400; 16 GB are 2,000,000 times 8 kB, and 16 times 1 GB."""
    rows = [fusion(n, {"cross": (n * 1e-6, size)}) for n, size in zip((400, 800), sizes, strict=True)]
    _, cells = table(report.markdown("a-machine", rows), "fusion")
    assert cells[:3] == ["cross", "1.00", power]
    assert cells[4] == fits
    figure = charts.growth_chart(rows)
    figure.savefig(io.BytesIO(), format="png", dpi=20)


def test_growth_where_the_memory_of_the_machine_is_not_known():
    rows = [fusion(n, {"cross": (n * 1e-6, n)}, memory=0) for n in (400, 800)]
    header, cells = table(report.markdown("a-machine", rows), "fusion")
    assert (header[4], cells[4]) == ("tokens that fit", "")


def cpu_run(batch: int, threads: int = 1) -> dict[str, Any]:
    """A tenth of a second an image of ours; timm takes twice as long; the others do not run."""
    info: dict[str, Any] = {"model": "crossvit_18_240", "batch": batch, "threads": threads}
    info["peak_gflops"] = {"fp32": 175.4}
    info["rivals"] = {
        "frozen fp32": {"least": 0.1 * batch, "share_of_peak": 0.87, "resident_bytes": 5_000_000},
        "frozen bf16": {"least": 0.05 * batch, "share_of_peak": None},
        "not frozen fp32": {"least": 0.1 * batch, "share_of_peak": 0.87},
        "timm fp32": {"least": 0.2 * batch, "latency": {"p50": 0.2, "p90": 0.25, "p99": 1.0}},
        "OpenVINO fp32": {"not_run": "its logits are wrong by 2.0e-01"},
    }
    info["against timm fp32"] = row(1.95, 1.9, 2.1)
    info["against not frozen fp32"] = row(0.5, 0.5, 0.5)
    return info


def test_the_tables_of_rivals_on_a_cpu():
    rows = [benchmark(f"test_cpu[{batch}]", "cpu", cpu_run(batch)) for batch in (8, 1)]
    text = report.markdown("a-machine", rows)
    assert "Of 2 races this package wins 2, loses 0" in text
    assert "crossvit_18_240, threads: 1; least milliseconds an image" in text
    times, latency, memory = tables(text)
    assert times[0] == ["", "fp32, batch 1", "fp32, batch 8", "bf16, batch 1", "bf16, batch 8"]
    cells = {line[0]: line[1:] for line in times[1:]}
    assert cells["frozen"] == ["100.0", "100.0", "50.0", "50.0"]
    assert cells["not frozen"] == ["100.0 (0.50)", "100.0 (0.50)", "", ""]
    assert cells["timm"] == ["200.0 (1.95)", "200.0 (1.95)", "", ""]
    assert "its logits are wrong by 2.0e-01" in text, "of a rival that did not run, why"
    assert cells["peak, GFLOP/s"] == ["175", "175", "", ""], "what was not measured is not 0"
    assert cells["frozen, share of it"] == ["87%", "87%", "", ""]
    assert ["timm", *["200 / 250 / 1,000"] * 2, "", ""] in latency
    assert ["frozen", *["5 MB"] * 2, "", ""] in memory
    assert sum(any(line[1:]) for line in (*latency[1:], *memory[1:])) == 2


def test_pictures_stand_in_their_groups():
    assert set(charts.CHARTS) == set(charts.GROUP_OF)
    rows = [*GROWTH, benchmark("test_a", "cross_attention", {"against eager": row(2, 1, 3)})]
    text = report.markdown("a-machine", rows, ["operation.png", "fusions.png"])
    found = sections(text)
    assert "![fusions.png](fusions.png)" in found[report.TITLES[report.SCHEMES]]
    assert "![operation.png](operation.png)" in found[report.TITLES["cross_attention"]]
    assert text.count("![") == 2
    assert "![" not in report.markdown("a-machine", rows)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Picture:
    """In the place of a figure."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def savefig(self, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half of a picture")
        if self.error is not None:
            raise self.error
        Path(path).write_bytes(b"a picture")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Of a machine, with a result, an earlier report and an earlier chart; drawing is no work."""
    monkeypatch.setattr(charts, "CHARTS", {"operation.png": lambda rows: Picture(), "fusions.png": no_chart})
    path = tmp_path / "a-machine"
    path.mkdir()
    (path / "all.json").write_text(file_text({"test_a[x]": {"against eager": row(2, 1.5, 3)}}))
    (path / "report.md").write_text("earlier")
    (path / "operation.png").write_text("earlier")
    return path


def no_chart(rows: Sequence[Benchmark]) -> None:
    assert rows


def test_the_report_and_its_charts_are_written(folder):
    report.redraw(folder)
    found = contents(folder)
    assert set(found) == {"all.json", "report.md", "operation.png"}
    assert found["operation.png"] == b"a picture"
    text = found["report.md"].decode()
    assert text == report.markdown("a-machine", load(folder), ["operation.png"])
    assert text.startswith("# Benchmarks on a-machine\n")
    assert len({(folder / name).stat().st_mode for name in found}) == 1, "as readable as the results"


@pytest.mark.parametrize("error", [RuntimeError("x"), OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["drawing", "saving", "writing words", "writing the report", "renaming"])
def test_a_report_that_fails_leaves_the_earlier_one(where, error, folder, monkeypatch):
    before = contents(folder)
    with monkeypatch.context() as patch:
        if where == "drawing":
            patch.setitem(charts.CHARTS, "fusions.png", lambda rows: failing(error)())
        elif where == "saving":
            patch.setitem(charts.CHARTS, "operation.png", lambda rows: Picture(error))
        elif where == "writing words":
            patch.setattr(report, "markdown", lambda *arguments: failing(error)())
        elif where == "renaming":
            patch.setattr(report.os, "replace", lambda *paths: failing(error)())
        else:
            write_text = Path.write_text

            def half(path: Path, text: str, *arguments: Any, **options: Any) -> None:
                write_text(path, text[:10])
                raise error

            patch.setattr(Path, "write_text", half)
        with pytest.raises(type(error)):
            report.redraw(folder)
    assert contents(folder) == before


def test_a_folder_without_results_is_left_alone(tmp_path):
    with pytest.raises(ValueError):
        report.redraw(tmp_path)
    assert not contents(tmp_path)


def test_the_report_command(folder, tmp_path, capsys, monkeypatch):
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.md'}\n"
    (tmp_path / "empty").mkdir()
    assert report.main([str(tmp_path / "empty")]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("report: ")
    assert str(tmp_path / "empty") in err


def test_the_report_command_draws_all_machines(folder, tmp_path, monkeypatch):
    """Also one on which only some benchmarks were run; the hardware command has other results beside."""
    for name in ("another", "hardware", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "another" / "cpu.json").write_text((folder / "all.json").read_text())
    (tmp_path / "hardware" / "a-gpu.json").write_text('{"runs": {}, "entries": {}}')
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.main([]) == 0
    assert (folder / "report.md").read_text().startswith("# Benchmarks on a-machine")
    assert (tmp_path / "another" / "report.md").read_text().startswith("# Benchmarks on another")
    assert not (tmp_path / "empty" / "report.md").exists()


REAL = sorted({path.parent for path in results.RESULTS.glob("*/*.json") if path.parent.name != "hardware"})


def test_there_are_results_to_read():
    assert REAL


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_every_race_of_the_real_results_is_in_its_report(path):
    benchmarks = load(path)
    text = report.markdown(path.name, benchmarks)
    assert not re.search(r"\b(nan|inf)\b", text)
    races = [(b, rival, found) for b in benchmarks for rival, found in b.races()]
    assert races
    for b, rival, found in races:
        section = sections(text)[report.TITLES.get(b.group, b.group[:1].upper() + b.group[1:])]
        if "rivals" in b.info:
            name, _, precision = rival.rpartition(" ")
            title = f"{b.info['model']}, threads: {b.info['threads']};"
            cells = tables(section.partition(title)[2])[0]
            (line,) = (line for line in cells if line[0] == name)
            cell = line[cells[0].index(f"{precision}, batch {b.info['batch']}")]
            assert cell.endswith(f" ({found['ratio']:.2f})")
        else:
            cells = table(section, "time")
            at = cells[0].index(rival)
            interval = f"{found['ratio']:.2f} ({found['low']:.2f}-{found['high']:.2f})"
            assert interval in [line[at] for line in cells if line[0] == b.label]
    compared = [f for b, rival, f in races if b.group != report.SCHEMES and rival != "all-attention"]
    assert f"Of {len(compared)} races " in text
    slower = sorted(found["ratio"] for found in compared if found["high"] < 1)
    listed = [
        line[4] for cells in tables(sections(text)["Where this package is slower"]) for line in cells[1:]
    ]
    assert [ratio.split()[0] for ratio in listed] == [f"{ratio:.2f}" for ratio in slower]


def test_there_are_no_charts_of_nothing():
    others = [
        benchmark("test_a[C224-H7-P400]", "cross_attention", {"against bytes once": row(1, 1, 1)}),
        benchmark("test_a[B64-C224-H7-P400]", "cross_attention", {"against eager": row(1, 1, 1)}),
        benchmark("test_a[C448-H7-P196]", "cross_attention", {"against eager": row(1, 1, 1)}),
        benchmark("test_b[C224-H7-P400]", "another", {"against eager": row(1, 1, 1)}),
        benchmark("test_cpu", "cpu", {**cpu_run(1), "model": "crossvit_9_240"}),
        benchmark("test_schemes", report.SCHEMES, {"not run ours": "too large"}),
    ]
    encoder = fusion(400, {"cross": (1e-3, 1)})
    encoder.info["what"] = "encoder"
    for draw in charts.CHARTS.values():
        assert draw([]) is None
        assert draw([*others, encoder]) is None


def test_the_chart_of_growth():
    figure = charts.growth_chart(GROWTH)
    time_axis, memory_axis, training_axis, _ = figure.axes
    assert [axis.get_xscale() for axis in figure.axes] == ["log"] * 4
    assert [axis.get_yscale() for axis in figure.axes] == ["log"] * 4
    assert (time_axis.get_ylabel(), memory_axis.get_ylabel()) == ("milliseconds", "peak memory, MB")
    assert time_axis.get_title().endswith("forward")
    assert training_axis.get_title().endswith("training")
    cross, everything = time_axis.lines
    assert list(cross.get_xdata()) == [100, 400, 800, 1600]
    assert list(time_axis.get_xticks()) == [100, 400, 800, 1600]
    assert list(cross.get_ydata()) == pytest.approx([1000, 1, 4, 16])
    assert (cross.get_label(), everything.get_label()) == ("cross, power 2.00", "all, power 3.00")
    assert cross.get_color() == charts.OURS != everything.get_color()
    cross, everything = memory_axis.lines
    assert list(cross.get_ydata()) == pytest.approx([9, 1, 2, 4])
    assert (cross.get_label(), everything.get_label()) == ("cross, power 1.00", "all, power 2.00")
    (one,) = training_axis.lines
    assert (one.get_label(), list(one.get_xdata())) == ("cross", [400])


def test_the_chart_of_the_operation():
    """Two rivals, the second one in the first row alone; other sizes, limits and own ways are left out."""
    info = {"against eager": row(4, 3, 5), "against timm": row(0.5, 0.4, 0.6)}
    rows = [
        benchmark("test_a[B1-C224-H7-P400-x]", "cross_attention", info),
        benchmark("test_a[B64-C224-H7-P400]", "cross_attention", info),
        benchmark("test_a[B1-C448-H7-P196]", "cross_attention", info),
        benchmark(
            "test_a[B8-C224-H7-P400_y]",
            "cross_attention",
            {"against eager": row(2, 1, 3), "against bytes once": row(9, 9, 9)},
        ),
    ]
    (axis,) = charts.operation_chart(rows).axes
    bars = {bar.get_label(): [patch.get_width() for patch in bar] for bar in axis.containers}
    assert bars == {"eager": [4, 2], "timm": [0.5]}
    eager, timm = axis.containers
    centres = [[patch.get_y() + patch.get_height() / 2 for patch in bar] for bar in (eager, timm)]
    *intervals, ours = axis.lines
    assert [list(line.get_xdata()) for line in intervals] == [[3, 5], [1, 3], [0.4, 0.6]]
    assert [line.get_ydata()[0] for line in intervals] == pytest.approx([*centres[0], *centres[1]])
    assert (list(ours.get_xdata()), ours.get_label()) == ([1, 1], "this package")
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "B1, C224, H7, P400, x",
        "B8, C224, H7, P400 y",
    ]
    assert axis.get_yticks()[0] == pytest.approx((centres[0][0] + centres[1][0]) / 2)
    assert axis.yaxis_inverted()
    assert axis.get_xscale() == "log"


def test_the_chart_of_models():
    """Ten images a second of ours, half as many of timm's, whatever the batch; panels by batch."""
    figure = charts.models_chart([benchmark("test_cpu", "cpu", cpu_run(batch)) for batch in (8, 1)])
    assert [axis.get_title() for axis in figure.axes] == [
        "fp32, batch 1, 1 thread",
        "fp32, batch 8, 1 thread",
        "bf16, batch 1, 1 thread",
        "bf16, batch 8, 1 thread",
    ]
    for axis, names, rates in zip(
        figure.axes,
        [["frozen", "not frozen", "timm"]] * 2 + [["frozen"]] * 2,
        [[10, 10, 5]] * 2 + [[20]] * 2,
        strict=True,
    ):
        assert [label.get_text() for label in axis.get_yticklabels()] == names
        assert [patch.get_width() for patch in axis.patches] == pytest.approx(rates)
        assert [text.get_text().strip() for text in axis.texts] == [str(rate) for rate in rates]
        assert axis.get_xlim()[1] > max(rates)
    own = [patch.get_facecolor() == to_rgba(charts.OURS) for patch in figure.axes[0].patches]
    assert own == [True, True, False]


def test_many_images_a_second_are_written_out():
    info = cpu_run(1, threads=64)
    info["rivals"]["frozen fp32"]["least"] = 1 / 1234
    axis = charts.models_chart([benchmark("test_cpu", "cpu", info)]).axes[0]
    assert axis.get_title() == "fp32, batch 1, 64 threads"
    assert float(axis.texts[0].get_text().replace(",", "")) == pytest.approx(1234, abs=5)
    assert "e" not in axis.texts[0].get_text()


def test_the_charts_are_drawn(tmp_path):
    """All three from one folder, as PNG files."""
    names = ("test_cross_attention[B1-C224-H7-P400]", "test_cpu[1]", "test_schemes[1]", "test_schemes[2]")
    infos = ({"against eager": row(2, 1, 3)}, cpu_run(1), GROWTH[2].info, GROWTH[3].info)
    whole = json.loads(file_text(dict(zip(names, infos, strict=True))))
    for found, group in zip(whole["benchmarks"][1:], ("cpu", report.SCHEMES, report.SCHEMES), strict=True):
        found["group"] = group
    (tmp_path / "all.json").write_text(json.dumps(whole))
    report.redraw(tmp_path)
    found = contents(tmp_path)
    assert set(found) == {"all.json", "report.md", *charts.CHARTS}
    for name in charts.CHARTS:
        assert found[name].startswith(b"\x89PNG")
        assert f"![{name}]({name})".encode() in found["report.md"]
