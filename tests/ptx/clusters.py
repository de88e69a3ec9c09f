"""Clusters of thread blocks: their barrier, and addresses in the shared memory of another block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .access import WINDOWS
from .formats import PtxError, numpy_type
from .memory import RANK_SHIFT
from .opcodes import Execute, Mask, opcode
from .parser import Instruction
from .warp import collective, named

if TYPE_CHECKING:
    from .machine import Machine


class ClusterBarriers:
    """The barriers of its cluster that each thread has arrived at and waited for, and those complete."""

    def __init__(self, threads: int, of_cluster: int) -> None:
        self.of_cluster = of_cluster
        self.arrivals, self.waits = np.zeros(threads, np.int32), np.zeros(threads, np.int32)
        self.complete = np.zeros(threads // of_cluster, np.int32)

    def arrive(self, machine: Machine, lanes: np.ndarray, relaxed: bool) -> None:
        if (self.arrivals[lanes] > self.waits[lanes]).any():
            raise PtxError("threads arrive at a cluster barrier again before they wait")
        self.arrivals[lanes] += 1
        machine.order.arrive_at_cluster(lanes, relaxed)
        full = (self.arrivals.reshape(-1, self.of_cluster) > self.complete[:, None]).all(1)
        if full.any():
            self.complete[full] += 1
            of_full = full.repeat(self.of_cluster)
            machine.order.meet(of_full, self.complete.repeat(self.of_cluster))
            machine.wake_cluster(of_full)

    def wait(self, machine: Machine, lanes: np.ndarray) -> Mask:
        """The lanes that must go on waiting."""
        if (self.arrivals[lanes] == self.waits[lanes]).any():
            raise PtxError("threads wait at a cluster barrier that they have not arrived at")
        open_to = self.complete[lanes // self.of_cluster] >= self.arrivals[lanes]
        through, shut = lanes[open_to], lanes[~open_to]
        self.waits[through] += 1
        machine.order.waited[through] = self.arrivals[through]
        if not shut.size:
            return None
        machine.wait_for_cluster(shut)
        return np.isin(machine.all_lanes, shut)

    def missing(self, exited: np.ndarray) -> np.ndarray:
        """The exited threads that have not arrived at the next barrier."""
        return exited & (self.arrivals <= self.complete.repeat(self.of_cluster))


@opcode("barrier.cluster", "arrive wait release acquire relaxed aligned")
def cluster_barrier(machine: Machine, ins: Instruction) -> Execute | None:
    barriers = machine.cluster_barriers
    if ins.mods[0] == "arrive" and not ins.has("acquire"):

        def run(mask: Mask) -> Mask:
            return barriers.arrive(machine, machine.lanes(mask), "relaxed" in ins.mods)

    elif ins.mods[0] == "wait" and not ins.has("release", "relaxed"):

        def run(mask: Mask) -> Mask:
            return barriers.wait(machine, machine.lanes(mask))

    else:
        return None
    return named(collective(machine, run) if "aligned" in ins.mods else run, ins)


@opcode("mapa", "shared::cluster", "u32 u64")
def address_in_cluster(machine: Machine, ins: Instruction) -> Execute:
    """The address of the same variable in the shared memory of the block of a rank."""
    kind, blocks = ins.types[0], machine.memory.cluster.blocks
    operands = zip(ins.args[1:], (kind, "u32"), strict=True)
    window = 0 if "shared::cluster" in ins.mods else WINDOWS["shared"]

    put, address, rank = machine.write(ins.args[0]), *(machine.read(a, t) for a, t in operands)

    def run(mask: Mask) -> None:
        offset, ranks = (machine.per_lane(x()).astype(np.int64) for x in (address, rank))
        offset, lanes = offset - window, machine.lanes(mask)
        if (ranks[lanes] >= blocks).any():
            raise PtxError(f"no block {ranks[lanes].max()} in a cluster of {blocks}: {ins.line}")
        if (offset[lanes] < 0).any() or (offset[lanes] >> RANK_SHIFT > blocks).any():
            raise PtxError(f"not an address of shared memory: {ins.line}")
        inside = offset & ((1 << RANK_SHIFT) - 1)
        put((window + (ranks + 1 << RANK_SHIFT) + inside).astype(numpy_type(kind)), mask)

    return run
