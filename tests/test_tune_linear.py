"""The tuner of the tiles of linear layers, and that all it may choose computes the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import tune_linear, tune_triton
from crossvit_kernels.linear import triton_launch, triton_table
from tests.by_definition import linear_inputs
from tests.test_triton_linear import check, given, on


@pytest.mark.parametrize(
    ("target", "tiles"),
    [
        ("sm_90", triton_table.Tiles(256, 128, 64, 64, 8, 3, tma=True)),
        *(
            pytest.param(target, tiles, marks=pytest.mark.sweep)
            for target in ("sm_90", "sm_80")
            for narrow in (False, True)
            for tiles in tune_linear.candidates(target, narrow)
        ),
    ],
    ids=str,
)
def test_other_tiles_compute_the_same(target, tiles):
    """All that the tuner may choose, with a last tile that is not filled and a last step that is not."""
    x = [t.bfloat16() for t in linear_inputs((300,), 96, 328)]
    with on(target), mock.patch.object(triton_launch, "tiles_of_product", return_value=tiles):
        check(given(x, True, True), activation="gelu" if tiles.slice == 32 else None)


def test_what_was_measured_goes_before_what_was_chosen(tmp_path):
    arguments = ("sm_90", torch.bfloat16, 448, 1344, False, True, False)
    chosen = triton_table.tiles_of_product(*arguments)
    better = triton_table.Tiles(256, 128, 64, 64, 8, 3, tma=True)
    key = ("sm_90", torch.bfloat16, 448, 1344, False, False)
    with mock.patch.dict(triton_table._MEASURED, {key: better}):
        assert triton_table.tiles_of_product(*arguments) == better
        assert triton_table.tiles_of_product(*arguments[:3], 448, False, True, False) == chosen
        without_tma = triton_table.tiles_of_product(*arguments[:5], False, False)
        assert not without_tma.tma
    path = tmp_path / "table.py"
    source = tune_linear.TABLE.read_text()
    path.write_text(source)
    tune_triton.write({key: better}, path)
    scope: dict = {"__package__": "crossvit_kernels.linear", "__name__": "crossvit_kernels.linear.measured"}
    with mock.patch.dict(sys.modules, {scope["__name__"]: ModuleType(scope["__name__"])}):
        exec(compile(path.read_text(), path, "exec"), scope)
    assert scope["tiles_of_product"](*arguments).rows == 256
    tune_triton.write({}, path)
    assert path.read_text() == source


def test_the_fastest_candidate():
    tried = list(tune_linear.candidates("sm_90", False))
    seen: list[triton_table.Tiles] = []

    def seconds(call: Callable[[], None]) -> float:
        seen.append(triton_launch.tiles_of_product())
        if len(seen) == 1:
            raise RuntimeError("no room")
        return 1.0 / len(seen)

    assert tune_linear.fastest(lambda: None, tried, seconds) == (tried[-1], 1.0 / len(tried))
    assert seen == tried
    assert len(set(tried)) == len(tried) == 15
    assert tune_linear.fastest(lambda: None, [], seconds) is None


def test_the_layers_that_are_tuned(capsys):
    shapes = tune_linear.shapes("crossvit_18")
    assert (256 * 197, 448, 1344, "gelu") in shapes
    assert (256 * 401, 672, 224, "norm_gradient") in shapes
    assert len(shapes) == 14
    if not torch.cuda.is_available():
        assert tune_linear.main([]) == 2
        assert "a GPU is needed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune_linear.main(["--variant", "crossvit_19"])
