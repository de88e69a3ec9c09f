"""Single defects put into compiled kernels must be noticed, by a check or by a wrong result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.ptx import PtxError
from tests.ptx import tutorial_kernels as tutorial
from tests.ptx.mutations import KINDS, OFTEN_HARMLESS, mutants, sample
from tests.ptx.triton_driver import interpreted

# The same defects in each run: another draw may have more of those that change nothing than the bounds allow.
DRAW = 0


def survives(case: Callable[[], None], capability: int, text: str, max_steps: int) -> bool:
    """Whether a case passes with another text in place of its kernel's PTX."""
    torch.manual_seed(0)
    try:
        with interpreted(
            capability, rewrite=lambda name, ptx: text, max_steps=max_steps, strict_mbarrier=True
        ):
            case()
    except (PtxError, AssertionError):
        return False
    return True


def original(case: Callable[[], None], capability: int) -> tuple[str, int]:
    """The PTX of a case and its number of steps."""
    torch.manual_seed(0)
    with interpreted(capability) as recorder:
        case()
    (launch,) = recorder.launches
    return launch.ptx, launch.steps


@pytest.mark.parametrize(
    ("case", "capability"),
    [(tutorial.softmax, 80), (tutorial.matmul, 80), (partial(tutorial.attention, 200), 90)],
    ids=["softmax", "matmul", "attention"],
)
def test_defects_are_noticed(case, capability):
    text, steps = original(case, capability)
    assert survives(case, capability, text, 2 * steps)
    chosen = sample(text, 2, DRAW)
    left = [m for m in chosen if survives(case, capability, m.text, 2 * steps)]
    names = "\n".join(m.name for m in left)
    words = f"{len(left)} of {len(chosen)} defects were not noticed:\n{names}"
    assert len(left) <= 0.4 * len(chosen), words
    telling = [m for m in chosen if m.kind not in OFTEN_HARMLESS]
    assert sum(m.kind not in OFTEN_HARMLESS for m in left) <= 0.2 * len(telling), words


def test_mutants_differ_from_the_text_in_one_line():
    text, _ = original(tutorial.softmax, 80)
    kinds = set()
    for mutant in mutants(text):
        kinds.add(mutant.kind)
        pairs = zip(text.split("\n"), mutant.text.split("\n"), strict=True)
        assert [i + 1 for i, (old, new) in enumerate(pairs) if old != new] == [mutant.line]
    assert kinds <= set(KINDS)
    assert "barrier deleted" in kinds
    assert sample(text, 1, 3) == sample(text, 1, 3)
