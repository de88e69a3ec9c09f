"""The models against timm's, on the same weights: logits, features, gradients, training, autocast."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from crossvit import create_model, list_models
from tests.operations import relative_error

RELEASED = list_models(pretrained=True)


def pair(name: str, **kwargs: object) -> tuple[nn.Module, nn.Module]:
    """(ours, timm's) on one copy of the weights, away from the initial ones so that nothing is trivial."""
    theirs = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    with torch.device("meta"):  # without the time and the memory that initial weights take
        ours = create_model(name, **kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours, theirs


def image(model: nn.Module, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, *model.img_size)


def parameter_gradients(model: nn.Module, x: Tensor, seed: int = 7) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if name.endswith("attn.wk.bias"):
            assert torch.equal(ours[name], torch.zeros_like(gradient)), f"{name}: exact gradient is zero"
        else:
            assert relative_error(ours[name], gradient) < bound, name


@pytest.mark.parametrize("name", RELEASED)
def test_same_state_dict_logits_and_gradients(name):
    ours, theirs = pair(name)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert [x.shape for x in mine.values()] == [x.shape for x in other.values()]
    x = image(ours.eval())
    theirs.eval()
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-5
    assert_same_gradients(parameter_gradients(ours, x), parameter_gradients(theirs, x), 1e-4)


@pytest.mark.parametrize("name", RELEASED)
def test_same_gradients_in_training_under_one_seed(name):
    rates = {"drop_path_rate": 0.3, "proj_drop_rate": 0.2, "drop_rate": 0.1, "pos_drop_rate": 0.1}
    ours, theirs = pair(name, **rates)
    x = image(ours, batch=2)
    ours.train(), theirs.train()
    assert_same_gradients(parameter_gradients(ours, x), parameter_gradients(theirs, x), 1e-4)


def test_exact_in_float64():
    ours, theirs = pair("crossvit_9_240")
    ours, theirs = ours.double().eval(), theirs.double().eval()
    x = image(ours).double()
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-12


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in RELEASED), ("crossvit_tiny_240", torch.float16)]
)
def test_under_autocast_as_close_to_float64_as_timm(name, dtype):
    ours, theirs = pair(name)
    ours.eval(), theirs.eval()
    x = image(ours, batch=2)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=dtype):
            mine, other = ours(x), theirs(x)
        exact = ours.double()(x.double())
    assert mine.dtype == other.dtype
    # Both are one draw of rounding noise; a quarter more is allowed than theirs.
    assert (mine - exact).square().mean().sqrt() < 1.25 * (other - exact).square().mean().sqrt()


def test_gradients_under_autocast():
    ours, theirs = pair("crossvit_9_240")
    ours.eval(), theirs.eval()
    x = image(ours, batch=2)
    exact = create_model("crossvit_9_240").double().eval()
    exact.load_state_dict(ours.state_dict())
    truth = parameter_gradients(exact, x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = parameter_gradients(ours, x)
        other = parameter_gradients(theirs, x)
    for name, gradient in truth.items():
        if name.endswith("attn.wk.bias"):
            continue
        assert mine[name].dtype == torch.float32
        error, theirs_error = (
            (g - gradient).norm() / gradient.norm() for g in (mine[name].double(), other[name].double())
        )
        assert error < 2 * theirs_error + 4e-3, name


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_low_precision_weights(kind):
    ours, theirs = pair("crossvit_9_240")
    x = image(ours)
    with torch.no_grad():
        exact = theirs.eval()(x)
        mine, other = (getattr(m.eval(), kind)()(getattr(x, kind)()) for m in (ours, theirs))
    assert mine.dtype == other.dtype
    step = torch.finfo(mine.dtype).eps
    assert relative_error(mine, exact) <= 2 * relative_error(other, exact) + step


def test_features_and_head():
    ours, theirs = pair("crossvit_9_240")
    ours.eval(), theirs.eval()
    x = image(ours, batch=2)
    with torch.no_grad():
        for mine, other in zip(ours.forward_features(x), theirs.forward_features(x), strict=True):
            assert relative_error(mine, other) < 1e-5
        features = ours.forward_features(x)
        for pre_logits in (False, True):
            want = theirs.forward_head(theirs.forward_features(x), pre_logits=pre_logits)
            assert relative_error(ours.forward_head(features, pre_logits=pre_logits), want) < 1e-5


@pytest.mark.parametrize("global_pool", ["token", "avg"])
@pytest.mark.parametrize("num_classes", [1000, 7, 0])
def test_pools_and_classes(global_pool, num_classes):
    ours, theirs = pair("crossvit_tiny_240", global_pool=global_pool, num_classes=num_classes)
    x = image(ours.eval())
    with torch.no_grad():
        assert relative_error(ours(x), theirs.eval()(x)) < 1e-5


@pytest.mark.parametrize("options", [{"crop_scale": True}, {"in_chans": 1}, {"qkv_bias": False}])
def test_other_options(options):
    ours, theirs = pair("crossvit_tiny_240", **options)
    x = torch.randn(1, options.get("in_chans", 3), 240, 240)
    with torch.no_grad():
        assert relative_error(ours.eval()(x), theirs.eval()(x)) < 1e-5


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"indices": 2},
        {"indices": [0, 4], "norm": True, "stop_early": True},
        {"indices": [1, -1], "output_fmt": "NLC", "intermediates_only": True},
    ],
)
def test_intermediates(arguments):
    ours, theirs = pair("crossvit_9_240")
    x = image(ours.eval())
    theirs.eval()
    with torch.no_grad():
        mine, other = (m.forward_intermediates(x, **arguments) for m in (ours, theirs))

    def flat(result):
        return [*result[0], *result[1]] if isinstance(result, tuple) else result

    assert len(flat(mine)) == len(flat(other))
    for a, b in zip(flat(mine), flat(other), strict=True):
        assert relative_error(a, b) < 1e-5


def test_intermediates_are_not_overwritten_later():
    """What was handed out keeps its values while the later encoders run."""
    ours, _ = pair("crossvit_9_240")
    x = image(ours.eval())
    with torch.no_grad():
        every = ours.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        for index, feature in enumerate(every):
            alone = ours.forward_intermediates(
                x, [index], output_fmt="NLC", intermediates_only=True, stop_early=True
            )
            assert torch.equal(feature, alone[0])


def test_a_hook_keeps_what_it_was_handed():
    ours, theirs = pair("crossvit_9_240")
    ours.eval(), theirs.eval()
    x = image(ours)
    caught: dict[str, Tensor] = {}
    for label, model in (("ours", ours), ("theirs", theirs)):
        for k in range(3):
            for b in range(2):
                blocks = model.blocks[k].blocks[b]
                blocks.register_forward_hook(
                    lambda m, i, out, key=f"{k}.{b}", label=label: caught.__setitem__(f"{label}.{key}", out)
                )
    with torch.no_grad():
        ours(x), theirs(x)
    for key in [key for key in caught if key.startswith("ours")]:
        assert relative_error(caught[key], caught[key.replace("ours", "theirs")]) < 1e-5


def test_timm_tools_accept_the_model():
    from timm.data import resolve_model_data_config
    from timm.optim import param_groups_layer_decay

    ours, theirs = pair("crossvit_15_dagger_408")
    assert resolve_model_data_config(ours) == resolve_model_data_config(theirs)
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.feature_info == theirs.feature_info
    shapes = [[len(g["params"]) for g in param_groups_layer_decay(m)] for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.default_cfg is ours.pretrained_cfg
    for mine, other in zip(ours.patch_embed, theirs.patch_embed, strict=True):
        assert (mine.img_size, mine.patch_size, mine.num_patches) == (
            other.img_size,
            other.patch_size,
            other.num_patches,
        )
    for name in ("num_classes", "in_chans", "num_features", "head_hidden_size", "num_branches", "img_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(map(tuple, ours.img_size_scaled)) == list(map(tuple, theirs.img_size_scaled))


def test_names_and_arguments_as_timms_scripts_give_them():
    model = create_model("crossvit_tiny_240.in1k", drop_path_rate=None, num_classes=None, global_pool="avg")
    assert model.num_classes == 1000
    assert model.global_pool == "avg"


def test_pruning():
    ours, theirs = pair("crossvit_9_240")
    assert ours.prune_intermediate_layers([0, 4], prune_norm=True) == theirs.prune_intermediate_layers(
        [0, 4], prune_norm=True
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
