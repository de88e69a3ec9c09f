"""The registry of instructions.

A builder gets the machine and an instruction and returns a function that executes it for the active lanes (a
mask, or None for all of them). Every opcode lists its modifiers and types; whatever is not listed is an
error, because a modifier that is silently ignored computes wrong results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import PtxError
from .parser import Instruction

if TYPE_CHECKING:
    from .machine import Machine

Mask = np.ndarray | None  # None: all lanes
Operand = Callable[[], np.ndarray]
Execute = Callable[[Mask], Mask]  # returns the lanes that must try again


@dataclass
class Control:
    """What a builder returns for an instruction that the scheduler executes itself."""

    kind: str  # "branch", "return" or "barrier"
    target: int = 0
    table: tuple[int, ...] = ()  # targets to choose from by `index`, instead of `target`
    index: Operand | None = None


Builder = Callable[["Machine", Instruction], Any]
OPCODES: dict[str, tuple[Builder, set[str], set[str]]] = {}


def opcode(names: str, mods: str = "", types: str = "") -> Callable[[Builder], Builder]:
    """Register a builder for opcodes with the modifiers and types it understands."""

    def register(builder: Builder) -> Builder:
        for name in names.split():
            OPCODES[name] = (builder, set(mods.split()), set(types.split()))
        return builder

    return register


def build(machine: Machine, ins: Instruction) -> Any:
    """The executable form of an instruction."""
    if ins.op not in OPCODES:
        raise PtxError(f"unsupported instruction: {ins.line}")
    builder, mods, types = OPCODES[ins.op]
    if bad := [m for m in ins.mods if m not in mods] + [t for t in ins.types if t not in types]:
        raise PtxError(f"unsupported modifier or type {', '.join(bad)}: {ins.line}")
    try:
        run = builder(machine, ins)
    except (IndexError, ValueError, KeyError) as error:
        raise PtxError(f"unsupported form ({error}): {ins.line}") from error
    except PtxError as error:
        if ins.line in str(error):
            raise
        raise PtxError(f"{error}: {ins.line}") from error
    if run is None:
        raise PtxError(f"unsupported form: {ins.line}")
    return run
