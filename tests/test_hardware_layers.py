"""The hardware command's measurements of the layers of a block, as far as they need no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_cases, gpu_layer_cases, gpu_timing, hardware, preference, tune_triton
from benchmarks.gpu_layer_cases import LAYER_CASES, LayerCase, measure_layer
from crossvit_kernels import kernel_preference


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch):
    """Calls for replays of graphs, each of a second; one of PyTorch's backends for ours."""
    monkeypatch.setattr(gpu_layer_cases, "ROUNDS", 2)
    monkeypatch.setattr(gpu_layer_cases, "OURS", "torch")
    monkeypatch.setattr(gpu_timing, "capture", called_once)
    monkeypatch.setattr(gpu_timing, "seconds", lambda replay, prepare: float(replay() is not None))


def called_once(function: Callable[[], object]) -> Callable[[], object]:
    function()
    return function


def of_one_image(layer: str, mode: str) -> LayerCase:
    case = next(case for case in LAYER_CASES if case.layer.startswith(layer) and case.mode == mode)
    return replace(case, batch=1, dtype="fp32")


@pytest.mark.parametrize("mode", ["forward", "forward + backward"])
@pytest.mark.parametrize(
    "layer", ["S qkv", "S fc1", "S fc2", "L attention", "L block", "L patches", "L position"]
)
def test_a_measurement(layer, mode):
    case = of_one_image(layer, mode)
    result = measure_layer(case, 1e9, lambda: None, "cpu")
    tensors, grads = gpu_layer_cases.tensors_of(case, "cpu")
    assert result["error"] < gpu_cases.BOUNDS["fp32"]
    assert result["seconds"]["median"] == 1
    assert result["rivals"]["eager"]["ratio"]["median"] == 1
    assert ("flash" in result["rivals"]) == (case.operation == "self_attention")
    if case.operation == "self_attention":  # an engine that is not here loses nothing
        assert "failed" in result["rivals"]["cuDNN"]
    inputs, output = sum(x.nbytes for x in tensors), case.run(tensors, "torch").nbytes
    without_gradient = tensors[0].nbytes if case.operation == "patch_embed" else 0
    once = inputs + output
    assert result["bytes"] == (once if mode == "forward" else once + 2 * inputs + output - without_gradient)
    assert len(grads) == (mode != "forward")
    assert hardware.words(result).startswith("1000000.0 us")
    json.dumps(result)


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setitem(gpu_cases.BOUNDS, "fp32", 1e-30)
    result = measure_layer(of_one_image("S proj", "forward"), 1e9, lambda: None, "cpu")
    assert "seconds" not in result
    assert hardware.words(result).startswith("WRONG")


def test_what_cannot_run_is_said(monkeypatch):
    monkeypatch.setattr(gpu_layer_cases, "OURS", "cuda")
    result = measure_layer(of_one_image("S proj", "forward"), 1e9, lambda: None, "cpu")
    assert hardware.words(result).startswith("FAILED: RuntimeError")


def test_the_cases():
    """Every layer of both branches, in both modes, at both ends of the batch; each has its row."""
    assert len({case.name for case in LAYER_CASES}) == len(LAYER_CASES) == 15 * 4
    assert {case.name for case in LAYER_CASES} <= set(hardware.rows())
    for case in LAYER_CASES:
        if case.operation == "linear":
            tensors = case.draw(1)
            assert tuple(tensors[1].shape[::-1]) == case.shape[:2]
            assert len(tensors) == 3 + 2 * ("norm" in case.shape[2]) + ("residual" in case.shape[2])
    fc1 = next(case for case in LAYER_CASES if case.layer.startswith("L fc1") and case.batch == 256)
    assert kernel_preference.predicted("sm_90", fc1.operation, fc1.shape, 256 * fc1.number, False)


def results_of(ratios: dict[tuple[str, str, int], dict[str, float]]) -> dict:
    """A results file of a GPU where (layer, mode, batch) had these ratios to its rivals."""
    entries = {
        case.name: {"rivals": {name: {"ratio": {"median": ratio}} for name, ratio in found.items()}}
        for case in LAYER_CASES
        if (found := ratios.get((case.layer.split()[1], case.mode, case.batch)))
    }
    return {"runs": {"one": {"capability": "9.0"}}, "entries": entries}


def test_what_is_ahead_of_all_is_preferred(tmp_path, monkeypatch, capsys):
    """torch.compile aside; at each batch by itself."""
    results = results_of(
        {
            ("fc1", "forward", 1): {"eager": 0.9},
            ("fc1", "forward", 256): {"eager": 1.2, "compiled": 0.8},
            ("attention", "forward", 256): {"eager": 3.0, "flash": 1.1, "cuDNN": 0.95},
            ("proj", "forward + backward", 256): {"eager": 1.1},
        }
    )
    results["entries"]["S patches, forward, B=1, bf16"] = {"failed": "MemoryError"}
    found = preference.layer_preferences(results)
    bf16 = torch.bfloat16
    assert found["sm_90", "linear", (448, 1344, "norm, gelu"), False, bf16] == ((197, False), (50_432, True))
    assert found["sm_90", "self_attention", (197, 64), False, bf16] == ((1792, False),)
    assert found["sm_90", "linear", (224, 224, "residual"), True, bf16] == ((102_656, True),)
    assert len(found) == 6

    table, other, file = tmp_path / "layers.py", tmp_path / "gpu.py", tmp_path / "gpu.json"
    source = Path(kernel_preference.__file__).read_text()
    table.write_text(source)
    other.write_text(preference.TABLE.read_text())
    monkeypatch.setattr(preference, "TABLE", other)
    monkeypatch.setattr(preference, "TABLE_OF_LAYERS", table)
    file.write_text(json.dumps(results))
    assert preference.main([str(file)]) == 0
    assert "self_attention (197, 64) forward ((1792, False),)" in capsys.readouterr().out
    scope: dict = {"__package__": "crossvit_kernels", "__name__": "crossvit_kernels.measured"}
    exec(compile(table.read_text(), table, "exec"), scope)
    assert not scope["ahead"]("sm_90", "self_attention", (197, 64), 1792, False, bf16)
    assert scope["ahead"]("sm_90", "linear", (448, 1344, "norm, gelu"), 10**6, False, bf16)
    tune_triton.write({}, table)
    assert table.read_text() == source
