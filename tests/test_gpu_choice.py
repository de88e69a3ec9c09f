"""Which backend "auto" takes on a GPU, with engines made up for it: the CPU's kernels under their names."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from crossvit_kernels import validate, validation
from crossvit_kernels.backends import BACKENDS
from crossvit_kernels.cross_attention import gpu_preference, native
from crossvit_kernels.cross_attention.gpu_preference import preferred
from tests.contract import GPU_BACKENDS, needs_module, results
from tests.operations import OPERATIONS, CrossAttention, CrossFusion, Size, leaves, relative_error

pytestmark = needs_module
operations = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
SIZE = Size(2, 7, 16, 2, 5, 16, 2)


@dataclass
class Engine:
    """Computes as the CPU does, and badly what is among `wrong`; `refusal` is raised instead."""

    wrong: set[str] = field(default_factory=set)
    refusal: str = ""
    calls: list[tuple[str, int]] = field(default_factory=list)  # which, and the batch
    saved_floats = staticmethod(native.saved_floats)

    def forward(self, directions: list, *options: Any) -> None:
        self._count("forward", directions)
        native.forward(directions, *options)
        if "forward" in self.wrong:
            directions[0][1].cls.mul_(1.1)

    def backward(self, directions: list, *options: Any) -> None:
        self._count("backward", directions)
        native.backward(directions, *options)
        if "backward" in self.wrong:
            directions[0][1].to_cls.mul_(1.1)

    def _count(self, what: str, directions: list) -> None:
        if self.refusal:
            raise RuntimeError(self.refusal)
        self.calls.append((what, directions[0][0].patches.shape[0]))

    @property
    def took(self) -> set[str]:
        """What it computed of the call: a trial has another number of images."""
        return {what for what, batch in self.calls if batch == SIZE.batch}


@pytest.fixture
def engines() -> Iterator[SimpleNamespace]:
    """One of each backend of a GPU with 132 multiprocessors, for tensors on the CPU."""
    made_up = SimpleNamespace(**{name: Engine() for name in GPU_BACKENDS})
    here = {name: replace(BACKENDS[name], devices=("cpu",), missing=lambda: None) for name in GPU_BACKENDS}

    def engine(name: str) -> Any:
        return getattr(made_up, name, native)

    op, op_of_fusion = (sys.modules[f"crossvit_kernels.{x.name}.op"] for x in OPERATIONS)
    cuda_first = {
        ("sm_90", operation.name, backward, torch.float32): ((SIZE.batch, ("cuda", "triton")),)
        for operation in OPERATIONS
        for backward in (False, True)
    }
    validation.forget()
    with (
        mock.patch.dict(BACKENDS, here),
        mock.patch.dict(gpu_preference._MEASURED, cuda_first),
        mock.patch.object(op, "engine", engine),
        mock.patch.object(op_of_fusion, "engine", engine),
    ):
        yield made_up
    validation.forget()


def run(operation: CrossAttention | CrossFusion, backend: str = "auto") -> list[Tensor]:
    """Results and gradients; they are right to rounding."""
    torch.manual_seed(2)
    tensors = operation.inputs(SIZE, torch.float32)

    def compute(name: str, x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        return operation.run(x, SIZE, name, dropout_p=0.2, return_attention=True)

    got = results(partial(compute, backend), tensors)
    want = results(partial(compute, "reference"), [x.double() for x in tensors])
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert b.abs().max() < 1e-9 or relative_error(a, b) < 1e-5, i
    return got


def nothing_measured() -> Any:
    return mock.patch.dict(gpu_preference._MEASURED, clear=True)


BOTH = {"forward", "backward"}


@operations
def test_the_one_that_comes_first_is_taken(operation, engines, caplog):
    run(operation)
    assert engines.cuda.took == BOTH
    assert not engines.triton.calls, "what is not taken is not tried"
    engines.cuda.calls.clear()
    with nothing_measured():
        run(operation)
    assert engines.triton.took == BOTH
    assert not engines.cuda.calls
    assert not caplog.records


@operations
def test_what_is_right_is_tried_once(operation, engines):
    run(operation)
    tried = len(engines.cuda.calls)
    run(operation)
    assert len(engines.cuda.calls) == tried + 2 > 4


@operations
@pytest.mark.parametrize("wrong", ["forward", "backward"])
def test_the_next_one_does_what_the_first_one_does_wrong(operation, wrong, engines, caplog):
    """Backward goes on where the other one's forward stopped."""
    engines.cuda.wrong = {wrong}
    with caplog.at_level(logging.WARNING):
        run(operation)
        run(operation)
    assert engines.cuda.took == BOTH - ({"backward"} if wrong == "backward" else BOTH)
    assert engines.triton.took == BOTH - engines.cuda.took
    (record,) = caplog.records
    assert "does not use the backend cuda in this process: a relative error of" in record.getMessage()


def test_one_that_does_not_fit_is_passed_over_with_its_reason(engines, caplog):
    engines.cuda.refusal = "300000 bytes of shared memory are needed"
    with caplog.at_level(logging.WARNING):
        run(OPERATIONS[0])
    assert engines.triton.took == BOTH
    assert "cuda in this process: RuntimeError: 300000 bytes of shared" in caplog.text


def test_operators_of_pytorch_where_none_is_right(engines, caplog):
    engines.cuda.wrong = engines.triton.wrong = BOTH
    with caplog.at_level(logging.WARNING):
        run(OPERATIONS[0])
    assert not engines.cuda.took | engines.triton.took
    assert [("cuda" in r.getMessage(), "triton" in r.getMessage()) for r in caplog.records] == [
        (True, False),
        (False, True),
    ]


def test_one_that_is_missing_is_passed_over_in_silence(engines, caplog, monkeypatch):
    absent = replace(BACKENDS["cuda"], missing=lambda: "it was left out")
    monkeypatch.setitem(BACKENDS, "cuda", absent)
    run(OPERATIONS[0])
    assert engines.triton.took == BOTH
    assert not caplog.records
    with pytest.raises(RuntimeError, match="cuda: it was left out"):
        run(OPERATIONS[0], "cuda")


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_one_that_is_named_is_not_tried(backend, engines):
    run(OPERATIONS[1], backend)
    assert getattr(engines, backend).calls == [("forward", SIZE.batch), ("backward", SIZE.batch)]


@operations
def test_within_torch_compile(operation, engines):
    """The choice is made when the operator runs, and breaks no graph."""
    tensors = leaves(operation.inputs(SIZE, torch.float32))
    function = torch.compile(lambda *x: operation.run(x, SIZE, "auto"), fullgraph=True, backend="aot_eager")
    torch.autograd.grad(sum(y.sum() for y in function(*tensors)), tensors)
    assert engines.cuda.took == BOTH
    engines.cuda.calls.clear()
    with nothing_measured():
        torch.autograd.grad(sum(y.sum() for y in function(*tensors)), tensors)
    assert engines.triton.took == BOTH


WHAT = {"widths": (16,), "num_heads": (2,), "dtype": torch.float32, "device": "cpu"}


def test_validate(engines):
    assert validate("cross_attention", **WHAT, backend="triton") is None
    assert not engines.cuda.calls
    engines.cuda.wrong = {"backward"}
    assert validate("cross_attention", **WHAT, gradients=False) is None
    assert validate("cross_attention", **WHAT).startswith("cuda: a relative error of")
    assert validate("cross_attention", **WHAT, backend="triton") is None
    with pytest.raises(ValueError, match="backend must be one of cuda, triton or None, got 'cpu'"):
        validate("cross_attention", **WHAT, backend="cpu")


def test_validate_where_there_is_none():
    found = validate("cross_attention", **WHAT)
    assert [line.partition(":")[0] for line in found.splitlines()] == ["cuda", "triton"]
    assert "it runs on cuda, the tokens are on cpu" in found


def test_what_was_measured_goes_before_the_rule(monkeypatch):
    kind = ("cross_fusion", False)
    assert preferred("sm_90", *kind, 65, torch.float32) == ("triton", "cuda")
    assert preferred("sm_90", *kind, 65, torch.bfloat16) == ("cuda", "triton")
    rows = ((1, ("triton",)), (32, ("cuda", "triton")), (256, ("cuda",)))
    monkeypatch.setitem(gpu_preference._MEASURED, ("sm_90", *kind, torch.float32), rows)
    found = [preferred("sm_90", *kind, batch, torch.float32) for batch in (1, 2, 32, 33, 1000)]
    assert found == [("triton",), ("cuda", "triton"), ("cuda", "triton"), ("cuda",), ("cuda",)]
    assert preferred("sm_80", *kind, 1, torch.float32) == ("triton", "cuda")
