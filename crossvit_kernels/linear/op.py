"""Linear layers of the compiled module as an operator of torch."""

from __future__ import annotations

from ..by_definition import operator
from . import native, reference

FORWARD, BACKWARD, linear = operator(
    "linear",
    (
        *("Tensor x", "Tensor weight", "Tensor? bias"),
        *("Tensor? norm_weight", "Tensor? norm_bias", "Tensor? residual"),
    ),
    ("float eps", "str? activation"),
    native.linear,
    reference.linear,
)
