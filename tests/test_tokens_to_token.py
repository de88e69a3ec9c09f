"""T2T tokens and models without CLS tokens: the paper's text has their accuracy, and nothing else of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossvit import create_model
from crossvit.paper import count
from crossvit.tokens_to_token import SOFT_SPLITS, SoftSplit, TokensToToken
from crossvit.weights import load_weights
from crossvit_kernels import use_backend
from tests.models import exact, image, small, small_model, trained
from tests.operations import relative_error

BOTH = ({"t2t": True}, {"class_token": False})


def stem(patch: int, width: int = 10, channels: int = 3) -> TokensToToken:
    made = TokensToToken(patch, channels, width, lambda c, **k: torch.nn.LayerNorm(c, eps=1e-6, **k)).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return made


def by_loops(tokens: Tensor, split: SoftSplit) -> Tensor:
    """[B, C, height, width] -> windows [B, N, C * kernel * kernel], one after the other."""
    kernel, stride, padding = split
    padded = F.pad(tokens, (padding,) * 4)
    rows = range(0, padded.shape[2] - kernel + 1, stride)
    columns = range(0, padded.shape[3] - kernel + 1, stride)
    windows = [padded[:, :, r : r + kernel, c : c + kernel].flatten(1) for r in rows for c in columns]
    return torch.stack(windows, dim=1)


def transformed(x: Tensor, module: torch.nn.Module) -> Tensor:
    """One head of 64 channels, written out."""

    def norm(x: Tensor, of: torch.nn.LayerNorm) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], of.weight, of.bias, 1e-6)

    def linear(x: Tensor, of: torch.nn.Linear) -> Tensor:
        return F.linear(x, of.weight, of.bias)

    q, k, v = linear(norm(x, module.norm1), module.qkv).split(64, dim=-1)
    x = v + linear((q @ k.mT / x.shape[-1] ** 0.5).softmax(-1) @ v, module.proj)
    return x + linear(F.gelu(linear(norm(x, module.norm2), module.mlp.fc1)), module.mlp.fc2)


@pytest.mark.parametrize(("patch", "size"), [(12, (48, 36)), (12, (59, 40)), (16, (32, 48)), (16, (47, 33))])
def test_against_windows_written_out(patch, size):
    """A remainder below one patch is not seen."""
    made = stem(patch)
    x = torch.randn(2, 3, *size).double()
    got = made(x)
    rows, columns = (pixels // patch for pixels in size)
    tokens = x[..., : rows * patch, : columns * patch]
    for split, module, stride in zip(made.splits, made.transformers, (4, patch), strict=False):
        tokens = transformed(by_loops(tokens, split), module).mT
        grid = (rows * patch // stride, columns * patch // stride)
        if stride == patch and patch == 16:
            grid = (rows * 2, columns * 2)
        tokens = tokens.unflatten(2, grid)
    want = F.linear(by_loops(tokens, made.splits[2]), made.proj.weight, made.proj.bias)
    assert got.shape == (2, rows * columns, 10)
    assert relative_error(got, want) < 1e-13


@pytest.mark.parametrize("patch", SOFT_SPLITS)
def test_splits_cover_a_patch_and_overlap(patch):
    splits = SOFT_SPLITS[patch]
    assert torch.tensor([split.stride for split in splits]).prod() == patch
    assert all(split.kernel > split.stride for split in splits)


def test_published_kernels_of_patches_of_16():
    assert [(kernel, stride) for kernel, stride, _ in SOFT_SPLITS[16]] == [(7, 4), (3, 2), (3, 2)]


def test_recount_of_crossvit_18():
    """Parameters and multiply-accumulates beyond those of the model without, by hand."""

    def tokens(patch: int, tokens_1: int, tokens_2: int, patches: int, width: int) -> tuple[int, int]:
        first, second, last = 3 * 49, 64 * (25 if patch == 12 else 9), 64 * 9
        parameters, macs = 0, 0
        for inputs, rows in ((first, tokens_1), (second, tokens_2)):
            parameters += 2 * inputs + 3 * 64 * inputs + 3 * (64 * 64 + 64) + 2 * 64
            macs += rows * (3 * 64 * inputs + 3 * 64 * 64) + 2 * rows * rows * 64
        convolution = 3 * patch * patch
        return parameters + (last - convolution) * width, macs + (last - convolution) * width * patches

    extra = (tokens(12, 3600, 400, 400, 224), tokens(16, 3136, 784, 196, 448))
    plain = count(create_model("crossvit_18", device="meta").eval())
    found = count(create_model("crossvit_18", device="meta", t2t=True).eval())
    assert found.parameters - plain.parameters == sum(parameters for parameters, _ in extra)
    assert found.gmacs - plain.gmacs == pytest.approx(sum(macs for _, macs in extra) / 1e9, abs=1e-9)


def test_without_cls_tokens_their_parameters_are_gone():
    plain = count(create_model("crossvit_small", device="meta").eval())
    found = count(create_model("crossvit_small", device="meta", class_token=False).eval())
    assert plain.parameters - found.parameters == 2 * (192 + 384)  # CLS tokens, and their positions
    assert found.gmacs == plain.gmacs


@pytest.mark.parametrize("fusion", ["cross", "all", "class", "pairwise", "none"])
def test_the_mean_of_the_patches_is_the_query(fusion):
    """Whatever stands in row 0 before a fusion; the usual fusion with the mean there."""
    model = small(fusion=fusion, class_token=False, depth=((1, 1, 0),))
    encoder = model.blocks[0]
    tokens = [torch.randn(2, 17, 24), torch.randn(2, 10, 48)]
    got = encoder.fuse(tokens)
    encoder.class_token = True
    means = [torch.cat((x[:, 1:].mean(1, keepdim=True), x[:, 1:]), 1) for x in tokens]
    for mine, want in zip(got, encoder.fuse(means), strict=True):
        assert torch.equal(mine, want)


def test_without_cls_tokens_the_model_begins_with_the_mean():
    model = small(class_token=False)
    x = image(model)
    for b, tokens in enumerate(model._embed(x)):
        patches = model.patch_embed[b](model._scale_image(x, model.img_size_scaled[b])) + model._position(b)
        assert relative_error(tokens, torch.cat((patches.mean(1, keepdim=True), patches), 1)) < 1e-6


@pytest.mark.parametrize("options", BOTH, ids=str)
def test_gradients_and_training(options):
    model = small_model(depth=((1, 1, 0),) * 2, **options).double()
    x = torch.randn(2, 3, 48, 48).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: model(y)[:, :2], (x,), fast_mode=True)
    model = small_model(drop_path_rate=0.1, **options).train()
    losses = trained(model, steps=15)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("options", BOTH, ids=str)
def test_whole_models(options):
    model = small(dynamic_img_size=True, **options)
    for size in ((48, 48), (48, 84), (60, 49)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert relative_error(model(x), exact(model, x)) < 1e-5
            shapes = [y.shape for y in model.forward_features(x)]
            grids = model.grid_sizes(size)
            assert shapes == [(2, 1 + h * w, c) for (h, w), c in zip(grids, (24, 48), strict=True)]
            maps = model.get_attention_maps(x)[0]
            assert (maps.small.shape[2:], maps.large.shape[2:]) == (grids[1], grids[0])
    with pytest.raises(RuntimeError, match=r"no CLS tokens|T2T tokens"):
        model.freeze()
    compiled = torch.compile(model.eval(), fullgraph=True, backend="eager")
    assert relative_error(compiled(x), exact(model, x)) < 1e-5
    state = {name: p.clone() for name, p in model.state_dict().items()}
    small(dynamic_img_size=True, **options).load_state_dict(state)
    model.set_input_size(96)
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 5)
    model.reset_classifier(7)
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 7)
    assert {"pos_embed_0", "pos_embed_1"} <= model.no_weight_decay() <= set(dict(model.named_parameters()))


def test_what_a_change_of_the_flag_does_is_noticed():
    model = small()
    x = image(model)
    with torch.no_grad():
        before = model(x)
        for encoder in model.blocks:
            encoder.class_token = False
        assert relative_error(model(x), exact(model, x)) < 1e-5
        assert relative_error(before, exact(model, x)) > 1e-4


@pytest.mark.parametrize("options", [{"t2t": True}, {"fusion": "all"}])
def test_a_backend_that_has_no_self_attention_leaves_it_to_pytorch(options):
    model = small(backend="reference", **options)
    x = image(model)
    with torch.no_grad(), use_backend("cuda"):
        assert relative_error(model(x), exact(model, x)) < 1e-5


def test_weights_of_other_models_are_refused_in_words(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(small().state_dict(), path)
    with pytest.raises(ValueError, match="cls_token_0"):
        load_weights(small(class_token=False), path)
    torch.save(small(class_token=False).state_dict(), path)
    with pytest.raises(ValueError, match="cls_token_0"):
        load_weights(small(), path)
    for options, name in (({"t2t": True}, "t2t"), ({"fusion": "all"}, "fusion")):
        with pytest.raises(ValueError, match=f"no weights were released for models with another {name}"):
            create_model("crossvit_9", pretrained=True, **options)
        assert create_model("crossvit_9", device="meta", **options).default_cfg["hf_hub_id"] is None


def test_wrong_arguments():
    with pytest.raises(ValueError, match="multi_conv and t2t exclude each other"):
        create_model("crossvit_18_dagger", t2t=True, device="meta")
    with pytest.raises(ValueError, match="t2t knows patch sizes 12 and 16, got 8"):
        small_model(patch_size=(8, 16), t2t=True)
