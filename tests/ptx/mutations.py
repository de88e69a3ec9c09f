"""Defects put into PTX text, one at a time: a test that runs the text must notice those that change it.

Every kind of defect is a pattern and a change. `mutants` lists all places of a text; the name of a mutant
says the kind, the line and the instruction, so that survivors can be examined.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

Change = Callable[[re.Match[str]], str]


@dataclass(frozen=True)
class Mutant:
    """A text with one defect."""

    kind: str
    line: int
    instruction: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.kind}, line {self.line}: {self.instruction}"


def _delete(match: re.Match[str]) -> str:
    return ""


def _keep(group: int) -> Change:
    return lambda match: match.group(group)


def _one_more(match: re.Match[str]) -> str:
    return f"{match.group(1)}{int(match.group(2)) + 1}"


def _swap_registers(first: int, second: int) -> Change:
    """Exchange two of the registers of an instruction, counted from 0."""

    def change(match: re.Match[str]) -> str:
        parts = re.split(r"(%\w+)", match.group(0))
        i, j = 2 * first + 1, 2 * second + 1
        parts[i], parts[j] = parts[j], parts[i]
        return "".join(parts)

    return change


def _double_distance(match: re.Match[str]) -> str:
    return f"{match.group(1)}, {int(match.group(2)) * 2 % 32 or 1}, "


def _toggle_transposition(match: re.Match[str]) -> str:
    return match.group(1) if match.group(2) else match.group(1) + ".trans"


def _replace(old: str, new: str) -> Change:
    return lambda match: match.group(0).replace(old, new)


_MMA = r"mma\.sync\.aligned\.m16n8k(?:8|16|32)[^;]*\.f32\s*\{[^;]*;"

KINDS: dict[str, tuple[str, Change]] = {
    "barrier deleted": (r"bar(?:rier)?\.sync[^;]*;", _delete),
    "predicate of a global access dropped": (r"@!?%p\d+\s+((?:ld|st)\.global)", _keep(1)),
    "predicate of a shared store dropped": (r"@!?%p\d+\s+(st\.shared)", _keep(1)),
    "predicate of an atomic operation dropped": (r"@!?%p\d+\s+(atom|red)\b", _keep(1)),
    "branch deleted": (r"@!?%p\d+\s+bra[^;]*;", _delete),
    "comparison off by one": (r"setp\.(?:lt|gt)\.[su]\d+", lambda m: m.group(0).replace("t.", "e.")),
    "comparison turned round": (r"setp\.lt\.[su]\d+", _replace(".lt.", ".ge.")),
    "fragments of the left operand swapped": (_MMA, _swap_registers(5, 6)),
    "fragments of the right operand swapped": (_MMA, _swap_registers(8, 9)),
    "transposition of ldmatrix toggled": (
        r"(ldmatrix\.sync\.aligned\.m8n8\.x\d)(\.trans)?",
        _toggle_transposition,
    ),
    "one group fewer waited for": (r"(cp\.async\.wait_group\s+)(\d+)", _one_more),
    "commit of a group deleted": (r"cp\.async\.commit_group\s*;", _delete),
    "zero fill of a copy lost": (r"(cp\.async\.c[ag][^;]*0x(?:10|4|8)\s*), %\w+", _keep(1)),
    "distance of a shuffle doubled": (r"(shfl\.sync\.bfly\.b32[^;]*?), (\d+), ", _double_distance),
    "operands of a subtraction swapped": (r"sub\.(?:f32|s32|f16x2|bf16x2)[^;]*;", _swap_registers(1, 2)),
    "addition made a subtraction": (r"\badd\.f32(?![^;]*, 0f0+;)", _replace("add", "sub")),  # not of zero
    "maximum made a minimum": (r"\bmax\.f32", _replace("max", "min")),
    "operands of a selection swapped": (r"selp\.\w+\s+%\w+, %\w+, %\w+,[^;]*;", _swap_registers(1, 2)),
    "fence of wgmma deleted": (r"wgmma\.fence[^;]*;", _delete),
    "one product fewer waited for": (r"(wgmma\.wait_group\.sync\.aligned\s+)(\d)", _one_more),
    "fence of the asynchronous proxy deleted": (r"fence\.proxy\.async[^;]*;", _delete),
    "arrival at a cluster barrier relaxed": (
        r"(barrier\.cluster\.arrive)(?:\.release)?\b",
        lambda m: m.group(1) + ".relaxed",
    ),
    "wait for the launch before deleted": (r"griddepcontrol\.wait\s*;", _delete),
    "parity of an mbarrier flipped": (r"(mbarrier\.try_wait[^;]*), %\w+;", lambda m: m.group(1) + ", 1;"),
}


# Kinds of which many places change nothing in a given launch.
OFTEN_HARMLESS = {
    "comparison off by one": "an element that never equals the bound",
    "branch deleted": "the way round a loop that runs at least once",
    "predicate of a shared store dropped": "the same value stored to the same place again",
    "zero fill of a copy lost": "a tile that lies inside",
    "operands of a selection swapped": "two buffers that take turns, or two sizes that agree in a launch",
    "commit of a group deleted": "a group that is waited for together with the next one",
    "fence of the asynchronous proxy deleted": "a second fence before the same product",
}


def mutants(text: str) -> list[Mutant]:
    """All single defects that the kinds know in a text."""
    out = []
    code = text.split(".section", 1)[0]  # what follows is for debuggers
    for kind, (pattern, change) in KINDS.items():
        for match in re.finditer(pattern, code):
            changed = change(match)
            if changed == match.group(0) or code[: match.start()].rsplit("\n", 1)[-1].lstrip().startswith(
                "//"
            ):
                continue
            start, end = code.rfind("\n", 0, match.start()) + 1, code.find("\n", match.start())
            instruction = " ".join(code[start:end].split())[:100]
            line = code.count("\n", 0, match.start()) + 1
            mutated = text[: match.start()] + changed + text[match.end() :]
            out.append(Mutant(kind, line, instruction, mutated))
    return out


def sample(text: str, per_kind: int, seed: int) -> list[Mutant]:
    """At most `per_kind` mutants of every kind, drawn with a seed."""
    generator = random.Random(seed)
    out = []
    everything = mutants(text)
    for kind in KINDS:
        some = [m for m in everything if m.kind == kind]
        out += generator.sample(some, min(per_kind, len(some)))
    return out
