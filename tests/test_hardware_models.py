"""The hardware command's measurements of whole models, as far as they need no GPU."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu_model_cases, hardware, preference, race
from benchmarks.gpu_model_cases import (
    BY_TORCH,
    DEPENDENT,
    INFERENCE,
    MODEL_CASES,
    MODEL_TARGETS,
    ORDINARY,
    TRAINING,
    ModelCase,
)
from crossvit_kernels import kernel_preference

SMALL = "crossvit_tiny_240"


@pytest.mark.parametrize("mode", [INFERENCE, TRAINING])
def test_a_measurement(mode, monkeypatch):
    monkeypatch.setattr(race, "_SECONDS", 0.1)
    monkeypatch.setattr(race, "_LATENCY_SECONDS", 0.1)
    result = gpu_model_cases.measure_model(ModelCase(mode, 1, SMALL), torch.device("cpu"), compilers=False)
    assert result["error"] < 0.05
    assert result["against timm"]["ratio"] > 0
    assert result["peak_bytes"].keys() >= {"ours", "timm"}
    words = gpu_model_cases.words(json.loads(json.dumps(result)))
    assert "images/s" in words
    assert "times as long as ours: " in words
    assert ("latency p50" in words) == (mode == INFERENCE) == (BY_TORCH in words)
    assert "|" not in words


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setitem(gpu_model_cases._BOUNDS, TRAINING, -1.0)
    result = gpu_model_cases.measure_model(ModelCase(TRAINING, 1, SMALL), torch.device("cpu"), False)
    assert gpu_model_cases.words(result).startswith("WRONG: relative error")


def test_what_cannot_run_is_said(monkeypatch):
    monkeypatch.setattr(race, "run", lambda *_, **__: 1 / 0)
    result = gpu_model_cases.measure_model(ModelCase(TRAINING, 1, SMALL), torch.device("cpu"), False)
    assert gpu_model_cases.words(result) == "FAILED: ZeroDivisionError: division by zero"


def test_the_cases_and_their_targets():
    names = [case.name for case in MODEL_CASES]
    assert len(set(names)) == len(names)
    assert set(names) <= set(hardware.rows())
    assert {case.batch for case in MODEL_CASES if case.mode == INFERENCE} == {1, 8, 32, 64, 128, 256, 512}
    found = {
        name: {
            "peak_bytes": {"ours": 0.5, "timm": 1.0},
            "against timm": {"ratio": 5.0},
            "against max-autotune": {"ratio": 1.0},
        }
        for name in names
    }
    verdicts = [target.verdict(found) for target in MODEL_TARGETS]
    assert verdicts == ["met", "NOT met", "met", "NOT met", "met", "met"]
    assert {target.verdict({}) for target in MODEL_TARGETS} == {"not measured"}


def test_what_a_frozen_model_takes_is_chosen_by_it():
    """Whose kernels, and how they are launched; nothing of a batch where one was not measured."""
    seconds = {1: (4.0, 3.0, 2.0), 8: (4.0, 3.0, 3.5), 64: (4.0, 3.0, None), 256: (4.0, 5.0, 6.0)}
    entries = {
        ModelCase(INFERENCE, batch).name: {
            f"against {name}": {"rival_seconds": time}
            for name, time in zip((BY_TORCH, ORDINARY, DEPENDENT), times, strict=True)
            if time is not None
        }
        for batch, times in seconds.items()
    }
    results = {"runs": {"one": {"capability": "9.0"}}, "entries": entries}
    found = preference.layer_preferences(results)
    kind = ((224, 448), False, torch.bfloat16)
    assert found == {
        ("sm_90", "frozen_model", *kind): ((64, True), (256, False)),
        ("sm_90", "dependent_launches", *kind): ((1, True), (256, False)),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_preference, "_MEASURED", found)
        given = ("sm_90", "frozen_model", kind[0])
        ahead = [kernel_preference.ahead(*given, batch, *kind[1:]) for batch in (1, 8, 128, 512)]
    assert ahead == [True, True, False, False]


LINES = ["a line", json.dumps({"name": MODEL_CASES[0].name, "images": 256, "failed": "OutOfMemoryError: no"})]


def test_what_a_run_keeps(monkeypatch, tmp_path):
    """Each line as it comes; a failed measurement fails the command."""
    said: list[str] = []
    kept: dict[str, str] = {}

    class Report:
        budget = hardware.Budget(100)

        def say(self, text: str) -> None:
            said.append(text)

        def keep(self, name: str, entry: dict, result: str) -> None:
            kept[name] = result

    def run(command: tuple, limit: float, on_line: object) -> hardware.Outcome:
        assert command[-1] == "models-compiled"
        for line in LINES:
            on_line(line)
        return hardware.Outcome(0, limit, True, LINES)

    monkeypatch.setattr(hardware, "run", run)
    assert not hardware.run_models(Report(), 60, 0, True)
    assert kept == {MODEL_CASES[0].name: "FAILED: OutOfMemoryError: no"}
    assert f"whole models: out of time, 1 of {len(MODEL_CASES)} done" in said
    assert any(line.startswith("target: ") and line.endswith("not measured") for line in said)
