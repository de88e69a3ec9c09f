"""Patch embedding of the compiled module as an operator of torch."""

from __future__ import annotations

from ..by_definition import operator
from . import native, reference

FORWARD, BACKWARD, patch_embed = operator(
    "patch_embed",
    ("Tensor image", "Tensor weight", "Tensor? bias", "Tensor position", "Tensor cls_token"),
    ("SymInt[]? size", "float[]? mean", "float[]? std"),
    native.patch_embed,
    reference.patch_embed,
)
