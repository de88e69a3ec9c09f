"""The whole model against timm's, against itself with the eager fusion, and against all-attention fusion."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.conftest import Race, assert_close, large
from crossvit import create_model, list_models
from crossvit._timm import import_timm

ON_GPU = torch.cuda.is_available()
SIZES = [("crossvit_18_240", 1), ("crossvit_9_240", 8)]
FORWARD, TRAINING = "forward", ("training", "training, autocast")
CASES = [(*SIZES[0], mode) for mode in (FORWARD, *TRAINING)]
CASES += [(*SIZES[1], mode) for mode in (FORWARD, TRAINING[0])] + [large(*SIZES[1], TRAINING[1])]
# All variants, and batches until a GPU is full. A CPU of two cores trains 256 images in a minute.
CASES += [
    large(name, 256 if ON_GPU else 1, mode)
    for name in list_models()
    for mode in (FORWARD, *TRAINING)
    if (name, 1) not in SIZES
]
CASES += [large("crossvit_18_240", batch, FORWARD) for batch in (8, 32, 256)]
CASES += [large("crossvit_18_240", batch, mode) for batch in (8, 256)[: 1 + ON_GPU] for mode in TRAINING]


@pytest.mark.parametrize(("name", "batch", "mode"), CASES, ids=lambda value: str(value))
@pytest.mark.benchmark(group="model")
def test_model(name, batch, mode, device, race: Race, benchmark, request):
    torch.manual_seed(0)
    benchmark.extra_info["images"] = batch
    ours = create_model(name)
    models = {
        "timm": import_timm().create_model(name),
        "eager fusion": create_model(name, backend="reference"),
        "all-attention": create_model(name, fusion="all"),
    }
    for rival in ("timm", "eager fusion"):
        models[rival].load_state_dict(ours.state_dict())
    for model in (ours, *models.values()):
        model.eval().to(device)
    image = torch.randn(batch, 3, *ours.img_size, device=device)

    def forward(model: nn.Module) -> list[Tensor]:
        with torch.inference_mode():
            return [model(image)]

    autocast = mode.endswith("autocast")

    def training(model: nn.Module) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = model(image)
        return [logits, *torch.autograd.grad(logits.float().square().mean(), list(model.parameters()))]

    if ON_GPU or request.config.getoption("--full"):  # on a CPU, test_cpu.py compiles for the default run
        torch.compiler.reset()
        models["torch.compile"] = torch.compile(models["timm"])
    run = forward if mode == "forward" else training
    # On a GPU the convolutions may be computed in tf32. In bfloat16 gradients sum the rounding of all layers.
    bound = 0.5 if autocast else 1e-4 if device.type == "cpu" else 1e-2
    assert_close(run(ours), run(models["timm"]), bound)
    given = None if mode == "forward" else [p for m in (ours, *models.values()) for p in m.parameters()]
    race(
        lambda: run(ours),
        {name: (lambda m=model: run(m)) for name, model in models.items()},
        given,
        latency=mode == "forward",
        held=lambda name: getattr(ours if name == "ours" else models[name], "packed_nbytes", 0),
    )
