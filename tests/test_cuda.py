"""What only the backend `cuda` has: the call into the compiled module, and what it says where it cannot run.

Its kernels: test_gpu_kernels.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch

from crossvit_kernels import __main__ as diagnosis
from crossvit_kernels import native, triton_runtime
from crossvit_kernels.backends import BACKENDS
from crossvit_kernels.cross_attention import cuda_launch
from crossvit_kernels.cross_attention.gpu import Gpu
from tests.contract import without_a_gpu
from tests.operations import OPERATIONS, Size, leaves, relative_error

MODULE = sys.modules["crossvit_kernels.backends"]  # the package's attribute of this name is the function
ATTENTION, FUSION = OPERATIONS
SIZE = Size(2, 7, 16, 2, 5, 24, 3)
ERRORS = {
    1: ("cudaErrorInvalidValue", "invalid argument"),
    35: ("cudaErrorInsufficientDriver", "CUDA driver version is insufficient for CUDA runtime version"),
    209: ("cudaErrorNoKernelImageForDevice", "no kernel image is available for execution on the device"),
    999: ("cudaErrorUnknown", "unknown error"),
}


@dataclass(eq=False)
class Module:
    """The compiled module on a GPU that is made up: what it answers, and what it is asked."""

    usable: int = 0
    shared: int = 1000
    code: int = 0
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def cuda_usable(self) -> int:
        self.calls.append(("usable", ()))
        return self.usable

    def cuda_error(self, code: int) -> tuple[str, str]:
        return ERRORS[code]

    def cuda_plan(self, *arguments: Any) -> tuple[int, int]:
        self.calls.append(("plan", arguments))
        return 10, self.shared

    def cuda_run(self, *arguments: Any) -> int:
        self.calls.append(("run", arguments))
        return self.code


@pytest.fixture
def module() -> Iterator[Module]:
    """Takes tensors on the CPU for those of an sm_86, built for others."""
    made_up = Module()
    here = replace(BACKENDS["cuda"], devices=("cpu",), missing=lambda: None)
    report = {"cuda": {"targets": ["sm_80", "sm_90a"], "nvcc": "13.0"}}
    with (
        mock.patch.dict(BACKENDS, cuda=here),
        mock.patch.object(native, "load_cuda", return_value=made_up),
        mock.patch.object(native, "build_report", return_value=report),
        mock.patch.object(cuda_launch, "gpu_of", return_value=Gpu(86, 84, 101376)),
    ):
        yield made_up


def run(operation: Any = ATTENTION, size: Size = SIZE, dtype: torch.dtype = torch.float32) -> None:
    """Forward and backward."""
    tensors = leaves(operation.inputs(size, dtype))
    outputs = operation.run(tensors, size, "cuda")
    torch.autograd.grad(outputs, tensors, outputs)


def asked(module: Module) -> list[str]:
    return [what for what, _ in module.calls]


def test_what_the_module_is_asked(module):
    """Once whether it runs here; then what a call needs, and the call, with the same description of it."""
    run(FUSION)
    assert asked(module) == ["usable", "plan", "run", "plan", "run"]
    for (_, plan), (_, called) in (module.calls[1:3], module.calls[3:5]):
        assert called[: len(plan)] == plan
    (_, (packed, backward, tf32, *gpu)), (_, (*_, eps, dropout_p, memory, stream)) = module.calls[1:3]
    assert [len(packed), backward, tf32, *gpu] == [2, False, False, 86, 84, 101376]
    assert (eps, dropout_p, stream) == (1e-6, 0.0, 0)
    assert memory
    assert module.calls[3][1][1] is True


@pytest.mark.parametrize(("precision", "tf32"), [("ieee", False), ("tf32", True)])
def test_tf32_where_pytorch_allows_it(module, monkeypatch, precision, tf32):
    monkeypatch.setattr(cuda_launch, "precision_of_float32", lambda: precision)
    run()
    assert {arguments[2] for what, arguments in module.calls if what != "usable"} == {tf32}


def test_an_empty_batch_asks_nothing(module):
    run(FUSION, replace(SIZE, batch=0))
    assert not module.calls


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (209, "built for sm_80, sm_90a, and cpu is sm_86: build the package with TORCH_CUDA_ARCH_LIST=8.6"),
        (35, r"the driver of cpu is older than the CUDA toolkit 13.0 .*\(cudaErrorInsufficientDriver\)"),
        (999, r"the CUDA kernels cannot be loaded on cpu: cudaErrorUnknown \(999\), unknown error"),
    ],
)
def test_a_gpu_that_it_does_not_run_on(module, code, words):
    module.usable = code
    for _ in range(2):
        with pytest.raises(RuntimeError, match=words):
            run()
    assert asked(module) == ["usable", "usable"], "nothing was launched, and it may run the next time"


@pytest.mark.parametrize(
    ("operation", "dtype", "words"),
    [
        (
            ATTENTION,
            torch.float32,
            "cross_attention, forward, of 16 channels and 2 heads with torch.float32 tokens and torch",
        ),
        (
            FUSION,
            torch.bfloat16,
            "cross_fusion, forward, of 24 and 16 channels and 3 and 2 heads with torch.b",
        ),
    ],
)
def test_too_little_shared_memory(module, operation, dtype, words):
    module.shared = 101377
    with pytest.raises(RuntimeError, match=words) as caught:
        run(operation, dtype=dtype)
    assert "need 101377 bytes of shared memory in a block, and cpu has 101376: take" in str(caught.value)
    assert "run" not in asked(module)


def test_a_launch_that_fails(module):
    module.code = 1
    words = r"of cross_fusion, forward, .* launched on cpu: cudaErrorInvalidValue \(1\), invalid argument"
    with pytest.raises(RuntimeError, match=words):
        run(FUSION)


def test_why_it_is_not_here(monkeypatch):
    monkeypatch.setattr(MODULE, "_CUDA_ERROR", "it was left out")
    with pytest.raises(
        RuntimeError, match="cuda: it was left out\n  cuda: it runs on cuda, the tokens are on cpu"
    ):
        run()


@pytest.mark.parametrize(
    ("module", "report", "cuda", "hip", "words"),
    [
        (None, {}, "13.0", None, "the package was not built"),
        (object(), {"cuda_left_out": "nvcc was not found"}, "13.0", None, "CUDA kernels: nvcc was not found"),
        (object(), {}, "13.0", None, "it is older than the package: build it again"),
        (Module(), {}, None, None, "was built without CUDA"),
        (Module(), {}, None, "7.0", "was built for ROCm"),
        (Module(), {}, "13.0", None, None),
    ],
)  # fmt: skip
def test_what_is_missing(monkeypatch, module, report, cuda, hip, words):
    monkeypatch.setattr(native, "_import", lambda: (module, "no module"))
    monkeypatch.setattr(native, "build_report", lambda: report)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = native.cuda_missing()
    assert found is None if words is None else words in found
    if not native.has_cuda():
        with pytest.raises(RuntimeError, match=words):
            native.load_cuda()


def test_the_diagnosis_says_on_which_gpus_it_runs(monkeypatch):
    here = replace(BACKENDS["cuda"], missing=lambda: None)
    against = {0: None, 1: "built for others"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(against))
    monkeypatch.setattr(cuda_launch, "unusable", lambda device: against[device.index])
    assert diagnosis._state(here) == "runs, but not everywhere: built for others"
    against[0] = "too old"
    assert diagnosis._state(here) == "does not run: too old; built for others"


@pytest.mark.parametrize(("width", "heads"), [(1, 1), (16, 4), (40, 5), (224, 7), (1024, 64)])
def test_it_leaves_for_backward_what_triton_leaves(width, heads):
    if (error := triton_runtime.load_error()) is not None:
        pytest.skip(error)
    from crossvit_kernels.cross_attention import triton_launch

    assert cuda_launch.saved_floats(width, heads) == triton_launch.saved_floats(width, heads)


# On the interpreter


def test_code_that_is_older_than_the_gpu():
    """As PTX of compute_80 on newer GPUs: it has no clusters and no dependent launches."""
    size = Size(1, 100, 32, 2)  # few images: read in parts
    tensors = ATTENTION.inputs(size, torch.float32)
    with (
        without_a_gpu("sm_80", "cuda") as recorder,
        mock.patch.object(cuda_launch, "gpu_of", return_value=Gpu(90, 132, 166_912)),
    ):
        (got,) = ATTENTION.run(tensors, size, "cuda")
    assert not any(x.launched.cluster or x.launched.dependent for x in recorder.launches)
    assert relative_error(got, ATTENTION.oracle([x.double() for x in tensors], size)[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_not_finite_stays_with_its_token(dtype):
    """Gradients take the place of tokens in shared memory, and what is left of them meets the last tile."""
    size = Size(1, 70, 16, 2, 70, 16, 2)
    tensors = leaves(FUSION.inputs(size, dtype))
    with (
        without_a_gpu("sm_90", "cuda"),
        # of one multiprocessor, so that an image is read in one part
        mock.patch.object(cuda_launch, "gpu_of", return_value=Gpu(90, 1, 232_448)),
    ):
        outputs = FUSION.run(tensors, size, "cuda")
        incoming = [torch.ones_like(y) for y in outputs]
        for g in incoming:
            g[:, 1:65] = torch.inf
        found = torch.autograd.grad(outputs, tensors, incoming)
    for gradient in found[: len(outputs)]:
        assert not gradient[:, 1:65].isfinite().any()
        gradient[:, 1:65] = 0.0
    assert all(gradient.isfinite().all() for gradient in found)
