"""The whole model against timm's, against itself with the eager fusion, and against all-attention fusion."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.conftest import Race, assert_close, large
from crossvit import create_model
from crossvit._timm import import_timm

CASES = [("crossvit_18_240", 1), ("crossvit_9_240", 8)]
CASES += [large("crossvit_18_240", 8), large("crossvit_18_dagger_408", 1), large("crossvit_base_240", 8)]


@pytest.mark.parametrize("mode", ["forward", "training", "training, autocast"])
@pytest.mark.parametrize(("name", "batch"), CASES, ids=lambda value: str(value))
@pytest.mark.benchmark(group="model")
def test_model(name, batch, mode, device, race: Race):
    torch.manual_seed(0)
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

    run = forward if mode == "forward" else training
    # On a GPU the convolutions may be computed in tf32. In bfloat16 gradients sum the rounding of all layers.
    bound = 0.5 if autocast else 1e-4 if device.type == "cpu" else 1e-2
    assert_close(run(ours), run(models["timm"]), bound)
    race(lambda: run(ours), {name: (lambda m=model: run(m)) for name, model in models.items()})
