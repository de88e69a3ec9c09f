"""Instructions of a whole warp, barriers and fences."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import PtxError, numpy_type
from .opcodes import Control, Execute, Mask, Operand, opcode
from .parser import Instruction

if TYPE_CHECKING:
    from .machine import Machine

EVERY_LANE = np.uint32(0xFFFFFFFF)


def collective(machine: Machine, function: Callable[[Mask], Mask], members: Operand | None = None) -> Execute:
    """Runs the function for the warps whose member lanes have all arrived; the others wait.

    `members` is the operand that names them; without it all lanes of a warp are members.
    """

    def run(mask: Mask) -> Mask:
        active = np.ones((machine.n // 32, 32), bool) if mask is None else mask.reshape(-1, 32)
        if members is None:
            bits = np.full(len(active), EVERY_LANE)
        else:
            given = machine.per_warp(members().astype(np.uint32))
            bits = given[np.arange(len(given)), active.argmax(1)]
        if mask is None:
            if (bits != EVERY_LANE).any():
                raise PtxError("the member mask leaves out lanes that execute the instruction")
            return function(None)
        wanted = (bits[:, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)).astype(bool)
        if (active & ~wanted).any():
            raise PtxError("the member mask leaves out lanes that execute the instruction")
        live = (machine.place < machine.end).reshape(-1, 32)
        go = (~(wanted & live) | active).all(1).repeat(32) & mask
        again = function(go) if go.any() else None
        waiting = mask & ~go if again is None else mask & (~go | again)
        return waiting if waiting.any() else None

    return run


def named(run: Execute, ins: Instruction) -> Execute:
    """Adds the instruction to errors that do not name it."""

    def named(mask: Mask) -> Mask:
        try:
            return run(mask)
        except PtxError as error:
            raise error if ins.line in str(error) else PtxError(f"{error}: {ins.line}") from None

    return named


@opcode("shfl", "sync bfly up down idx", "b32")
def shuffle(machine: Machine, ins: Instruction) -> Execute | None:
    kind = ins.has("bfly", "up", "down", "idx")
    puts = [machine.write(d) for d in ins.args[0].split("|")]
    value, members = machine.read(ins.args[1], "b32"), machine.read(ins.args[4], "u32")
    distance, clamp = (machine.read(a, "u32") for a in ins.args[2:4])
    if kind is None or "sync" not in ins.mods:
        return None
    lane, first_of_warp = np.arange(32), np.arange(0, machine.n, 32)[:, None]

    def run(mask: Mask) -> None:
        d, c = (machine.per_warp(x()).astype(np.int64) for x in (distance, clamp))
        d = d & 31
        segment, limit = c >> 8 & 31, c & 31
        low, top = lane & segment, (lane & segment) | (limit & ~segment)
        if kind == "idx":
            source = low | (d & ~segment)
        else:
            source = {"up": lane - d, "down": lane + d, "bfly": lane ^ d}[kind]
        inside = source >= top if kind == "up" else source <= top
        source = np.where(inside, source, lane)
        threads = (source + first_of_warp).reshape(-1)
        if mask is not None and not mask[threads][mask].all():
            raise PtxError("shuffle reads an inactive lane")
        known = None
        if ins.args[1] in machine.incomplete:
            known = machine.incomplete[ins.args[1]][threads]
        puts[0](machine.per_lane(value())[threads], mask)
        if known is not None:  # what comes from a lane that never wrote the register is undefined too
            result = machine.incomplete.setdefault(ins.args[0].split("|")[0], np.ones(machine.n, bool))
            result[machine.lanes(mask)] = known[machine.lanes(mask)]
        if len(puts) > 1:
            puts[1](np.ascontiguousarray(np.broadcast_to(inside, source.shape)).reshape(-1), mask)

    return named(collective(machine, run, members), ins)


REDUCTIONS: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _reduce(kind: str, type_name: str, values: np.ndarray, active: np.ndarray) -> np.ndarray:
    info = np.iinfo(numpy_type(type_name))
    all_ones = info.max if info.min == 0 else -1
    neutral = {"min": info.max, "max": info.min, "and": all_ones}.get(kind, 0)
    masked = np.where(active, values, numpy_type(type_name)(neutral))
    return REDUCTIONS[kind].reduce(masked, 1).astype(numpy_type(type_name))


@opcode("redux", "sync " + " ".join(REDUCTIONS), "u32 s32 b32")
def redux(machine: Machine, ins: Instruction) -> Execute | None:
    type_name, kind = ins.types[0], ins.has(*REDUCTIONS)
    put, members = machine.write(ins.args[0]), machine.read(ins.args[2], "u32")
    value = machine.read(ins.args[1], type_name)
    if kind is None or (kind in ("and", "or", "xor")) != (type_name == "b32"):
        return None

    def run(mask: Mask) -> None:
        active = _active(machine, mask)
        put(np.repeat(_reduce(kind, type_name, machine.per_warp(value()), active), 32), mask)

    return named(collective(machine, run, members), ins)


@opcode("vote", "sync ballot any all uni", "b32 pred")
def vote(machine: Machine, ins: Instruction) -> Execute | None:
    kind, put = ins.has("ballot", "any", "all", "uni"), machine.write(ins.args[0])
    value, members = machine.read(ins.args[1], "pred"), machine.read(ins.args[2], "u32")
    if kind is None or (kind == "ballot") != (ins.types[0] == "b32"):
        return None

    def run(mask: Mask) -> None:
        active, votes = _active(machine, mask), machine.per_warp(value())
        yes, everyone = votes & active, votes | ~active
        if kind == "ballot":
            result = (yes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        elif kind == "uni":
            result = everyone.all(1) | ~yes.any(1)
        else:
            result = yes.any(1) if kind == "any" else everyone.all(1)
        put(np.repeat(result, 32), mask)

    return named(collective(machine, run, members), ins)


@opcode("activemask", "", "b32")
def active_mask(machine: Machine, ins: Instruction) -> Execute:
    put = machine.write(ins.args[0])

    def run(mask: Mask) -> None:
        lanes = _active(machine, mask).astype(np.uint64) << np.arange(32, dtype=np.uint64)
        put(np.repeat(lanes.sum(1).astype(np.uint32), 32), mask)

    return run


def _active(machine: Machine, mask: Mask) -> np.ndarray:
    return np.ones((machine.n // 32, 32), bool) if mask is None else mask.reshape(-1, 32)


@opcode("elect", "sync")
def elect(machine: Machine, ins: Instruction) -> Execute:
    """One lane of each warp: here the lowest active one."""
    put_lane, put_predicate = (machine.write(x) for x in ins.args[0].split("|"))

    def run(mask: Mask) -> None:
        leader = _active(machine, mask).argmax(1)[:, None]
        put_lane(np.repeat(leader.astype(np.uint32), 32), mask)
        put_predicate((np.arange(32) == leader).reshape(-1), mask)

    return named(collective(machine, run, machine.read(ins.args[1], "u32")), ins)


@opcode("bar barrier", "sync warp aligned cta")
def barrier(machine: Machine, ins: Instruction) -> Execute | Control | None:
    if "sync" not in ins.mods:
        return None
    if "warp" in ins.mods:

        def run(mask: Mask) -> None:
            machine.order.warp_sync(np.ones(machine.n, bool) if mask is None else mask)

        return named(collective(machine, run, machine.read(ins.args[0], "u32")), ins)
    if len(ins.args) > 2:
        return None
    if len(ins.args) == 2 and not (ins.args[1].isdigit() and int(ins.args[1]) == machine.threads):
        raise PtxError(f"barriers of a part of a block are not supported: {ins.line}")
    return Control("barrier") if ins.args[0].isdigit() else None


@opcode("membar fence", "gl cta sys gpu sc acq_rel mbarrier_init release cluster")
def fence(machine: Machine, ins: Instruction) -> Execute:
    """Memory is sequentially consistent here; fences only order what would be a race without them."""
    if "mbarrier_init" in ins.mods:
        return lambda mask: _publish_mbarriers(machine, mask)
    if ins.has("gl", "gpu", "sys", "cluster"):
        return lambda mask: machine.order.fence(machine.lanes(mask))
    return lambda mask: None


def _publish_mbarriers(machine: Machine, mask: Mask) -> None:
    lanes = set(machine.lanes(mask).tolist())
    unfenced = machine.unfenced_mbarriers
    machine.unfenced_mbarriers = {k: lane for k, lane in unfenced.items() if lane not in lanes}


@opcode("fence.proxy", "async shared::cta global tensormap::generic acquire release gpu")
def fence_proxy(machine: Machine, ins: Instruction) -> Execute:
    def run(mask: Mask) -> None:
        unfenced = machine.memory.unfenced
        unfenced[np.isin(unfenced, machine.lanes(mask))] = -1
        _publish_mbarriers(machine, mask)

    return run if "async" in ins.mods else lambda mask: None


@opcode("griddepcontrol", "launch_dependents wait")
def grid_dependency(machine: Machine, ins: Instruction) -> Execute:
    """Launches run one after another here; that a dependent one waits before it touches memory is checked."""
    too_early = machine.memory.globals.too_early

    def run(mask: Mask) -> None:
        if too_early is not None and "wait" in ins.mods:
            too_early[machine.lanes(mask)] = False

    return run


@opcode("nanosleep", "", "u32")
def nanosleep(machine: Machine, ins: Instruction) -> Execute:
    return lambda mask: None
