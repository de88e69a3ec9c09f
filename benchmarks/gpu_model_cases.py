"""What the hardware command measures of whole models: frozen inference and a training step, against timm's.

Both in bfloat16: inference with weights in it, training under autocast with AdamW. timm's model is taken as
it is, recorded in a CUDA graph by hand, and compiled by torch.compile in two ways.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import gpu_timing, race
from benchmarks.gpu_cases import Result, Target, error, failing
from crossvit import CrossViT, create_model
from crossvit._timm import import_timm
from crossvit.frozen_gpu import PackedOnGpu
from crossvit_kernels import use_backend
from crossvit_kernels.backends import BACKENDS

MODEL = "crossvit_18_240"
INFERENCE, TRAINING = "inference", "training step"
# Frozen models with what "auto" chooses from: whose kernels, and how they are launched.
BY_TORCH, ORDINARY, DEPENDENT = "frozen on PyTorch", "frozen on Triton", "frozen on Triton, dependent"
# Relative to the largest logit or the loss, against timm's model in float32.
_BOUNDS = {INFERENCE: 0.05, TRAINING: 0.05}
# torch.compile takes a minute for the first of these and several for the second.
COMPILERS: dict[str, dict[str, Any]] = {"compiled": {}, "max-autotune": {"mode": "max-autotune"}}
COMPILED = (256, 1)


@dataclass(frozen=True)
class ModelCase:
    """One measurement: a model in one mode on a batch."""

    mode: str
    batch: int
    model: str = MODEL

    @property
    def name(self) -> str:
        return f"{self.model}, {self.mode}, B={self.batch}, bf16"


# The most important first: time may run out.
MODEL_CASES = (
    *(ModelCase(INFERENCE, 256), ModelCase(INFERENCE, 1), ModelCase(TRAINING, 256)),
    *(ModelCase(INFERENCE, batch) for batch in (8, 32, 64, 128, 512)),
    ModelCase(TRAINING, 64),
)


def _pair(case: ModelCase, device: torch.device) -> tuple[CrossViT, nn.Module]:
    """(ours, timm's) with the same random weights, in float32."""
    torch.manual_seed(0)
    ours = create_model(case.model)
    rival = import_timm().create_model(case.model)
    rival.load_state_dict(ours.state_dict())
    return ours.to(device), rival.to(device)


def measure_model(case: ModelCase, device: torch.device, compilers: bool) -> Result:
    """What `race.run` measures, of images of the model's own size; a wrong result is not timed.

    `compilers`: whether torch.compile is among the rivals, on batches where it is asked for.
    """
    compiled = compilers and case.batch in COMPILED
    measure = _inference if case.mode == INFERENCE else _training
    result: Result = {"images": case.batch}
    with failing(result):
        ours, rival = _pair(case, device)
        images = torch.randn(case.batch, 3, *ours.img_size, device=device)
        measure(ours, rival, images, compiled, result)
    return result


def _inference(ours: CrossViT, rival: nn.Module, images: Tensor, compiled: bool, result: Result) -> None:
    device = images.device
    with torch.inference_mode():
        want = rival.eval()(images)
    rival = rival.to(torch.bfloat16)
    low = images.to(torch.bfloat16)
    models: dict[str, Any] = {"ours": ours.to(torch.bfloat16).freeze()}
    for name, backend, dependent in (
        *((BY_TORCH, "torch", False), (ORDINARY, "triton", False), (DEPENDENT, "triton", True)),
    ):
        if BACKENDS[backend].missing() is None and (backend == "torch" or device.type == "cuda"):
            models[name] = frozen_by(ours, backend, dependent, low)
    models["timm"] = rival
    given = {name: (lambda m=model: _forward(m, low)) for name, model in models.items()}
    if device.type == "cuda":
        given["timm in a graph"] = gpu_timing.capture(given["timm"])
    for name, options in COMPILERS.items() if compiled else ():
        torch.compiler.reset()
        model = torch.compile(rival, **options)
        if _compiles(name, lambda m=model: _forward(m, low), result):
            given[name] = lambda m=model: _forward(m, low)
    result["error"] = error([given["ours"]().float()], [want])
    if not result["error"] < _BOUNDS[INFERENCE]:
        return
    run = given.pop("ours")
    held = {name: getattr(model, "packed_nbytes", 0) for name, model in models.items()}
    options: dict[str, Any] = {"latency": len(images) <= 32, "graphs": False}
    result |= race.run(run, given, device, held=lambda name: held.get(name, 0), **options)


def frozen_by(model: CrossViT, backend: str, dependent: bool, images: Tensor) -> CrossViT:
    """A copy that is frozen so, its graph recorded; one that cannot be is called without."""
    always = mock.patch.object(PackedOnGpu, "launches_dependently", return_value=dependent)
    with use_backend(backend), always:
        frozen = copy.deepcopy(model).unfreeze().freeze()
        for _ in range(2):  # the second call records the graph
            _forward(frozen, images)
    return frozen


def _compiles(name: str, call: Callable[[], object], result: Result) -> bool:
    """Whether a compiled rival runs; if not, the result has why, and the others are measured."""
    reason: Result = {}
    with failing(reason):
        call()
    if reason:
        result[f"not run {name}"] = reason["failed"]
    return not reason


def _forward(model: Any, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images)


def _training(ours: CrossViT, rival: nn.Module, images: Tensor, compiled: bool, result: Result) -> None:
    device = images.device
    labels = torch.arange(len(images), device=device) % 1000

    def step_of(model: Any) -> Callable[[], Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")

        def step() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    steps = {"ours": step_of(ours.train()), "timm": step_of(rival.train())}
    for name, options in COMPILERS.items() if compiled else ():
        torch.compiler.reset()
        step = step_of(torch.compile(rival, **options))
        if _compiles(name, step, result):
            steps[name] = step
    mine, theirs = (steps[name]() for name in ("ours", "timm"))
    result["error"] = error([mine], [theirs])
    if not result["error"] < _BOUNDS[TRAINING]:
        return
    run = steps.pop("ours")
    result |= race.run(run, steps, device, given=[*ours.parameters(), *rival.parameters()])


def words(result: Mapping[str, Any]) -> str:
    """The result cell of a measurement."""
    if "failed" in result:
        return f"FAILED: {result['failed'].splitlines()[0][:100]}".replace("|", "/")
    if "ours_seconds" not in result:
        return f"WRONG: relative error {result['error']:.1e}"
    rate, own = result["images"] / result["ours_seconds"], result["peak_bytes"]["ours"]
    text = f"{rate:,.0f} images/s"
    if latency := result.get("latency", {}).get("ours"):
        text += ", latency " + ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in latency.items())
    rivals = [key.removeprefix("against ") for key in result if key.startswith("against ")]
    ratios = [f"{name} {result[f'against {name}']['ratio']:.2f}" for name in rivals]
    text += f"; times as long as ours: {', '.join(ratios)}" if ratios else ""
    text += f"; peak memory {own / 1e9:.2f} GB, " + ", ".join(
        f"{name} {result['peak_bytes'][name] / 1e9:.2f}" for name in rivals
    )
    if energy := result.get("joules"):
        per_image = ", ".join(f"{name} {1e3 * x / result['images']:.1f}" for name, x in energy.items() if x)
        text += f"; mJ an image: {per_image}"
    return text


def _targets() -> Iterator[Target]:
    def ratio(case: ModelCase, rival: str, least: float) -> Target:
        return Target(
            f"{case.name}: at least {least} times {rival}",
            case.name,
            lambda r: r[f"against {rival}"]["ratio"] >= least,
        )

    large, one, step = ModelCase(INFERENCE, 256), ModelCase(INFERENCE, 1), ModelCase(TRAINING, 256)
    yield from (ratio(large, "timm", 1.5), ratio(large, "max-autotune", 1.2))
    yield from (ratio(one, "timm", 4.0), ratio(one, "max-autotune", 1.5), ratio(step, "timm", 1.8))
    yield Target(
        f"{step.name}: at most 0.6 times the peak memory of timm",
        step.name,
        lambda r: r["peak_bytes"]["ours"] <= 0.6 * r["peak_bytes"]["timm"],
    )


MODEL_TARGETS = tuple(_targets())
