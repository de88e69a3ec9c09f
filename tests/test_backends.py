"""The choice of a backend: by name, by block, by what each can take; never a silent fallback."""

from __future__ import annotations

import sys

import pytest
import torch

from crossvit_kernels import cross_attention, use_backend
from tests.operations import operands


def test_use_backend_selects_and_restores():
    tensors = operands(dtype=torch.float32)
    plain = cross_attention(*tensors, num_heads=4)
    with use_backend("reference"):
        inside = cross_attention(*tensors, num_heads=4)
        named = cross_attention(*tensors, num_heads=4, backend="torch")
    assert torch.equal(inside, cross_attention(*tensors, num_heads=4, backend="reference"))
    assert not torch.equal(inside, named), "the two backends round differently; equal bits mean one was used"
    assert torch.equal(cross_attention(*tensors, num_heads=4), plain)


def test_use_backend_restores_after_an_error():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert sys.modules["crossvit_kernels.backends"]._selected == "auto"


def test_a_named_backend_never_falls_back_and_auto_does(monkeypatch):
    """With backends made up for this test: one of another device, one of other dtypes, one not installed."""
    module = sys.modules["crossvit_kernels.backends"]
    low = ((torch.bfloat16, torch.bfloat16),)
    made_up = [
        module.Backend("elsewhere", "", devices=("cuda",)),
        module.Backend("narrow", "", dtypes=low),
        module.Backend("absent", "", missing=lambda: "its compiler is not installed"),
        module.Backend("able", ""),
    ]
    monkeypatch.setattr(module, "BACKENDS", {b.name: b for b in made_up})
    implementations = {b.name: (lambda name=b.name: name) for b in made_up}
    call = module.Call("cpu", torch.float32, torch.float32)
    assert module.choose("op", "auto", call, implementations)() == "able"
    low_call = module.Call("cpu", torch.bfloat16, torch.bfloat16)
    assert module.choose("op", "auto", low_call, implementations)() == "narrow"
    for name, words in (
        ("elsewhere", "elsewhere: it runs on cuda, the tokens are on cpu"),
        ("narrow", "narrow: it does not take torch.float32 tokens with torch.float32 weights"),
        ("absent", "absent: its compiler is not installed"),
    ):
        with pytest.raises(RuntimeError, match=words):
            module.choose("op", name, call, implementations)
    del implementations["able"]
    with pytest.raises(RuntimeError, match="no backend can compute op on cpu") as caught:
        module.choose("op", "auto", call, implementations)
    assert all(name in str(caught.value) for name in ("elsewhere", "narrow", "absent"))
    with pytest.raises(RuntimeError, match="able: it does not implement op"):
        module.choose("op", "able", call, implementations)


def test_unknown_backends_are_named():
    with pytest.raises(
        ValueError, match="backend must be one of auto, cpu, cuda, triton, torch, reference, got 'gpu'"
    ):
        cross_attention(*operands(), num_heads=4, backend="gpu")
    with pytest.raises(ValueError, match="use_backend must be one of"), use_backend("fast"):
        pass
