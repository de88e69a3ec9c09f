"""What a backend is held against: every result and gradient, by the error that eager PyTorch makes itself."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from crossvit_kernels import backends, native, triton_runtime
from crossvit_kernels.backends import BACKENDS
from tests.operations import OPERATIONS, CrossAttention, CrossFusion, Size, leaves

GPU_BACKENDS = tuple(name for name, backend in BACKENDS.items() if backend.tried_first)


@dataclass(frozen=True)
class Subject:
    """An operation on a backend, on one `target` of it.

    Targets of `cpu` are instruction sets. Those of `cuda` and `triton` are compute capabilities: the kernels
    compiled for one, executed without a GPU. With CROSSVIT_TEST_DEVICE=cuda it is that device instead.
    """

    operation: CrossAttention | CrossFusion
    backend: str
    target: str = "auto"

    @property
    def axes(self) -> tuple[str, str, str]:
        """What varies by itself."""
        return self.operation.name, self.backend, self.target

    def __str__(self) -> str:
        return "-".join(
            (self.operation.name, self.backend, *([self.target] if self.target != "auto" else []))
        )

    @property
    def native(self) -> bool:
        return self.backend == "cpu"

    @property
    def of_gpu(self) -> bool:
        return self.backend in GPU_BACKENDS

    @property
    def interpreted(self) -> bool:
        """Whether a call takes seconds."""
        return self.of_gpu and self.target.startswith("sm_")

    @property
    def device(self) -> str:
        """Where its tensors are."""
        return self.target if self.of_gpu and not self.interpreted else "cpu"

    @property
    def exact(self) -> torch.dtype:
        """The most precise dtype that it takes."""
        return torch.float32 if self.native or self.of_gpu else torch.float64

    def times(self, count: int) -> int:
        """How often to do what is done `count` times where a call takes microseconds."""
        return max(1, count // 30) if self.interpreted else count

    @contextmanager
    def ready(self) -> Iterator[None]:
        if self.native and native.load_error() is not None:
            pytest.skip(f"the native module is not here: {native.load_error()}")
        if self.device == "cuda" and not torch.cuda.is_available():
            pytest.skip("no GPU: torch.cuda.is_available() is False")
        if self.device == "cuda" and (missing := BACKENDS[self.backend].missing()) is not None:
            pytest.skip(missing)
        with ExitStack() as stack:
            if self.device != "cpu":
                stack.enter_context(torch.device(self.device))
            if self.native:
                stack.enter_context(native.use_isa(self.target))
            if self.interpreted:
                stack.enter_context(without_a_gpu(self.target, self.backend))
            yield

    def run(self, tensors: Sequence[Tensor], size: Size, **options: object) -> tuple[Tensor, ...]:
        return self.operation.run(tensors, size, self.backend, **options)


@contextmanager
def without_a_gpu(target: str = "sm_80", backend: str = "triton", **options: Any) -> Iterator[Any]:
    """A backend of GPUs takes tensors on the CPU: its kernels, compiled for the target, are interpreted.

    Yields the recorder of `tests.ptx.triton_driver.interpreted` or of `tests.interpreted_cuda.interpreted`,
    which `options` go to.
    """
    anywhere = replace(BACKENDS[backend], devices=("cuda", "cpu"), missing=lambda: None)
    with (
        mock.patch.dict(BACKENDS, {backend: anywhere}),
        _interpreter(backend)(int(target.removeprefix("sm_")), **options) as recorder,
    ):
        yield recorder


def _interpreter(backend: str) -> Callable[..., AbstractContextManager]:
    if backend == "cuda":
        if shutil.which("nvcc") is None:
            pytest.skip("there is no nvcc on PATH to compile CUDA with")
        from tests.interpreted_cuda import interpreted as interpreted_cuda

        return interpreted_cuda
    if (error := triton_runtime.load_error()) is not None:
        pytest.skip(error)
    from tests.ptx.triton_driver import interpreted

    return interpreted


needs_module = pytest.mark.skipif(
    native.load_error() is not None, reason=f"the native module is not here: {native.load_error()}"
)


def _isas() -> list[str]:
    return native.load().isas() if native.load_error() is None else ["baseline"]


_DEVICE = os.environ.get("CROSSVIT_TEST_DEVICE")
_TARGETS = {
    # What AMX adds, these operations do not use.
    "cpu": [isa for isa in _isas() if isa != "amx"],
    **dict.fromkeys(GPU_BACKENDS, [_DEVICE] if _DEVICE else ["sm_80", "sm_90"]),
}
SUBJECTS = tuple(
    Subject(operation, backend, target)
    for operation in OPERATIONS
    for backend in backends()
    for target in _TARGETS.get(backend, ["auto"])
)


def subjects(wanted: Callable[[Subject], bool] = lambda subject: True) -> pytest.MarkDecorator:
    """Parametrises a test over `subject`."""
    chosen = [subject for subject in SUBJECTS if wanted(subject)]
    return pytest.mark.parametrize("subject", chosen, ids=str, indirect=True)


all_subjects = subjects()
native_subjects = subjects(lambda subject: subject.native)
LOW = (torch.bfloat16, torch.float16)
DEFAULT = Size()

Function = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def gradients(outputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of the sum of all outputs."""
    loss = sum(y.double().sum() for y in outputs)
    found = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True, materialize_grads=True)
    return list(found)


def results(function: Function, tensors: Sequence[Tensor], seed: int = 11) -> list[Tensor]:
    """Outputs, then every tensor's gradient for a loss in which each output element has its own weight."""
    ins = leaves(tensors)
    outputs = function(ins)
    device = tensors[0].device  # not the default one, which is another in other threads
    generator = torch.Generator(device).manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for y in outputs:
        weight = torch.randn(y.shape, generator=generator, dtype=torch.float64, device=device).bfloat16()
        loss = loss + (y * weight.to(y.dtype)).double().sum()
    grads = torch.autograd.grad(loss, ins, allow_unused=True, materialize_grads=True)
    return [*(y.detach() for y in outputs), *grads]


def check(subject: Subject, tensors: Sequence[Tensor], size: Size, saturated: bool = False) -> None:
    """Outputs and gradients against the oracle in float64.

    In float64 to 1e-11. Else by the rule for kernels: at most twice the error that timm's modules make in the
    same dtype, plus a step of it (in float32 a few, because on few elements eager may be lucky). `saturated`
    inputs, whose softmax is all but one-hot, leave nothing but rounding of the queries' gradients: there all
    gradients are held against the largest, with eight times the error of eager, and 1e-7 in float64.
    """
    operation = subject.operation
    count = len(operation.outputs)
    check_against(
        subject,
        tensors,
        run=lambda x: subject.run(x, size),
        oracle=lambda x: operation.oracle(x, size)[:count],
        eager=lambda x: operation.eager(x, size),
        saturated=saturated,
    )


def check_against(
    subject: Subject,
    tensors: Sequence[Tensor],
    run: Function,
    oracle: Function,
    eager: Function,
    saturated: bool = False,
    rounding: torch.dtype | None = None,
    slack: float = 1.0,
) -> None:
    """As `check`, for any functions of the operation's tensors; `oracle` is given them in float64.

    `rounding`: the dtype whose steps count, where it is not that of the tensors; `slack` multiplies them.
    """
    dtype = tensors[0].dtype
    mine = results(run, tensors)
    truth = results(oracle, [x.double() for x in tensors])
    count = len(truth) - len(tensors)
    largest = max((g.abs().max().item() for g in truth[count:] if g.numel()), default=0.0)

    def error(got: Tensor, want: Tensor) -> float:
        """Relative, but absolute where all should be zero."""
        if got.numel() == 0:
            return 0.0
        assert torch.isfinite(got).all(), "not finite"
        scale = want.abs().max().item()
        if saturated and scale < largest:
            scale = largest
        return (got.double() - want).abs().max().item() / (scale if scale > 1e-12 else 1.0)

    if dtype == torch.float64:
        bounds = [1e-7 if saturated else 1e-11] * len(truth)
    else:
        step = max(torch.finfo(dtype).eps, torch.finfo(rounding or dtype).eps)
        steps = step * (32 if step < 1e-6 else 1) * slack
        times = 8 if saturated else 2
        steps *= times
        rivals = results(eager, tensors)
        bounds = [times * error(*pair) + steps for pair in zip(rivals, truth, strict=True)]
    names = [f"output {i}" for i in range(count)] + [f"gradient of {x}" for x in subject.operation.names]
    zero = {count + i for i in subject.operation.zero_gradients}
    for i, (name, got, want, bound) in enumerate(zip(names, mine, truth, bounds, strict=True)):
        if i >= count:
            assert got.dtype == tensors[i - count].dtype, name
        if i in zero:
            # The definition subtracts equal numbers there, and what is left has no relative size.
            assert subject.backend == "reference" or not got.any(), f"{name} is zero by its formula"
            continue
        assert error(got, want) <= bound, f"{name}: error {error(got, want):.2e}, allowed {bound:.2e}"


# For operations whose gradients are those of their definition (crossvit_kernels/by_definition.py)

every_isa = pytest.mark.parametrize("isa", _isas())
STORED = (torch.float32, *LOW)


def check_values(mine: Tensor, eager: Tensor, exact: Tensor, what: object = "") -> None:
    """By the rule for kernels: at most twice the error of eager PyTorch in the same dtype, plus a step."""
    assert mine.dtype == eager.dtype
    assert mine.shape == eager.shape
    if exact.numel() == 0:
        return
    assert torch.isfinite(mine).all(), what
    scale = exact.abs().max().clamp_min(1e-30)
    error, rival = ((x.double() - exact).abs().max() / scale for x in (mine, eager))
    step = torch.finfo(mine.dtype).eps
    bound = 2 * rival + step * (32 if step < 1e-6 else 1)
    assert error <= bound, f"{what}: error {error:.2e}, allowed {bound:.2e}"


class Guards:
    """What torch.empty gives lies between bytes that must not change, and is NaN before it is written."""

    MARGIN, PATTERN = 256, 0xA5

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.buffers: list[Tensor] = []
        self._empty = torch.empty
        monkeypatch.setattr(torch, "empty", self._guarded)

    def _guarded(self, *shape: Any, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = math.prod(sizes) * dtype.itemsize
        buffer = self._empty(count + 2 * self.MARGIN, dtype=torch.uint8, device=device).fill_(self.PATTERN)
        self.buffers.append(buffer)
        inside = buffer[self.MARGIN : self.MARGIN + count].fill_(0xFF)
        return inside.view(dtype).view(sizes)

    def check(self) -> None:
        assert self.buffers
        for buffer in self.buffers:
            for margin in (buffer[: self.MARGIN], buffer[-self.MARGIN :]):
                assert (margin == self.PATTERN).all(), "something was written outside"
