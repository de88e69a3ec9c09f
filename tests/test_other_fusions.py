"""The fusions that cross-attention is compared with, Eq. 3 and 4 written out; and variants of Eq. 5-7."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from crossvit.encoder import FUSIONS
from crossvit.other_fusions import ClassTokenFusion, PairwiseFusion
from tests.models import exact, image, small, small_model, trained
from tests.operations import relative_error

OTHERS = ("class", "pairwise", "none")


def projected(x: Tensor, module: nn.Module) -> Tensor:
    """LayerNorm, GELU, Linear, by functions."""
    norm, _, linear = module
    return F.linear(
        F.gelu(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6)), linear.weight, linear.bias
    )


def fusion(kind: type[ClassTokenFusion]) -> ClassTokenFusion:
    made = kind((6, 10), lambda width, **factory: nn.LayerNorm(width, eps=1e-6, **factory)).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return made


def test_class_tokens_are_added():
    made = fusion(ClassTokenFusion)
    small_tokens, large_tokens = torch.randn(2, 17, 6).double(), torch.randn(2, 10, 10).double()
    got = made([small_tokens, large_tokens])
    total = projected(small_tokens[:, 0], made.projs[0]) + large_tokens[:, 0]
    assert relative_error(got[1][:, 0], total) < 1e-14
    assert relative_error(got[0][:, 0], projected(total, made.revert_projs[0])) < 1e-14
    assert torch.equal(got[0][:, 1:], small_tokens[:, 1:])
    assert torch.equal(got[1][:, 1:], large_tokens[:, 1:])


@pytest.mark.parametrize("grids", [((4, 4), (3, 3)), ((3, 5), (2, 4)), ((2, 3), (2, 3))])
def test_all_tokens_are_added(grids):
    """Resized by the weights of linear interpolation, an axis at a time."""

    def weights(old: int, new: int) -> Tensor:
        at = ((torch.arange(new).double() + 0.5) * old / new - 0.5).clamp(0, old - 1)
        low = at.floor().long().clamp(max=old - 1)
        w = torch.zeros(new, old).double()
        w[torch.arange(new), low] += 1 - (at - low)
        w[torch.arange(new), (low + 1).clamp(max=old - 1)] += at - low
        return w

    def moved(x: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
        patches = x[:, 1:].unflatten(1, old)
        patches = torch.einsum("ih,jw,bhwc->bijc", weights(old[0], new[0]), weights(old[1], new[1]), patches)
        return torch.cat((x[:, :1], patches.flatten(1, 2)), 1)

    made = fusion(PairwiseFusion)
    small_tokens, large_tokens = (
        torch.randn(2, 1 + h * w, c).double() for (h, w), c in zip(grids, (6, 10), strict=True)
    )
    got = made([small_tokens, large_tokens], grids)
    f = projected(small_tokens, made.projs[0])
    assert relative_error(got[1], large_tokens + moved(f, *grids)) < 1e-13
    assert (
        relative_error(got[0], projected(f + moved(large_tokens, *grids[::-1]), made.revert_projs[0])) < 1e-13
    )
    if grids == ((4, 4), (3, 3)):
        assert all(torch.equal(a, b) for a, b in zip(made([small_tokens, large_tokens]), got, strict=True))


def test_patches_that_make_no_square_need_their_grids():
    with pytest.raises(ValueError, match=r"grids must be given for patches .* got \[15, 9\] of them"):
        fusion(PairwiseFusion)([torch.randn(1, 16, 6).double(), torch.randn(1, 10, 10).double()])


@pytest.mark.parametrize("kind", FUSIONS)
def test_gradients_and_training(kind):
    model = small_model(fusion=kind, depth=((1, 1, 0),) * 2).double()
    x = torch.randn(2, 3, 48, 48).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: model(y)[:, :2], (x,), fast_mode=True)
    model = small_model(fusion=kind, drop_path_rate=0.1).train()
    losses = trained(model, steps=12)
    assert losses[-1] < 0.5 * losses[0]


class Copies(TorchDispatchMode):
    """Counts bytes that are written by operations that only move or clear tensors."""

    MOVES = (
        "cat",
        "clone",
        "copy_",
        "zeros",
        "zero_",
        "new_zeros",
        "slice_backward",
        "split_with_sizes_backward",
    )

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.MOVES:
            self.bytes += result.nbytes
        return result


@pytest.mark.parametrize("kind", [ClassTokenFusion, PairwiseFusion])
def test_tokens_are_moved_once_each_way(kind):
    """Into the result, and into the gradient. The rest are rows of CLS tokens."""
    made = fusion(kind).float()
    tokens = [torch.randn(2, 1 + p, c, requires_grad=True) for p, c in ((400, 6), (196, 10))]
    of_tokens = sum(x.nbytes for x in tokens)
    with Copies() as forward:
        total = sum((y * y).sum() for y in made(tokens))
    with Copies() as backward:
        total.backward()
    assert of_tokens <= forward.bytes < 1.01 * of_tokens
    least = of_tokens
    if kind is PairwiseFusion:  # S's tokens are projected to 10 channels before they are split; and the
        # gradient of its patches' results is taken out of that of all rows for the matrix product.
        least = 2 * 4 * (401 * 10 + 197 * 10 + 400 * 6)
    assert least <= backward.bytes < 1.01 * least


def test_all_attention_keeps_to_modules_that_were_changed():
    """It calls the package's operation for what is as built."""
    model = small(fusion="all")
    tokens = [torch.randn(2, 17, 24), torch.randn(2, 10, 48)]
    made = model.blocks[0].fusion
    seen = []
    with torch.no_grad():
        want = made(tokens)
        handle = made.attn.register_forward_hook(lambda *call: seen.append(call[2]))
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(made(tokens), want, strict=True))
        handle.remove()
        with torch.nn.modules.module.register_module_forward_hook(lambda *call: seen.append(call[0])):
            made(tokens)
    assert len(seen) > 1
    assert made.attn in seen[1:]
    made.attn.attn_drop.p = 0.5
    assert relative_error(made.train()(tokens)[0], want[0]) > 1e-4
    assert made.eval() is made
    usual, made.attn = made.attn, nn.Identity()
    assert made(tokens)[0].shape == want[0].shape
    made.attn = usual
    made.attn.scale = 0.0
    assert relative_error(made(tokens)[0], want[0]) > 1e-4


@pytest.mark.parametrize("kind", OTHERS)
def test_whole_models(kind):
    """Without a gradient by native blocks, and everything else that takes tokens of both branches."""
    model = small(fusion=kind, dynamic_img_size=True)
    for size in ((48, 48), (48, 84), (60, 49)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert relative_error(model(x), exact(model, x)) < 1e-5
            shapes = [y.shape for y in model.forward_features(x)]
            assert shapes == [
                (2, 1 + h * w, c) for (h, w), c in zip(model.grid_sizes(size), (24, 48), strict=True)
            ]
            _, maps = model.forward_intermediates(x)
            assert len(maps) == 4
    model.set_grad_checkpointing()
    assert relative_error(model.train()(x), model.eval()(x)) < 1e-5
    with pytest.raises(RuntimeError, match=r"the fusion of blocks\.0 is not one cross-attention"):
        model.freeze()
    with pytest.raises(RuntimeError, match='need a model with fusion="cross"'):
        model.get_attention_maps(x)
    compiled = torch.compile(model.eval(), fullgraph=True, backend="eager")
    assert relative_error(compiled(x), exact(model, x)) < 1e-5


def test_without_a_fusion_branches_do_not_meet():
    model = small(fusion="none")
    x = image(model)
    before = [y.detach() for y in model.forward_branches(x)]
    with torch.no_grad():
        for p in model.blocks[0].blocks[0].parameters():
            p.mul_(1.5)
    after = model.forward_branches(x)
    assert torch.equal(after[1], before[1])
    assert not torch.allclose(after[0], before[0])


@pytest.mark.parametrize("options", [{}, {"fusion": "class"}, {"global_pool": "avg"}])
def test_logits_are_the_mean_of_the_branches(options):
    model = small(**options)
    x = image(model)
    of_branches = model.forward_branches(x)
    assert [y.shape for y in of_branches] == [(2, 5), (2, 5)]
    assert relative_error(sum(of_branches) / 2, model(x)) < 1e-5
    for b, (y, norm, head) in enumerate(zip(of_branches, model.norm, model.head, strict=True)):
        tokens = model._encode(model._embed(x), grids=model._grids(x))[b]
        pooled = norm(tokens)[:, 1:].mean(1) if options.get("global_pool") else norm(tokens)[:, 0]
        assert relative_error(y, head(pooled)) < 1e-6
    with pytest.raises(RuntimeError, match="the model has no heads"):
        small(num_classes=0).forward_branches(x)


# Variants of cross-attention


def test_equal_widths_need_no_projections():
    options: dict[str, Any] = {"embed_dim": (24, 24), "identity_projections": True}
    model, usual = small(**options), small(embed_dim=(24, 24))
    assert not any("projs" in name for name in model.state_dict())
    assert any("projs" in name for name in usual.state_dict())
    assert any("projs" in name for name in small(identity_projections=True).state_dict())  # widths differ
    tokens = [torch.randn(2, 17, 24), torch.randn(2, 10, 24)]
    got = model.blocks[0].fuse(tokens)
    for b, block in enumerate(model.blocks[0].fusion):
        assert relative_error(got[b][:, :1], block(tokens[b][:, :1], tokens[1 - b][:, 1:])) < 1e-6
        assert torch.equal(got[b][:, 1:], tokens[b][:, 1:])


@pytest.mark.parametrize("again", [False, True])
def test_later_cross_attentions_see_the_patches_where_asked(again):
    encoder = small(depth=((1, 1, 2),), attends_again=again).blocks[0]
    tokens = [torch.randn(2, 17, 24), torch.randn(2, 10, 48)]
    got = encoder.fuse(tokens)
    for b in range(2):
        cls, patches = encoder.projs[b](tokens[b][:, :1]), tokens[1 - b][:, 1:]
        first, second = encoder.fusion[b]
        cls = first(cls, patches)
        cls = second(cls, patches if again else patches[:, :0])
        assert relative_error(got[b][:, :1], encoder.revert_projs[b](cls)) < 1e-6
