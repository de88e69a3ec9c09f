"""Calls that nobody thought of, drawn by Hypothesis, against the definition.

The seed is printed by `make test`; `--hypothesis-seed` repeats it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import layouts
from tests.contract import SUBJECTS, Subject, check_against, needs_module
from tests.operations import Size, Spread

EXAMPLES, SHARDS = 100, 20  # `make test` takes a shard
EXHAUSTIVE_EXAMPLES, EXHAUSTIVE_SHARDS = 250, 400

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE = [subject for subject in SUBJECTS if subject.native]

counts = st.integers(0, 70) | st.sampled_from([127, 128, 129, 255, 257, 400])
widths = st.integers(1, 8).flatmap(
    lambda heads: st.tuples(st.just(heads), st.integers(1, 12).map(heads.__mul__))
)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, object]:
    heads, width = draw(widths)
    other_heads, other_width = draw(widths)
    tokens = draw(st.sampled_from(DTYPES))
    return {
        "subject": draw(st.sampled_from(NATIVE)),
        "size": Size(
            draw(st.integers(0, 4) | st.just(30)),
            draw(counts),
            width,
            heads,
            draw(counts),
            other_width,
            other_heads,
        ),
        "tokens": tokens,
        "weights": draw(st.sampled_from([tokens, torch.bfloat16, torch.float16])),
        "layout": draw(st.sampled_from(layouts.ALL)),
        "absent": draw(st.sets(st.sampled_from(["bq", "bk", "bv", "bo", "norm_bias", "project_bias"]))),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        "proj_dropout_p": draw(st.sampled_from([0.0, 0.4])),
        "scaled": draw(st.booleans()),
        "return_attention": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def compute(call: dict, of: Subject, x: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The call on these tensors; weights of another dtype come from autocast, as only that mixes them."""
    operation, tokens, weights = of.operation, call["tokens"], call["weights"]
    absent = {i for i, name in enumerate(operation.names) if name.split(".")[-1] in call["absent"]}
    given = [None if i in absent else layouts.lay_out(t, call["layout"]) for i, t in enumerate(x)]
    options = {name: call[name] for name in ("dropout_p", "proj_dropout_p", "return_attention")}
    if call["scaled"]:
        scale = torch.linspace(0.0, 2.0, call["size"].batch)
        options |= {"residual_scale": scale} if len(x) == 12 else {"residual_scales": (None, scale)}
    torch.manual_seed(call["seed"])
    mixed = weights != tokens and x[0].dtype != torch.float64
    with torch.autocast("cpu", dtype=weights if mixed else torch.bfloat16, enabled=mixed):
        return of.run(given, call["size"], **options)


def run_shard(examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        print_blob=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(calls())
    def random_calls(call: dict) -> None:
        subject: Subject = call["subject"]
        torch.manual_seed(call["seed"])
        tensors = subject.operation.inputs(call["size"], torch.float64, Spread(0.5, 1.0, 0.7))
        # Rounded to what the kernel sees, and given to all in the dtype that the caller would hold.
        mixed = call["weights"] != call["tokens"]
        count = len(subject.operation.tokens)
        tensors = [
            x.to(call["tokens"])
            if i < count or not mixed
            else (x if x.ndim == 1 and "norm" in name else x.to(call["weights"])).float()
            for i, (name, x) in enumerate(zip(subject.operation.names, tensors, strict=True))
        ]
        definition = Subject(subject.operation, "reference")
        with subject.ready():
            check_against(
                subject,
                tensors,
                run=partial(compute, call, subject),
                oracle=partial(compute, call, definition),
                eager=partial(compute, call, definition),
                saturated=True,
                rounding=call["weights"],
                # A LayerNorm of one or two channels divides by what may be next to nothing.
                slack=1000.0 if min(call["size"].width, call["size"].other_width) < 3 else 1.0,
            )

    random_calls()


@needs_module
@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_calls(shard):
    run_shard(EXAMPLES)


@needs_module
@pytest.mark.exhaustive
@pytest.mark.parametrize("shard", range(EXHAUSTIVE_SHARDS))
def test_random_calls_exhaustively(shard):
    run_shard(EXHAUSTIVE_EXAMPLES)
