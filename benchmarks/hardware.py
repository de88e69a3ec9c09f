"""`python -m benchmarks.hardware`: everything that only a GPU can show, in under eight minutes.

Compiles, checks, tests and measures; needs no network. With --models it measures whole models alone, against
torch.compile too, which takes its time to compile them. Each result is written as soon as it is there, to
benchmarks/results/hardware/<gpu>.json and to the rows of docs/hardware.md; what did not run keeps its row.
Times are those of captured graphs with a cold L2 cache, as benchmarks/gpu_timing.py takes them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_timing
from benchmarks.gpu_cases import (
    CASES,
    DTYPES,
    OURS,
    TARGETS,
    Case,
    Subject,
    call,
    draw,
    functions,
    measure,
    of_backend,
)
from benchmarks.gpu_layer_cases import LAYER_CASES, measure_layer, tensors_of
from benchmarks.gpu_model_cases import COMPILED, MODEL_CASES, MODEL_TARGETS, frozen_by, measure_model
from benchmarks.gpu_model_cases import words as words_of_model
from crossvit import create_model
from crossvit_kernels import native
from crossvit_kernels.check import check_all
from crossvit_kernels.validation import OF_BLOCKS
from tests.operations import OPERATIONS, Size

ROOT = Path(__file__).resolve().parents[1]
LEDGER = ROOT / "docs" / "hardware.md"
RESULTS = ROOT / "benchmarks" / "results" / "hardware"

COPY, COPY_IN_CACHE = "copy from device to device", "copy within the L2 cache"
SECONDS = 460.0  # of the whole command
SECONDS_OF_MODELS = 570.0  # with --models
GRACE = 15.0  # more, from the interruption of a process to its end
MEASURING = 150.0  # of them are kept for the measurements
FOR_MODELS = 60.0  # of these for whole models


# Parts that run in a process of their own, so that a kernel that hangs or faults ends nothing else


def compile_kernels() -> None:
    """Fills Triton's cache on disk on all cores, for the parts that follow."""
    cases = [case for case in CASES if case.trains and not case.subject.kernel_alone]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        jobs = [pool.submit(_check), *(pool.submit(run_once, case, "triton") for case in (*_small(), *cases))]
        jobs += [pool.submit(run_layer, i) for i, case in enumerate(LAYER_CASES) if case.trains]
        jobs += [pool.submit(run_model, batch) for batch in (256, 1)]
        for job in jobs:
            job.result()


def _check() -> None:
    list(check_all())


def run_once(case: Case, backend: str) -> None:
    call(functions(case)[backend], *draw(case, "cuda"))
    torch.cuda.synchronize()


def run_layer(index: int) -> None:
    case = LAYER_CASES[index]
    tensors, grads = tensors_of(case, "cuda")
    wanted = [x for x in tensors if x.requires_grad]
    torch.autograd.grad([case.run(tensors, "triton")], wanted, grads)
    torch.cuda.synchronize()


def run_model(batch: int) -> None:
    """What a frozen model compiles: its graph, and each way to launch its kernels."""
    model = create_model("crossvit_18").cuda().bfloat16()
    images = torch.zeros(batch, 3, 240, 240, dtype=torch.bfloat16, device="cuda")
    for dependent in (False, True):
        frozen_by(model, "triton", dependent, images)
    torch.cuda.synchronize()


def _small() -> list[Case]:
    return [
        Case(Subject("small", operation, Size()), "forward + backward", 2, dtype)
        for operation, dtype in product(OPERATIONS, DTYPES)
    ]


def run_small(backend: str) -> None:
    """Both operations forward and backward, small enough for a checker of every memory access."""
    for case in _small():
        run_once(case, backend)


def measure_all() -> None:
    """Prints a line of JSON for each measurement, the bandwidth first."""

    def report(name: str, result: dict[str, Any]) -> None:
        print(json.dumps({"name": name, **result}), flush=True)

    bandwidth = gpu_timing.copy_bandwidth()
    report(COPY, {"bytes_per_second": bandwidth})
    report(COPY_IN_CACHE, {"bytes_per_second": gpu_timing.cache_bandwidth()})
    cold = gpu_timing.ColdCache()
    for case in CASES:
        try:
            results = measure(case, bandwidth, cold)
        except Exception as reason:
            failed = {"failed": f"{type(reason).__name__}: {reason}"[:300]}
            results = {backend: failed for backend in OURS}
        for backend, result in results.items():
            report(of_backend(case.name, backend), result)
        torch.cuda.empty_cache()
    for layer in LAYER_CASES:
        try:
            report(layer.name, measure_layer(layer, bandwidth, cold))
        except Exception as reason:
            report(layer.name, {"failed": f"{type(reason).__name__}: {reason}"[:300]})
        torch.cuda.empty_cache()


def measure_models(compilers: bool) -> None:
    """Prints a line of JSON for each whole model; at last once more, against torch.compile."""
    again = [case for case in MODEL_CASES if case.batch in COMPILED] if compilers else []
    for number, case in enumerate((*MODEL_CASES, *again)):
        device = torch.device("cuda", torch.cuda.current_device())
        result = measure_model(case, device, compilers and number >= len(MODEL_CASES))
        print(json.dumps({"name": case.name, **result}), flush=True)
        torch.cuda.empty_cache()


PARTS: dict[str, Callable[[], None]] = {
    "compile": compile_kernels,
    **{f"small-{backend}": partial(run_small, backend) for backend in OURS},
    "measure": measure_all,
    "models": partial(measure_models, False),
    "models-compiled": partial(measure_models, True),
}


# Running parts under a budget of time


@dataclass
class Budget:
    """Seconds that are left of `total`, by a clock that a test may replace."""

    total: float
    clock: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def spent(self) -> float:
        return self.clock() - self.start

    def grant(self, wanted: float, keep: float = 0.0) -> float:
        """At most `wanted`, so that `keep` is left afterwards; 0 instead of less than 5, which do no good."""
        granted = min(wanted, self.total - self.spent - keep)
        return granted if granted >= 5 else 0.0


@dataclass
class Outcome:
    """How a process ended, after how many seconds, with its last lines."""

    code: int
    seconds: float
    stopped: bool
    lines: list[str]


@contextmanager
def _interruptible() -> Iterator[None]:
    """What is started within it can be interrupted, also where a shell has this command in the background:
    shells let such processes, and what they start, ignore interruptions."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if before is signal.SIG_IGN:
            signal.signal(signal.SIGINT, before)


def run(
    command: Sequence[str],
    limit: float,
    on_line: Callable[[str], None] = lambda line: None,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Runs a command for `limit` seconds: then it is interrupted, so that it can sum up, then killed."""
    with _interruptible():
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    # The interruption is for the process alone: pytest tells its workers itself, and sums up.
    timers = [
        threading.Timer(limit, process.send_signal, [signal.SIGINT]),
        threading.Timer(limit + GRACE, kill),
    ]
    lines: list[str] = []
    started = time.monotonic()
    try:
        for timer in timers:
            timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            on_line(lines[-1])
        code = process.wait()
    finally:
        for timer in timers:
            timer.cancel()
        kill()
    seconds = time.monotonic() - started
    return Outcome(code, seconds, seconds >= limit, lines[-200:])


@dataclass(frozen=True)
class Step:
    """A command that passes or fails.

    Attributes:
        row: of the ledger.
        limit: seconds.
        needs: modules and programs; without one of them the step does not run.
    """

    row: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def missing(self) -> list[str]:
        return [
            name
            for name in self.needs
            if importlib.util.find_spec(name) is None and shutil.which(name) is None
        ]


def _steps() -> list[Step]:
    python = (sys.executable, "-m")
    part = (*python, "benchmarks.hardware", "--part")
    pytest = (*python, "pytest", "-q", "--tb=short", "-p", "no:cacheprovider")
    workers = ("-n", str(min(16, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    contract = tuple(f"tests/{name}.py" for name in ("test_contract", "test_contract_in_torch"))
    on_device = (("CROSSVIT_TEST_DEVICE", "cuda"),)
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    # So that an access beyond a tensor is one beyond its allocation.
    no_cache = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return [
        Step("compiling the Triton kernels", (*part, "compile"), 90, ("triton",)),
        Step("python -m crossvit_kernels --check", (*python, "crossvit_kernels", "--check"), 90),
        Step(
            "streams, graphs, repeats, large tensors (tests/test_on_gpu.py)",
            # Not the conftest of the tests, which needs timm.
            (*pytest, *workers, "--noconftest", "tests/test_on_gpu.py"),
            90,
            ("pytest",),
        ),
        Step(
            "the test kernels of the PTX interpreter",
            (*pytest, *workers, "tests/test_ptx_triton.py", "-k", "on_the_gpu"),
            40,
            ("pytest", "timm", "triton"),
            on_device,
        ),
        *(
            Step(
                of_backend(f"compute-sanitizer {tool}", backend),
                (*sanitizer, tool, *part, f"small-{backend}"),
                30,
                (sanitizer[0],),
                no_cache,
            )
            for backend in OURS
            for tool in ("memcheck", "racecheck")
        ),
        # The longest comes last: it may take what is left.
        *(
            Step(
                of_backend("the contract of both operations", backend),
                (*pytest, *workers, *contract, "-k", f"{backend}-cuda"),
                limit,
                ("pytest", "timm", "onnxruntime"),
                on_device,
            )
            for backend, limit in zip(OURS, (90, 240), strict=True)
        ),
    ]


def verdict(outcome: Outcome) -> str:
    """One line; of a run of pytest its counts."""
    counts = [
        m[1]
        for line in outcome.lines
        if (m := re.search(r"(\d+ (?:passed|failed|error|skip).*) in [\d.:]+", line))
    ]
    dots = "".join(x.split()[0] for x in outcome.lines if re.fullmatch(r"[.FEsxX]+( +\[ *\d+%\])?", x))
    if outcome.stopped and not counts and dots:  # pytest was killed before it summed up
        counts = [f"{dots.count('F') + dots.count('E')} failed, {dots.count('.')} passed"]
    words = f": {counts[-1]}" if counts else ""
    if outcome.code == 5 or (counts and not re.search("passed|failed|error", counts[-1])):
        return f"not run{words or ': there are no such tests'}"
    how = "stopped" if outcome.stopped else "passed" if outcome.code == 0 else "FAILED"
    return f"{how} after {outcome.seconds:.0f} s{words}"


# Results


def write(path: Path, text: str) -> None:
    """Under another name first: a reader or an interruption sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


@dataclass
class Results:
    """The results file of a GPU: of each entry the latest, and of each run that they are from its machine.

    Entries of earlier runs stay until a run has a new one.
    """

    path: Path
    run: str
    machine: dict[str, Any]

    def __post_init__(self) -> None:
        self.data = json.loads(self.path.read_text()) if self.path.exists() else {"runs": {}, "entries": {}}

    def add(self, name: str, entry: Mapping[str, Any]) -> None:
        self.data["entries"][name] = {"run": self.run, **entry}
        self.data["runs"][self.run] = self.machine
        kept = {entry["run"] for entry in self.data["entries"].values()}
        self.data["runs"] = {run: facts for run, facts in self.data["runs"].items() if run in kept}
        write(self.path, json.dumps(self.data, indent=1) + "\n")


def with_row(text: str, name: str, gpu: str, date: str, commit: str, result: str) -> str:
    """The ledger with a row for `name` on `gpu`: instead of one of that GPU or "not run", else a new one."""
    row = f"| {name} | {gpu} | {date} | {commit} | {result} |"
    lines = text.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    same = [i for i, c in enumerate(cells) if c[0] == name and len(c) == 5]
    for i in same:
        if cells[i][1] in (gpu, "-"):
            lines[i] = row
            return "\n".join(lines) + "\n"
    last = max(same or [i for i, line in enumerate(lines) if line.startswith("|")])
    return "\n".join([*lines[: last + 1], row, *lines[last + 1 :]]) + "\n"


def checks(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Row and result of each line of `--check` that ran on a GPU."""
    for line in lines:
        found = re.match(r"\s*(ok|FAIL)\s+(\w+), (?:(\w+) on cuda|native CUDA): (.*)", line)
        if found:
            word = "passed" if found[1] == "ok" else "FAILED"
            name = of_backend(found[2], found[3]) if found[3] else f"{found[2]} (CUDA C++)"
            yield name, f"{word}: {found[4]}"


def words(entry: Mapping[str, Any]) -> str:
    """The result cell of a measurement."""
    if "failed" in entry:
        return f"FAILED: {entry['failed'].splitlines()[0][:100]}".replace("|", "/")
    if "seconds" not in entry:
        return f"WRONG: relative error {entry['error']:.1e}"
    time_taken = entry["seconds"]
    low, median, high = (time_taken[key] * 1e6 for key in ("low", "median", "high"))
    text = f"{median:.1f} us ({low:.1f}-{high:.1f}), {entry['of_floor']:.2f} times its bytes' time"
    ratios = [f"{n} {r['ratio']['median']:.1f}" for n, r in entry["rivals"].items() if "ratio" in r]
    return text + (f"; times as long as ours: {', '.join(ratios)}" if ratios else "")


def rows() -> list[str]:
    """Every row that this command can fill, in the order of the ledger."""
    checked = [of_backend(o.name, b) for o in OPERATIONS for b in (*OURS, "torch", "reference")]
    checked += [of_backend(name, b) for name in OF_BLOCKS for b in ("triton", "torch", "reference")]
    steps = [step.row for step in _steps()]
    return [
        "layer_norm_statistics (CUDA C++)",
        *checked,
        *steps,
        COPY,
        COPY_IN_CACHE,
        *(of_backend(case.name, backend) for case in CASES if case.listed for backend in OURS),
        *(case.name for case in LAYER_CASES),
        *(case.name for case in MODEL_CASES),
    ]


def machine() -> dict[str, Any]:
    """The GPU, and the versions of what ran on it; sizes in bytes."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory": gpu.total_memory,
        "l2": gpu.L2_cache_size,
        "driver": driver.partition("\n")[0] or None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _commit() -> str:
    """Of the checkout; what this command writes itself is no change of it."""
    name = _output("git", "rev-parse", "--short=10", "HEAD")
    own = (f":!{path.relative_to(ROOT)}" for path in (LEDGER, RESULTS))
    changed = _output("git", "status", "--porcelain", "--", ".", *own)
    return (name or "unknown") + ("-dirty" if changed else "")


class Report:
    """Prints what happens, and keeps it in the results file and in the ledger."""

    def __init__(self, budget: Budget, commit: str | None) -> None:
        self.budget = budget
        facts = machine()
        self.gpu = facts["gpu"]
        self.date = time.strftime("%Y-%m-%d")
        self.commit = commit or _commit()
        slug = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")
        self.results = Results(RESULTS / f"{slug}.json", f"{time.strftime('%F %T')} {self.commit}", facts)
        self.say(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))

    def say(self, text: str) -> None:
        print(f"[{self.budget.spent:4.0f} of {self.budget.total:.0f} s] {text}", flush=True)

    def keep(self, name: str, entry: Mapping[str, Any], result: str, listed: bool = True) -> None:
        self.say(f"{name}: {result}")
        self.results.add(name, {**entry, "result": result})
        if listed:
            write(LEDGER, with_row(LEDGER.read_text(), name, self.gpu, self.date, self.commit, result))


def build(report: Report) -> None:
    """The CUDA kernels of the native module, in place, where they are not there and can be."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    needs = [name for name in ("setuptools", "pybind11", "ninja") if importlib.util.find_spec(name) is None]
    if native.cuda_missing() is None:
        report.say("native module: already there, with CUDA")
    elif nvcc is None or needs:
        report.say(f"native module: not built: {', '.join(needs) or 'nvcc'} not found")
    else:
        command = (sys.executable, "setup.py", "build_ext", "--inplace")
        outcome = run(command, report.budget.grant(90, MEASURING))
        report.say(
            f"native module: build {verdict(outcome)}" + "".join(f"\n    {x}" for x in outcome.lines[-3:])
        )


def run_steps(report: Report) -> bool:
    """Whether none that ran failed or was stopped."""
    good = True
    for step in _steps():
        limit = report.budget.grant(step.limit, keep=MEASURING)
        if missing := step.missing():
            report.say(f"{step.row}: not run: {', '.join(missing)} not found")
        elif not limit:
            report.say(f"{step.row}: not run: no time left")
        else:
            report.say(f"{step.row} ...")
            outcome = run(step.command, limit, environment=dict(step.environment))
            result = verdict(outcome)
            if result.startswith("not run"):
                report.say(f"{step.row}: {result}")
                continue
            good = good and result.startswith("passed")
            output = outcome.lines[-40:] if outcome.code else []
            report.keep(step.row, {"output": output}, result)
            for line in output:
                print(f"    {line}", flush=True)
            for name, line in checks(outcome.lines):
                report.keep(name, {}, line)
    return good


def run_measurements(report: Report) -> bool:
    """Whether none failed and no result was wrong; prints which targets are met."""
    listed, found = {of_backend(c.name, backend) for c in CASES if c.listed for backend in OURS}, {}
    listed |= {case.name for case in LAYER_CASES}

    def on_line(line: str) -> None:
        if not line.startswith('{"name"'):
            return
        entry = json.loads(line)
        name = entry.pop("name")
        found[name] = entry
        if "bytes_per_second" in entry:
            report.keep(name, entry, f"{entry['bytes_per_second'] / 1e12:.2f} TB/s, read and written")
        else:
            report.keep(name, entry, words(entry), name in listed)

    command = (sys.executable, "-m", "benchmarks.hardware", "--part", "measure")
    outcome = run(command, report.budget.grant(SECONDS), on_line)
    if outcome.stopped:
        report.say(
            f"measurements: out of time, {len(found) - 2} of {len(CASES) * len(OURS) + len(LAYER_CASES)} done"
        )
    elif outcome.code:
        report.say("measurements: FAILED\n" + "\n".join(outcome.lines[-25:]))
    for target in TARGETS:
        report.say(f"target: {target.text}: {target.verdict(found)}")
    return not outcome.code and all("seconds" in e or "bytes_per_second" in e for e in found.values())


def run_models(report: Report, seconds: float, keep: float, compilers: bool) -> bool:
    """Whether no measurement of a whole model failed; prints which targets are met."""
    if importlib.util.find_spec("timm") is None:
        report.say("whole models: not run: timm not found")
        return True
    found: dict[str, dict[str, Any]] = {}

    def on_line(line: str) -> None:
        if line.startswith('{"name"'):
            entry = json.loads(line)
            name = entry.pop("name")
            found[name] = entry
            report.keep(name, entry, words_of_model(entry))

    part = "models-compiled" if compilers else "models"
    command = (sys.executable, "-m", "benchmarks.hardware", "--part", part)
    outcome = run(command, report.budget.grant(seconds, keep), on_line)
    if outcome.stopped:
        report.say(f"whole models: out of time, {len(found)} of {len(MODEL_CASES)} done")
    elif outcome.code:
        report.say("whole models: FAILED\n" + "\n".join(outcome.lines[-25:]))
    for target in MODEL_TARGETS:
        report.say(f"target: {target.text}: {target.verdict(found)}")
    failed = outcome.code and not outcome.stopped
    return not failed and all("ours_seconds" in entry for entry in found.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hardware", description=__doc__)
    parser.add_argument("--part", choices=list(PARTS), help="run one part alone, in this process")
    parser.add_argument("--commit", help="the commit's name where git cannot tell it")
    parser.add_argument(
        "--models", action="store_true", help="measure whole models alone, torch.compile among the rivals"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("No GPU was found (torch.cuda.is_available() is False): nothing was run.")
        return 2
    if options.part is not None:
        PARTS[options.part]()
        return 0
    report = Report(Budget(SECONDS_OF_MODELS if options.models else SECONDS), options.commit)
    build(report)
    if options.models:
        passed, measured = run_models(report, SECONDS_OF_MODELS, 0, True), True
    else:
        passed = run_steps(report)
        passed = run_models(report, FOR_MODELS, MEASURING - FOR_MODELS, False) and passed
        measured = run_measurements(report)
    report.say(f"written: {report.results.path.relative_to(ROOT)}, {LEDGER.relative_to(ROOT)}")
    return 0 if passed and measured else 1


if __name__ == "__main__":
    sys.exit(main())
