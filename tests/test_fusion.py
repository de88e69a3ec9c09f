"""The fusions and the encoder: Eq. 2 by hand, several cross-attentions in a row, maps, buffers in place."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from crossvit import CrossViT, create_model
from crossvit.fusion import with_cls
from tests.models import small_model
from tests.operands import relative_error


def test_all_attention_is_equation_2():
    """Written out with PyTorch's own multi-head attention."""
    fusion = small_model(fusion="all").double().blocks[0].fusion
    small, large = torch.randn(2, 17, 24).double(), torch.randn(2, 5, 48).double()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        got = fusion([small, large])

        y = torch.cat((fusion.projs[1](large), fusion.projs[0](small)), 1)
        n = F.layer_norm(y, (48,), fusion.norm1.weight, fusion.norm1.bias, 1e-6)
        msa = nn.MultiheadAttention(48, 3, batch_first=True).double()
        msa.in_proj_weight.copy_(fusion.attn.qkv.weight)
        msa.in_proj_bias.copy_(fusion.attn.qkv.bias)
        msa.out_proj.weight.copy_(fusion.attn.proj.weight)
        msa.out_proj.bias.copy_(fusion.attn.proj.bias)
        o = y + msa(n, n, n)[0]
        want = [fusion.revert_projs[0](o[:, 5:]), fusion.revert_projs[1](o[:, :5])]
    for mine, other in zip(got, want, strict=True):
        assert relative_error(mine, other) < 1e-13


def test_all_attention_trains():
    model = small_model(fusion="all", drop_path_rate=0.1).train()
    model(torch.randn(2, 3, 48, 48)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_several_cross_attentions_in_a_row_as_the_released_code_has_them():
    """The second sees the CLS token alone; parameters gain an index, as timm's do."""
    shape = {
        "img_size": 240,
        "embed_dim": (96, 192),
        "num_heads": (3, 3),
        "depth": ((1, 2, 2),) * 2,
        "mlp_ratio": (2, 2, 1),
        "img_scale": (1.0, 224 / 240),
        "patch_size": (12, 16),
    }
    theirs = timm.models.crossvit.CrossVit(**shape).eval()
    ours = CrossViT(**shape).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert "blocks.0.fusion.0.1.attn.wq.weight" in ours.state_dict()
    x = torch.randn(1, 3, 240, 240)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-5
        assert [m.small.shape for m in ours.get_attention_maps(x)] == [(1, 3, 14, 14)] * 2


def test_attention_maps_are_those_of_timms_modules():
    ours, theirs = create_model("crossvit_tiny").eval(), timm.create_model("crossvit_tiny_240").eval()
    theirs.load_state_dict(ours.state_dict())
    caught = []

    def hook(module, args, kwargs=None):
        x = args[0]
        b, n, _ = x.shape
        q = module.wq(x[:, :1]).view(b, 1, module.num_heads, -1).transpose(1, 2)
        k = module.wk(x).view(b, n, module.num_heads, -1).transpose(1, 2)
        caught.append((q @ k.mT * module.scale).softmax(-1)[:, :, 0, 1:])

    for encoder in theirs.blocks:
        for fusion in encoder.fusion:
            fusion.attn.register_forward_pre_hook(hook)
    x = torch.randn(2, 3, 240, 240)
    with torch.no_grad():
        theirs(x)
        maps = [m for pair in ours.get_attention_maps(x) for m in pair]
    assert [m.shape for m in maps] == [(2, 3, 14, 14), (2, 3, 20, 20)] * 3
    for mine, other in zip(maps, caught, strict=True):
        assert relative_error(mine.flatten(2), other) < 1e-5


def test_attention_maps_need_cross_attention():
    with pytest.raises(RuntimeError, match='need a model with fusion="cross"'):
        small_model(fusion="all").get_attention_maps(torch.zeros(1, 3, 48, 48))


def test_row_0_is_replaced_in_place_only_where_nobody_can_notice():
    tokens, cls = torch.randn(2, 5, 8), torch.randn(2, 1, 8)
    want = torch.cat((cls, tokens[:, 1:]), 1)
    kept = tokens.clone()
    for owned in (False, True):
        assert torch.equal(with_cls(tokens, cls, owned), want)
        assert torch.equal(tokens, kept), "gradients are recorded, so nothing may be written"
    with torch.no_grad():
        assert torch.equal(with_cls(tokens, cls, owned=False), want)
        assert torch.equal(tokens, kept)
        assert with_cls(tokens, cls, owned=True) is tokens
        assert torch.equal(tokens, want)


@pytest.mark.parametrize("depth", [(0, 1, 0), (1, 0, 0), (1, 1, 0)])
def test_an_encoder_leaves_its_inputs_alone(depth):
    """A branch without blocks hands its input on, which is then not the encoder's to write to."""
    encoder = small_model(depth=(depth,), drop_path_rate=0.0).blocks[0]
    tokens = [torch.randn(2, 17, 24), torch.randn(2, 10, 48)]
    kept = [x.clone() for x in tokens]
    with torch.no_grad():
        first = encoder(tokens)
        assert all(torch.equal(x, y) for x, y in zip(tokens, kept, strict=True))
    want = encoder(tokens)
    assert all(relative_error(x, y) < 1e-6 for x, y in zip(first, want, strict=True))


def test_a_norm_that_is_not_layer_norm_is_refused():
    with pytest.raises(TypeError, match=r"norm_layer must make torch.nn.LayerNorm with a weight"):
        small_model(norm_layer=nn.RMSNorm)


def test_the_backend_reaches_the_operation():
    with pytest.raises(ValueError, match="backend must be one of auto, torch, reference"):
        small_model(backend="fast")(torch.zeros(1, 3, 48, 48))
