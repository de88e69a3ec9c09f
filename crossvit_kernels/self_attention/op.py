"""Self-attention of the compiled module as an operator of torch."""

from __future__ import annotations

from ..by_definition import operator
from . import native, reference

FORWARD, BACKWARD, self_attention = operator(
    "self_attention",
    ("Tensor qkv",),
    ("int num_heads", "float scale", "ScalarType dtype"),
    native.self_attention,
    reference.output,
)
