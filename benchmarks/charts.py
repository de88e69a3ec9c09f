"""Charts of the report. Each takes all benchmarks, and gives None where what it shows was not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.results import Benchmark, by_group, digits, exponent, growth, largest

OURS, OTHERS = "#0b6e4f", ("#8d99ae", "#d17a22", "#6a4c93", "#1982c4", "#b5838d", "#4d4d4d", "#c9a227")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)


def growth_chart(benchmarks: Sequence[Benchmark]) -> Any:
    """Time and memory of one fusion over the number of tokens."""
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    found = growth(benchmarks)
    modes = [mode for what, mode in found if what == "fusion"]
    if not modes:
        return None
    figure = _figure(10, 3.9 * len(modes))
    for axes, mode in zip(figure.subplots(len(modes), 2, squeeze=False), modes, strict=True):
        for axis, which, title in zip(axes, (0, 1), ("milliseconds", "peak memory, MB"), strict=True):
            for i, (name, points) in enumerate(found["fusion", mode].items()):
                values = {n: point[which] * (1e3 if which == 0 else 1e-6) for n, point in points.items()}
                larger = {n: v for n, v in largest(values).items() if v > 0}
                power = f", power {exponent(larger):.2f}" if len(larger) > 1 else ""
                colour = OURS if name == "cross" else OTHERS[i % len(OTHERS)]
                axis.loglog(
                    *zip(*values.items(), strict=True), "o-", color=colour, label=f"{name}{power}", ms=4
                )
            axis.set_xticks(sorted({n for points in found["fusion", mode].values() for n in points}))
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_xlabel("tokens of both branches")
            axis.set_ylabel(title)
            axis.set_title(f"one fusion of CrossViT-S, {mode}", fontsize=10)
            axis.legend(fontsize=8, frameon=False)
            _plain(axis)
    return figure


def operation_chart(benchmarks: Sequence[Benchmark]) -> Any:
    """How many times longer each rival takes for the fusion operation."""
    rows = [b for b in benchmarks if b.group == "cross_attention" and any(b.races())]
    rows = [b for b in rows if "C224-H7-P400" in b.name and "B64" not in b.name]
    return (
        _ratios(rows, "cross-attention, S of crossvit_18: the rival's time over this package's")
        if rows
        else None
    )


def _ratios(rows: Sequence[Benchmark], title: str) -> Any:
    from matplotlib.ticker import NullFormatter

    rivals = list(dict.fromkeys(rival for b in rows for rival, _ in b.races(own=True)))
    figure = _figure(10, 0.75 + 0.16 * len(rows) * (len(rivals) + 1))
    axis = figure.subplots()
    height = 0.85 / len(rivals)
    for i, rival in enumerate(rivals):
        races = [(at, dict(b.races(own=True))) for at, b in enumerate(rows)]
        found = [(at, of[rival]) for at, of in races if rival in of]
        ys = [at + i * height for at, _ in found]
        ratios = [row["ratio"] for _, row in found]
        axis.barh(ys, ratios, height=0.9 * height, color=OTHERS[i % len(OTHERS)], label=rival)
        for y, (_, row) in zip(ys, found, strict=True):
            axis.plot([row["low"], row["high"]], [y, y], color="black", linewidth=1)
    axis.axvline(1, color=OURS, linewidth=2, label="this package")
    axis.set_xscale("log")
    axis.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_yticks(
        [at + height * (len(rivals) - 1) / 2 for at in range(len(rows))], [b.label for b in rows], fontsize=8
    )
    axis.invert_yaxis()
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _plain(axis)
    return figure


def models_chart(benchmarks: Sequence[Benchmark]) -> Any:
    """Images a second of whole models, each rival in a process of its own."""
    runs = [b.info for b in by_group(benchmarks).get("cpu", []) if b.info.get("model") == "crossvit_18_240"]
    runs = [run for run in runs if run["batch"] <= 8]  # larger ones show nothing else
    if not runs:
        return None
    panels = [
        (run, p) for p in ("fp32", "bf16") for run in sorted(runs, key=lambda r: (r["threads"], r["batch"]))
    ]
    columns = len(runs)
    figure = _figure(2.6 * columns + 1.6, 5.6)
    for axis, (run, precision) in zip(figure.subplots(2, columns, squeeze=False).flat, panels, strict=True):
        names = [n for n, row in run["rivals"].items() if n.endswith(precision) and "least" in row]
        rates = [run["batch"] / run["rivals"][name]["least"] for name in names]
        ours = {f"frozen {precision}", f"not frozen {precision}"}
        axis.barh(range(len(names)), rates, color=[OURS if name in ours else OTHERS[0] for name in names])
        for at, rate in enumerate(rates):
            axis.text(rate, at, f" {digits(rate)}", va="center", fontsize=7)
        axis.set_xlim(0, max(rates) * 1.2)
        axis.set_yticks(range(len(names)), [name.removesuffix(f" {precision}") for name in names], fontsize=8)
        axis.invert_yaxis()
        threads = "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"
        axis.set_title(f"{precision}, batch {run['batch']}, {threads}", fontsize=9)
        axis.set_xlabel("images a second", fontsize=8)
        _plain(axis)
    figure.suptitle("crossvit_18 at 240 pixels, inference; more is better", fontsize=11)
    return figure


CHARTS: dict[str, Callable[[Sequence[Benchmark]], Any]] = {
    "fusions.png": growth_chart,
    "operation.png": operation_chart,
    "models.png": models_chart,
}
GROUP_OF = {
    "fusions.png": "fusions as the number of tokens grows",
    "operation.png": "cross_attention",
    "models.png": "cpu",
}
