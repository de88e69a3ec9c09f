"""The fusions and the encoder: Eq. 2 by hand, several cross-attentions in a row, maps, buffers in place."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from crossvit import CrossViT, create_model
from tests.models import small_model
from tests.operations import relative_error


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


@pytest.mark.parametrize("depth", [(0, 1, 0), (1, 0, 0), (1, 1, 0)])
def test_an_encoder_leaves_its_inputs_alone(depth):
    """A branch without blocks hands its input on, and that stays the caller's."""
    encoder = small_model(depth=(depth,), drop_path_rate=0.0).blocks[0]
    tokens = [torch.randn(2, 17, 24), torch.randn(2, 10, 48)]
    kept = [x.clone() for x in tokens]
    with torch.no_grad():
        first = encoder(tokens)
        assert all(torch.equal(x, y) for x, y in zip(tokens, kept, strict=True))
    want = encoder(tokens)
    assert all(relative_error(x, y) < 1e-6 for x, y in zip(first, want, strict=True))


class Adapter(nn.Module):
    """A low-rank adapter that shows the weight of what it wraps, as such libraries do."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.low_rank = nn.Parameter(torch.randn(inner.out_features, inner.in_features) * 0.1)

    @property
    def weight(self) -> torch.Tensor:
        return self.inner.weight

    @property
    def bias(self) -> torch.Tensor:
        return self.inner.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + x @ self.low_rank.T


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def change(model: nn.Module, how: str) -> None:
    torch.manual_seed(5)
    for encoder in model.blocks:
        for fusion in encoder.fusion:
            attn = fusion.attn
            if how == "adapter":
                attn.wv = Adapter(attn.wv)
            elif how == "pruning":
                prune.random_unstructured(attn.wq, "weight", 0.5)
            elif how == "hook":
                attn.proj.register_forward_hook(lambda module, args, output: output * 2)
            elif how == "hook on all":
                attn.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
            elif how == "dropout":
                attn.attn_drop = nn.Softmax(dim=-1)  # anything that shows
            elif how == "norm":
                fusion.norm1 = nn.RMSNorm(fusion.norm1.normalized_shape)
            elif how == "drop path":
                fusion.drop_path = Times(0.3)
            elif how == "forward":
                forward = attn.proj.forward
                attn.proj.forward = lambda x, forward=forward: forward(x) * 2
            elif how == "scale":
                attn.scale = 3.0
            elif how == "hook on the block":
                fusion.register_forward_hook(lambda module, args, output: output.roll(1, -1))
        for projection in (*encoder.projs, *encoder.revert_projs):
            if how == "hook on a projection":
                projection.register_forward_hook(lambda module, args, output: output * 2)
            elif how == "hook in a projection":
                projection[1].register_forward_hook(lambda module, args, output: output * 2)
            elif how == "another activation":
                projection[1] = nn.GELU(approximate="tanh")
                projection[2].weight.data.mul_(30)  # that it shows
            elif how == "eps":
                projection[0].eps = 0.1


def changed_as_timms_is(how: str) -> tuple[CrossViT, torch.Tensor, torch.Tensor]:
    """A changed model, an image and its logits, which are those of timm's model with the same change."""
    ours, theirs = create_model("crossvit_tiny").eval(), timm.create_model("crossvit_tiny_240").eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 240, 240)
    plain = ours(x)
    change(ours, how), change(theirs, how)
    got = ours(x)
    assert relative_error(got, theirs(x)) < 1e-5
    assert relative_error(got, plain) > 1e-4, "the change must show"
    return ours, x, got


@pytest.mark.parametrize(
    "how", ["adapter", "pruning", "hook", "hook on all", "dropout", "norm", "drop path", "forward", "scale"]
)
def test_changed_submodules_are_called_as_timms_are(how):
    ours, x, _ = changed_as_timms_is(how)
    for _ in range(2):
        ours(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"cannot give the attention: .* was replaced or has hooks"):
        ours.get_attention_maps(x)
    ours.blocks[0].fusion[0].backend = "torch"
    with pytest.raises(RuntimeError, match="cannot run on 'torch': "):
        ours(x)


@pytest.mark.parametrize(
    "how", ["hook on a projection", "hook in a projection", "another activation", "eps", "hook on the block"]
)
def test_changed_projections_are_called_as_timms_are(how):
    """The attention between them stays one operation: it gives its maps, and runs on a named backend."""
    ours, x, got = changed_as_timms_is(how)
    assert len(ours.get_attention_maps(x)) == 3
    for encoder in ours.blocks:
        for fusion in encoder.fusion:
            fusion.backend = "torch"
    assert relative_error(ours(x), got) < 1e-5


@pytest.mark.parametrize("name", ["attn_drop", "proj_drop"])
@pytest.mark.parametrize("training", [False, True])
def test_dropouts_have_modes_of_their_own(name, training):
    """As in Monte-Carlo dropout: the mode of the dropout counts, not that of the model around it."""
    model = small_model(attn_drop_rate=0.5, proj_drop_rate=0.5).train(not training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    for encoder in model.blocks:
        for fusion in encoder.fusion:
            getattr(fusion.attn, name).train(training)
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(model(x), model(x)) != training


def test_two_dtypes_of_tokens_under_autocast():
    encoder = small_model().blocks[0]
    tokens = [torch.randn(2, 17, 24).bfloat16(), torch.randn(2, 10, 48)]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        got = encoder.fuse(tokens)
    want = encoder.fuse([x.float() for x in tokens])
    assert all(relative_error(a, b) < 0.05 for a, b in zip(got, want, strict=True))


def test_a_half_precision_model_with_norms_in_float32():
    model, x = small_model(), torch.randn(2, 3, 48, 48)
    want = model(x)
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    assert relative_error(model(x.bfloat16()), want) < 0.1


class Wrapped(torch.Tensor):
    """A weight that computes linear layers alone, as quantised and sharded ones do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func not in (
            torch.ops.aten.t.default,
            torch.ops.aten.addmm.default,
            torch.ops.aten.detach.default,
        ):
            raise NotImplementedError(func)
        out = func(*(x.inner if isinstance(x, Wrapped) else x for x in args), **(kwargs or {}))
        return Wrapped(out) if func is not torch.ops.aten.addmm.default else out


def test_weights_of_another_kind_are_left_to_their_module():
    model, x = small_model(), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        want = model(x)
        for encoder in model.blocks:
            for fusion in encoder.fusion:
                fusion.attn.proj.weight = nn.Parameter(
                    Wrapped(fusion.attn.proj.weight.data), requires_grad=False
                )
        assert relative_error(model(x), want) < 1e-5


def test_hooks_on_every_module_are_called():
    names = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: names.append(type(module).__name__)
    )
    try:
        small_model()(torch.randn(1, 3, 48, 48))
    finally:
        handle.remove()
    assert names.count("CrossAttentionBlock") == 4
    assert names.count("CrossAttention") == 4


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_attention_dropout_is_off_in_evaluation(rate):
    dropping, plain = small_model(attn_drop_rate=rate), small_model()
    dropping.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(dropping(x), plain(x))
    assert not torch.equal(dropping.train()(x), plain(x))


def test_what_differs_between_the_branches_reaches_its_branch():
    """Heads, MLP widths, another eps, drop-path rates with more than one cross-attention: against timm."""
    shape = {
        "img_size": 240,
        "img_scale": (1.0, 224 / 240),
        "patch_size": (12, 16),
        "embed_dim": (24, 48),
        "num_heads": (3, 4),
        "depth": ((1, 2, 2), (1, 1, 1)),
        "mlp_ratio": (2, 3, 1),
        "norm_layer": partial(nn.LayerNorm, eps=1e-2),
        "drop_path_rate": 0.5,
    }
    theirs, ours = timm.models.crossvit.CrossVit(**shape), CrossViT(**shape)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    rates = [
        [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"] for model in (ours, theirs)
    ]
    assert rates[0] == rates[1]
    x = torch.randn(4, 3, 240, 240)
    torch.manual_seed(2)
    got = ours.train()(x)
    torch.manual_seed(2)
    assert relative_error(got, theirs.train()(x)) < 1e-5


def test_all_attention_takes_the_settings_of_l_and_the_last_rate():
    encoder = small_model(fusion="all", num_heads=(3, 4), drop_path_rate=0.4, attn_drop_rate=0.1).blocks[1]
    assert encoder.fusion.attn.num_heads == 4
    assert encoder.fusion.drop_path.drop_prob == pytest.approx(0.4)
    assert encoder.fusion.attn.attn_drop.p == 0.1
    # At a rate of 1 the residual branch is dropped and the common tokens pass.
    sure = small_model(fusion="all", drop_path_rate=1.0).blocks[1].fusion.train()
    small, large = torch.randn(2, 17, 24), torch.randn(2, 5, 48)
    got = sure([small, large])
    assert relative_error(got[0], sure.revert_projs[0](sure.projs[0](small))) < 1e-6
    assert relative_error(got[1], sure.revert_projs[1](sure.projs[1](large))) < 1e-6


def test_the_backend_reaches_the_operation():
    with pytest.raises(ValueError, match="backend must be one of auto, cpu, cuda, triton, torch, reference"):
        small_model(backend="fast")(torch.zeros(1, 3, 48, 48))
