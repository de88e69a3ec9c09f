"""What the hardware command measures on a GPU: the operations of crossvit_18, their rivals, the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu_timing
from crossvit_kernels.cross_attention.operands import Operands as AttentionOperands
from crossvit_kernels.cross_fusion.operands import Operands as FusionOperands
from crossvit_kernels.cross_fusion.reference import fusion_with
from crossvit_kernels.measure import Interval, compare
from tests.operations import OPERATIONS, Size

ROUNDS = 31
OURS = ("cuda", "triton")  # side by side
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BOUNDS = {"bf16": 5e-2, "fp32": 1e-4}  # relative errors beyond which a time is worth nothing


@dataclass(frozen=True)
class Subject:
    """An operation of crossvit_18, or the kernel within it that reads the tokens."""

    name: str
    operation: Any
    size: Size
    kernel_alone: bool = False

    @property
    def modes(self) -> tuple[str, str]:
        return ("forward", "backward" if self.kernel_alone else "forward + backward")


def _subjects() -> Iterator[Subject]:
    attention, fusion = OPERATIONS
    of_l, of_s = Size(1, 196, 448, 7), Size(1, 400, 224, 7)
    both = Size(1, 400, 224, 7, 196, 448, 7)
    for alone, prefix in ((True, "attention kernel of "), (False, "")):
        yield Subject(f"{prefix}cross_attention over L's patches", attention, of_l, alone)
        yield Subject(f"{prefix}cross_attention over S's patches", attention, of_s, alone)
        yield Subject(f"{prefix}cross_fusion", fusion, both, alone)


@dataclass(frozen=True)
class Case:
    """One measurement: a subject, in one mode, on a batch of one dtype."""

    subject: Subject
    mode: str
    batch: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.subject.name}, {self.mode}, B={self.batch}, {self.dtype}"

    @property
    def size(self) -> Size:
        return replace(self.subject.size, batch=self.batch)

    @property
    def trains(self) -> bool:
        return self.mode != "forward"

    @property
    def listed(self) -> bool:
        """Whether it has rows, one a backend; the results file has every one."""
        return self.dtype == "bf16"

    @property
    def compiled(self) -> bool:
        """Whether torch.compile is among the rivals; it takes long to compile."""
        return not self.subject.kernel_alone and self.listed and self.batch in (1, 256)


# The most important first: time may run out.
_SETTINGS = ((256, "bf16"), (1, "bf16"), (64, "bf16"), (8, "bf16"), (256, "fp32"), (1, "fp32"))
CASES = tuple(
    Case(subject, mode, *setting)
    for setting in _SETTINGS
    for subject in _subjects()
    for mode in subject.modes
    if setting[1] == "bf16" or not subject.kernel_alone
)


def of_backend(name: str, backend: str) -> str:
    """Of a case's name, or of a check's, for one of the backends that stand side by side."""
    return f"{name}, backend {backend}"


def sdpa(operands: AttentionOperands) -> tuple[Tensor, None]:
    """The cross-attention around torch's scaled_dot_product_attention."""
    cls, weights = operands.cls, operands.weights
    gamma, beta, wq, bq, wk, bk, wv, bv, wo, bo = weights
    tokens = F.layer_norm(torch.cat((cls, operands.patches), 1), (cls.shape[2],), gamma, beta, operands.eps)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (operands.num_heads, -1)).transpose(1, 2)

    q, k, v = F.linear(tokens[:, :1], wq, bq), F.linear(tokens, wk, bk), F.linear(tokens, wv, bv)
    output = F.scaled_dot_product_attention(heads(q), heads(k), heads(v))
    return cls + F.linear(output.transpose(1, 2).flatten(2), wo, bo), None


def with_sdpa(operation: Any, x: Sequence[Tensor], size: Size) -> tuple[Tensor, ...]:
    """An operation of tests/operations.py on `sdpa`."""
    if operation.name == "cross_attention":
        return sdpa(AttentionOperands(x[0], x[1], tuple(x[2:]), size.heads, 1e-6))[:1]
    heads = (size.other_heads, size.heads)
    return fusion_with(sdpa)(FusionOperands(x[0], x[1], tuple(x[2:20]), tuple(x[20:]), heads, 1e-6))[:2]


Function = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def functions(case: Case) -> dict[str, Function]:
    """Ours and its rivals, as functions of the operation's tensors."""
    run, size = case.subject.operation.run, case.size
    found: dict[str, Function] = {name: partial(run, size=size, backend=name) for name in OURS}
    if case.subject.kernel_alone:
        return found
    found["eager"] = lambda x: run(x, size, "reference")
    found["torch"] = lambda x: run(x, size, "torch")
    found["SDPA"] = partial(with_sdpa, case.subject.operation, size=size)
    if case.compiled:
        torch.compiler.reset()  # it gives up on a function that it has compiled too often
        found["compiled"] = torch.compile(lambda x: run(x, size, "reference"), dynamic=False)
    return found


def draw(case: Case, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """The operation's tensors, and incoming gradients of its outputs (none for a forward pass)."""
    with torch.device(device):
        torch.manual_seed(0)
        tensors = case.subject.operation.inputs(case.size, DTYPES[case.dtype])
        if not case.trains:
            return tensors, []
        # Each output has the shape of the input at its place.
        grads = [torch.randn_like(x) for x in tensors[: len(case.subject.operation.outputs)]]
        return [x.requires_grad_() for x in tensors], grads


def call(function: Function, tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of all tensors where there are incoming ones."""
    outputs = list(function(tensors))
    if grads:
        outputs += torch.autograd.grad(outputs, tensors, grads)
    return outputs


def floor_bytes(case: Case, tensors: Sequence[Tensor]) -> int:
    """The fewest bytes: in each pass every input is read once and every result written once.

    Of the attention kernel the tokens alone count: patches read and, in a fusion, copied; backward patches
    and a fusion's incoming gradient read, their gradient written.
    """
    size, fusion = case.size, case.subject.operation.name == "cross_fusion"
    if case.subject.kernel_alone:
        tokens = size.patches * size.width + (size.other_patches * size.other_width if fusion else 0)
        return size.batch * tokens * tensors[0].element_size() * (1 + fusion + case.trains)
    inputs, outputs = sum(x.nbytes for x in tensors), sum(x.nbytes for x in tensors[: 1 + fusion])
    return (inputs + outputs) * (2 if case.trains else 1) + (inputs if case.trains else 0)


def error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest relative error, NaN where anything is.

    A tensor's scale is its largest value, but a thousandth of the largest of all at least: the gradient of
    the key's bias is zero and has none of its own.
    """
    floor = 1e-3 * max(x.abs().max().item() for x in want)
    errors = [
        (a.double() - b).abs().max().item() / max(b.abs().max().item(), floor)
        for a, b in zip(got, want, strict=True)
    ]
    return float("nan") if any(e != e for e in errors) else max(errors)


def attention_kernel(backward: bool) -> str:
    """A regular expression that finds the name of the kernel that reads the tokens, in both backends."""
    return rf"\battend{'_backward' if backward else ''}(_kernel)?\b"


Result = dict[str, Any]


def measure(
    case: Case, bandwidth: float, cold: Callable[[], object], device: str = "cuda"
) -> dict[str, Result]:
    """Of each of our backends its times in seconds, with their ratios; `bandwidth` in bytes a second.

    A backend that cannot run here is no reason to lose the others, nor is a rival.
    """
    tensors, grads = draw(case, device)
    bytes_once = floor_bytes(case, tensors)
    results: dict[str, Result] = {
        name: {"bytes": bytes_once, "floor_seconds": bytes_once / bandwidth, "rivals": {}} for name in OURS
    }
    calls = {name: partial(call, f, tensors, grads) for name, f in functions(case).items()}
    if case.subject.kernel_alone:
        samples = {}
        for name in OURS:
            with failing(results[name]):
                kernel = attention_kernel(case.trains)
                samples[name] = gpu_timing.kernel_seconds(calls[name], kernel, ROUNDS, cold)
    else:
        exact = [x.detach().double().requires_grad_(case.trains) for x in tensors]
        want = call(lambda x: case.subject.operation.run(x, case.size, "reference"), exact, grads)
        for name in OURS:
            with failing(results[name]):
                results[name]["error"] = error(calls[name](), want)
        del exact, want
        right = {name for name in OURS if results[name].get("error", float("nan")) < BOUNDS[case.dtype]}
        if not right:
            return results
        replays: dict[str, Callable[[], object]] = {}
        reasons: dict[str, Result] = {name: {} for name in calls if name not in OURS}
        for name in [name for name in calls if name not in OURS or name in right]:
            with failing({**results, **reasons}[name]):
                replays[name] = gpu_timing.capture(calls[name])
        samples = gpu_timing.in_turn(replays, ROUNDS, lambda replay: gpu_timing.seconds(replay, cold))
        for result in results.values():
            result["rivals"].update({name: reason for name, reason in reasons.items() if reason})
    for name, result in results.items():
        if name in samples:
            result["seconds"] = asdict(Interval.of(samples[name]))
            result["of_floor"] = result["seconds"]["median"] / result["floor_seconds"]
            for rival in [rival for rival in samples if rival != name]:
                comparison = compare(samples[name], samples[rival])
                seconds, ratio = asdict(comparison.rival), asdict(comparison.ratio)
                result["rivals"][rival] = {"seconds": seconds, "ratio": ratio}
    return results


@contextmanager
def failing(result: Result) -> Iterator[None]:
    """What is raised within it is kept in the result."""
    try:
        yield
    except Exception as reason:
        result["failed"] = f"{type(reason).__name__}: {reason}"[:300]


@dataclass(frozen=True)
class Target:
    """What the design promises of a case on an H200."""

    text: str
    case: str
    holds: Callable[[Mapping[str, Any]], bool]

    def verdict(self, found: Mapping[str, Mapping[str, Any]]) -> str:
        """`found` has the measurements by their rows."""
        try:
            return "met" if self.holds(found[self.case]) else "NOT met"
        except KeyError:
            return "not measured"


_ALONE, _FUSION = "attention kernel of ", "cross_fusion"


def _targets(backend: str) -> Iterator[Target]:
    def target(text: str, case: str, holds: Callable[[Mapping[str, Any]], bool]) -> Target:
        return Target(of_backend(text, backend), of_backend(case, backend), holds)

    for name in (f"{_ALONE}cross_attention over L's patches, forward", f"{_ALONE}{_FUSION}, backward"):
        text = f"{name}: within 1.5 times its bytes' time"
        yield target(text, f"{name}, B=256, bf16", lambda r: r["of_floor"] <= 1.5)
    for batch, limit in ((256, 36e-6), (1, 30e-6)):
        text = f"{_FUSION}, forward, B={batch}: {limit * 1e6:.0f} us"
        yield target(
            text,
            f"{_FUSION}, forward, B={batch}, bf16",
            lambda r, limit=limit: r["seconds"]["median"] <= limit,  # type: ignore[misc]
        )
    for mode in ("forward", "forward + backward"):
        text = f"{_FUSION}, {mode}: at least 8 times eager"
        yield target(
            text, f"{_FUSION}, {mode}, B=256, bf16", lambda r: r["rivals"]["eager"]["ratio"]["median"] >= 8
        )


TARGETS = (
    *(target for backend in OURS for target in _targets(backend)),
    *(
        Target(
            f"{_FUSION}, {mode}, B={batch}: cuda no slower than triton",
            of_backend(f"{_FUSION}, {mode}, B={batch}, bf16", "cuda"),
            lambda r: r["rivals"]["triton"]["ratio"]["high"] >= 1,
        )
        for batch in (1, 8, 64, 256)
        for mode in ("forward", "forward + backward")
    ),
)
