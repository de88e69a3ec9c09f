"""The table of models against the paper's tables and against a recount."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import crossvit
from crossvit import VARIANTS, create_model, list_models

# The paper counts these without position embeddings and CLS tokens, all others with them.
WITHOUT_POSITIONS = {"crossvit_tiny_240", "crossvit_small_240", "crossvit_base_240", "crossvit_15_240"}


def gmacs(model: crossvit.CrossViT) -> float:
    """Multiply-accumulates of one image in 1e9. On meta tensors attention is counted as two products."""
    image = torch.zeros(1, 3, *model.img_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("row", VARIANTS.values(), ids=VARIANTS)
def test_parameters_and_flops(row):
    model = create_model(row.name, backend="reference", device="meta")
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == row.parameters
    counted = row.parameters
    if row.name in WITHOUT_POSITIONS:
        counted -= sum(p.numel() for n, p in parameters.items() if n.startswith(("pos_embed", "cls_token")))
    digits = 2 if row.name == "crossvit_18_240" else 1
    assert round(counted / 1e6, 1) == row.published[0]
    assert gmacs(model) == pytest.approx(row.gmacs, abs=1e-4 if row.released else 1e-3)
    assert round(row.gmacs, digits) == row.published[1]


def test_table_1():
    """The paper's architectures: widths and heads of S and L, blocks of L, ratio of the MLPs, stem."""
    table = {
        "tiny": (96, 192, 3, 4, 4),
        "small": (192, 384, 6, 4, 4),
        "base": (384, 768, 12, 4, 4),
        "9": (128, 256, 4, 3, 3),
        "15": (192, 384, 6, 5, 3),
        "18": (224, 448, 7, 6, 3),
    }
    for name, (small, large, heads, blocks, ratio) in table.items():
        for row in (row for row in VARIANTS.values() if row.name.split("_")[1] == name):
            assert (row.widths, row.heads, row.depth) == ((small, large), heads, (1, blocks))
            assert (row.mlp_ratio, row.patch_sizes, row.encoders) == (ratio, (12, 16), 3)
            assert row.three_conv_stem == ("dagger" in row.name)


def test_all_attention_costs_what_table_6_says():
    """CrossViT-S with Eq. 2: 7.6 GFLOPs. The 27.7 M parameters beside them are not reproducible."""
    model = create_model("crossvit_small", fusion="all", device="meta")
    assert round(gmacs(model), 1) == 7.6
    assert sum(p.numel() for p in model.parameters()) == 26_854_544


@pytest.mark.parametrize("name", list_models(aliases=True))
def test_every_name_makes_its_model(name):
    model = getattr(crossvit, name)(device="meta")
    row = crossvit.find_variant(name)
    assert name in crossvit.__all__
    assert model.pretrained_cfg["architecture"] == row.name
    assert model.branch_sizes(model.img_size) == [(size, size) for size in row.image_sizes]
    assert model.embed_dim == row.widths


def test_names():
    assert list_models("*_18_*408") == ["crossvit_18_dagger_408"]
    assert len(list_models()) == 12
    assert len(list_models(pretrained=True)) == 11
    assert VARIANTS["crossvit_18_240"].names == ("crossvit_18_240", "crossvit_18_224", "crossvit_18")
    assert VARIANTS["crossvit_18_dagger_504"].aliases == ("crossvit_18_dagger_480",)
    exported = {name for name in crossvit.__all__ if name.startswith("crossvit_")}
    assert exported == set(list_models(aliases=True))


def test_names_are_timms():
    import timm

    assert set(list_models(pretrained=True)) == set(timm.list_models("crossvit*"))


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="there is no model 'crossvit_19'; known are crossvit_tiny_240"):
        create_model("crossvit_19")
