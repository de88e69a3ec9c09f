"""One kernel launch: the registers of all threads, access to operands, and the scheduler.

Every register is a numpy array with one element per thread, so one numpy operation executes an instruction
for all threads. The threads at the lowest place in the code step first; as long as all threads are at one
place, no masks are needed. Large grids run in parts, whole clusters of blocks one after another.
"""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import numpy as np

from . import floating, scalar
from .access import WINDOWS
from .clusters import ClusterBarriers
from .formats import UINT, WIDTH, PtxError, numpy_type
from .memory import GlobalMemory, Memories, ParameterSpace, Shadow
from .opcodes import OPCODES, Control, Execute, Mask, Operand, build, opcode
from .order import Order
from .parser import Instruction, Kernel, Module

RUNNING, AT_MBARRIER, AT_BARRIER, AT_WARP, AT_CLUSTER = range(5)
STATES = {
    RUNNING: "running",
    AT_MBARRIER: "an mbarrier",
    AT_BARRIER: "a barrier",
    AT_WARP: "a warp instruction",
    AT_CLUSTER: "a cluster barrier",
}
# Threads of a part of a grid: enough that numpy's cost per call is small, and few enough that the registers
# and clocks of a large kernel take some hundred megabytes.
PART = 32_768
# The most blocks of a cluster that every GPU with clusters takes.
MAX_CLUSTER = 8
# After PATIENCE steps of threads that have diverged, those furthest down get TURN steps: spin locks need it.
PATIENCE, TURN = 2048, 512
# Instructions that combine bits: a pair of which only one half is ever used may have an undefined other half.
MERGES = {"mov", "prmt", "lop3", "and", "or", "xor", "not", "shl", "shr", "shf", "bfe", "bfi", "selp"}


@dataclass
class Step:
    """One instruction in executable form."""

    guard: np.ndarray | None
    negated: bool
    run: Execute
    control: Control | None
    line: str
    guard_name: str = ""
    sources: list[str] = field(default_factory=list)  # registers
    targets: list[str] = field(default_factory=list)
    uses_values: bool = False  # beyond registers: memory, control, matrix products
    merges_bits: bool = False  # the result may depend on some of the sources alone


@dataclass
class Launch:
    """What all parts of a grid have in common: its shape, the addresses of variables, and global memory."""

    kernel: Kernel
    grid: Sequence[int]
    block: Sequence[int]
    cluster: Sequence[int]
    explicit_cluster: bool
    symbols: dict[str, int]
    shared_size: int
    local_size: int
    parameters: dict[str, np.ndarray]
    tensor_maps: dict[str, Any]  # by parameter
    memory: GlobalMemory
    shadow: Shadow | None

    @property
    def blocks(self) -> int:
        return int(np.prod(self.grid))

    def parts(self) -> list[range]:
        """The blocks that run together: all of them where they may wait for one another."""
        of_cluster = int(np.prod(self.cluster))
        size = max(1, PART // (int(np.prod(self.block)) * of_cluster)) * of_cluster
        if orders_blocks(self.kernel):
            size = self.blocks
        return [range(a, min(a + size, self.blocks)) for a in range(0, self.blocks, size)]


class Machine:
    """A part of a launch that is ready to `run`.

    dependent: the launch may begin before the one before it has ended, so that every thread must execute
    griddepcontrol.wait before it touches global memory; max_steps: the end of endless loops, of each part;
    seed: of the order of atomic operations; serial_wgmma: products complete when they are committed, as where
    ptxas adds the wait (Triton relies on it for fp16 accumulators); strict_mbarrier, strict_proxy: the fences
    of the asynchronous proxy are needed for mbarriers and for operands; strict_registers: registers must be
    written before their value is used.
    """

    def __init__(
        self,
        launch: Launch,
        blocks: range,
        dependent: bool = False,
        max_steps: int = 3_000_000,
        seed: int = 0,
        serial_wgmma: bool = False,
        strict_mbarrier: bool = True,
        strict_proxy: bool = True,
        strict_registers: bool = True,
    ) -> None:
        self.launch, self.kernel = launch, launch.kernel
        self.max_steps, self.random = max_steps, np.random.default_rng(seed)
        self.serial_wgmma, self.strict_mbarrier = serial_wgmma, strict_mbarrier
        self.threads, self.blocks = int(np.prod(launch.block)), len(blocks)
        self.n = self.threads * self.blocks
        self.all_lanes = np.arange(self.n)
        self._special_registers(blocks)
        self.params, parameters = launch.parameters, ParameterSpace(launch.parameters)
        self.symbols = {**launch.symbols, **parameters.addresses}
        of_cluster = int(np.prod(launch.cluster))
        self.order = Order(self.blocks, self.threads, blocks.start * self.threads, of_cluster)
        granules = access_granules(self.kernel)
        self.memory = Memories(
            launch.memory,
            self.order,
            launch.shared_size,
            launch.local_size,
            granules,
            parameters,
            launch.shadow,
        )
        self.memory.strict_proxy = strict_proxy
        if dependent:
            self.memory.globals.too_early = np.ones(self.n, bool)
        self.registers = _registers(self.kernel.registers, self.n)
        # which threads have written a register, for the registers that not all have
        written = np.zeros((len(self.registers), self.n), bool)
        self.incomplete = dict(zip(self.registers, written, strict=True)) if strict_registers else {}
        self.reads: dict[tuple[str, str], Operand] = {}
        self.carry = np.zeros(self.n, np.uint64)
        self.state, self.place = np.zeros(self.n, np.int8), np.zeros(self.n, np.int32)
        self.limit = 0  # up to where the threads that step meet no others
        self._asynchronous_state()
        self.code: dict[int, Step] = {}
        self.end = len(self.kernel.code)
        for at, ins in enumerate(self.kernel.code):
            # All once, so that what is not known is an error even where no thread comes by; later, what only
            # computes is made ready when it is reached.
            if not self.kernel.known or not _passes_on(ins.op):
                self.code[at] = self._step(ins)
        self.kernel.known = True
        self.steps = 0

    def _special_registers(self, blocks: range) -> None:
        """Blocks are numbered cluster by cluster."""
        thread, launch = np.arange(self.n), self.launch
        local, of_cluster = thread % self.threads, int(np.prod(launch.cluster))
        number = blocks.start + thread // self.threads
        cluster, rank = number // of_cluster, number % of_cluster
        clusters = [g // c for g, c in zip(launch.grid, launch.cluster, strict=True)]
        special = {
            "%laneid": local % 32,
            "%warpid": local // 32,
            "%cluster_ctarank": rank,
            "%cluster_nctarank": np.array([of_cluster]),
        }
        for i, axis in enumerate("xyz"):
            block, shape = launch.block, launch.cluster
            special[f"%tid.{axis}"] = local // int(np.prod(block[:i])) % block[i]
            special[f"%ntid.{axis}"] = np.array([block[i]])
            special[f"%nctaid.{axis}"] = np.array([launch.grid[i]])
            special[f"%cluster_ctaid.{axis}"] = rank // int(np.prod(shape[:i])) % shape[i]
            special[f"%cluster_nctaid.{axis}"] = np.array([shape[i]])
            special[f"%clusterid.{axis}"] = cluster // int(np.prod(clusters[:i])) % clusters[i]
            special[f"%nclusterid.{axis}"] = np.array([clusters[i]])
            special[f"%ctaid.{axis}"] = (
                special[f"%clusterid.{axis}"] * shape[i] + special[f"%cluster_ctaid.{axis}"]
            )
        self.special = {k: v.astype(np.uint32) for k, v in special.items()}

    def _asynchronous_state(self) -> None:
        self.copies: list[Any] = []  # cp.async
        self.group = np.zeros(self.n, np.int64)
        self.mbarriers: dict[tuple[int, int], Any] = {}
        self.unfenced_mbarriers: dict[tuple[int, int], int] = {}
        self.tensor_maps: dict[tuple[int | None, int], dict[tuple[str, int | None], int]] = {
            (None, WINDOWS["param"] + self.symbols[name]): fields
            for name, fields in self.launch.tensor_maps.items()
        }
        self.loads: list[Any] = []  # bulk copies to shared memory
        self.stores: list[Any] = []  # bulk copies to global memory
        self.bulk_group = np.zeros(self.n, np.int64)
        self.products: list[Any] = []  # wgmma
        self.accumulators: dict[Any, Any] = {}
        self.operands: dict[Any, Any] = {}  # of wgmma in shared memory: where they lie
        self.cluster_barriers = ClusterBarriers(self.n, self.order.of_cluster)
        self.fenced: dict[str, np.ndarray] = {}
        self.fenced_lanes = np.zeros(self.n, bool)

    # ---- operands ----

    def read(self, operand: str, type_name: str) -> Operand:
        """A function that returns the operand for all threads (or one value for all)."""
        if operand.startswith("!") and type_name == "pred":
            inner = self.read(operand[1:], type_name)
            return lambda: ~inner()
        if operand in self.registers:
            return self._register(operand, type_name)
        if operand == "%is_explicit_cluster" and type_name == "pred":
            value = np.array([self.launch.explicit_cluster])
        elif operand in self.special:
            if WIDTH[type_name] < 32:
                raise PtxError(f"{operand} read as {type_name}")
            value = self.special[operand].astype(numpy_type(type_name))
        else:
            value = constant(operand, type_name, self.symbols)
        return lambda: value

    def _register(self, name: str, type_name: str) -> Operand:
        """Made once for each type that a register is read as."""
        found = self.reads.get((name, type_name))
        if found is None:
            found = self.reads[name, type_name] = self._read_register(name, type_name)
        return found

    def _read_register(self, name: str, type_name: str) -> Operand:
        values, width = self.registers[name], WIDTH[type_name]
        predicate = type_name == "pred"
        if (values.dtype == bool) != predicate or (not predicate and values.itemsize * 8 < width):
            raise PtxError(f"register {name} ({self.kernel.registers[name]}) read as {type_name}")
        if predicate:
            return lambda: values
        if values.itemsize * 8 == width:
            view = values.view(numpy_type(type_name))
            return lambda: view
        return lambda: values.astype(UINT[width]).view(numpy_type(type_name))

    def write(self, operand: str) -> Callable[[Any, Mask], None]:
        """A function (values, mask) that sets a register; smaller integers are extended by their own sign."""
        if operand == "_":
            return lambda values, mask: None
        if operand not in self.registers:
            raise PtxError(f"unknown destination {operand}")
        target = self.registers[operand]
        views: dict[Any, np.ndarray] = {target.dtype: target}  # as the dtype of a result

        def put(values: Any, mask: Mask) -> None:
            values = np.asarray(values)
            view = views.get(values.dtype)
            if view is None:
                view = views[values.dtype] = _seen_as(target, values.dtype, operand)
            np.copyto(view, values, where=True if mask is None else mask, casting="safe")
            self.written(operand, mask)

        return put

    def place_for(self, operand: str, type_name: str) -> np.ndarray | None:
        """The register seen as this type, for results written in place; None where they must be extended."""
        register = self.registers.get(operand)
        if register is None or (register.dtype == bool) != (type_name == "pred"):
            return None
        if type_name == "pred":
            return register
        return register.view(numpy_type(type_name)) if register.itemsize * 8 == WIDTH[type_name] else None

    def written(self, operand: str, mask: Mask) -> None:
        """The lanes have written the register."""
        if mask is None:
            self.incomplete.pop(operand, None)
        elif operand in self.incomplete:
            self.incomplete[operand] |= mask

    def address(self, operand: str) -> Operand:
        """ "[base + offset]": a function that returns an int64 address per thread (or one for all)."""
        base, offset = _base_and_offset(operand)
        wide = "u64" if base not in self.registers or self.registers[base].itemsize == 8 else "u32"
        get = self.read(base, wide)
        return lambda: get().astype(np.int64) + offset

    def lanes(self, mask: Mask) -> np.ndarray:
        return self.all_lanes if mask is None else np.flatnonzero(mask)

    def per_lane(self, values: np.ndarray) -> np.ndarray:
        return values if values.shape == (self.n,) else np.broadcast_to(values, (self.n,))

    def per_warp(self, values: np.ndarray) -> np.ndarray:
        return self.per_lane(values).reshape(-1, 32)

    # ---- the scheduler ----

    def _step(self, ins: Instruction) -> Step:
        built = build(self, ins)
        control = built if isinstance(built, Control) else None
        run = (lambda mask: None) if control else built
        guard = self.read(ins.guard, "pred")() if ins.guard else None
        sources, targets = ins.operands(self.kernel.registers)
        guard_name, uses = ins.guard or "", not _passes_on(ins.op)
        merges = ins.op in MERGES
        return Step(guard, ins.negated, run, control, ins.line, guard_name, sources, targets, uses, merges)

    def _make_ready(self, place: int) -> Step:
        self.code[place] = step = self._step(self.kernel.code[place])
        return step

    def _undefined(self, step: Step, lanes: Mask) -> np.ndarray | None:
        """The lanes in which a source of the step was never written; an error where the value matters."""
        missing = [~self.incomplete[r] for r in step.sources if r in self.incomplete]
        if step.merges_bits and len(missing) < len(step.sources):
            return None
        undefined = (np.logical_and if step.merges_bits else np.logical_or).reduce(missing)
        if lanes is not None:
            undefined &= lanes
        if not undefined.any():
            return None
        if step.uses_values:
            names = ", ".join(r for r in step.sources if r in self.incomplete)
            thread = int(np.flatnonzero(undefined)[0])
            raise PtxError(f"register {names} is used in thread {thread}, which never wrote it: {step.line}")
        return undefined

    def _open_barriers(self) -> bool:
        """Open the barriers that every thread of a block has reached."""
        waits = (self.state == AT_BARRIER).reshape(-1, self.threads)
        ended = (self.place >= self.end).reshape(-1, self.threads)
        full = (waits | ended).all(1) & waits.any(1)
        for block in np.flatnonzero(full):
            part = slice(block * self.threads, (block + 1) * self.threads)
            places = sorted({self.kernel.code[x - 1].line for x in self.place[part][waits[block]]})
            where = " / ".join(places)
            if ended[block].any():
                raise PtxError(f"barrier divergence: threads exited while others wait at {where}")
            if (self.place[part] != self.place[part][0]).any():
                raise PtxError(f"barrier divergence: threads wait at different barriers: {where}")
            self.state[part] = RUNNING
            self.order.barrier(int(block))
        return bool(full.any())

    def wait_for_cluster(self, lanes: np.ndarray) -> None:
        self.state[lanes] = AT_CLUSTER

    def wake_cluster(self, threads: np.ndarray) -> None:
        """Those of the threads that wait at a cluster barrier try again."""
        self.state[threads & (self.state == AT_CLUSTER)] = RUNNING
        self.limit = 0

    def _deadlock(self) -> PtxError:
        waiting = np.flatnonzero(self.place < self.end)
        if (self.state[waiting] == AT_CLUSTER).any() and self.cluster_barriers.missing(
            self.place >= self.end
        ).any():
            where = self.kernel.code[self.place[waiting[self.state[waiting] == AT_CLUSTER][0]]].line
            return PtxError(f"cluster barrier divergence: threads exited while others wait at {where}")
        seen = sorted({(int(self.place[x]), int(self.state[x])) for x in waiting})
        words = []
        for place, state in seen:
            count = int(((self.place == place) & (self.state == state)).sum())
            line = self.kernel.code[place - (state == AT_BARRIER)].line
            words.append(f"{count} threads wait in {STATES[state]} at {line}")
        return PtxError("deadlock: " + "; ".join(words))

    def _pick(self, furthest: bool) -> tuple[int, np.ndarray] | None:
        """The place and the threads that step next; None at the end.

        They are the lowest, or those furthest down, and may go on to `limit` without looking at the others.
        """
        from .asynchronous import deliver

        while True:
            runs = (self.state == RUNNING) & (self.place < self.end)
            if runs.any():
                places = self.place[runs]
                current = int(places.max() if furthest else places.min())
                ready = (self.state == RUNNING) | (self.state == AT_WARP)
                mask = (self.place == current) & ready
                self.state[mask] = RUNNING
                further = ready & (self.place > current)
                self.limit = 0 if furthest else int(self.place.min(where=further, initial=self.end))
                return current, mask
            if self._open_barriers():
                continue
            if (self.place >= self.end).all():
                return None
            if not self.loads:
                raise self._deadlock()
            deliver(self)

    def run(self) -> None:
        """Execute the kernel to its end."""
        with np.errstate(all="ignore"):
            self._run()
        for left, what in (
            (self.copies, "cp.async copies"),
            (self.stores, "bulk stores"),
            (self.loads, "bulk loads"),
            (self.products, "wgmma products"),
        ):
            if left:
                raise PtxError(f"{what} of {self.kernel.name} were never waited for")
        self.memory.cluster.check_exits()

    def _run(self) -> None:
        uniform, current, apart = True, 0, 0
        mask: Mask = None
        moved = False  # the threads in `mask` have left `current`, which `place` does not say yet
        while True:
            if uniform:
                if current >= self.end:
                    return
                mask = None
            else:
                apart += 1
                furthest = apart % (PATIENCE + TURN) >= PATIENCE
                if moved and current + 1 < self.limit and not furthest:
                    current += 1
                else:
                    if moved:
                        self.place[mask] = current + 1
                    picked = self._pick(furthest)
                    if picked is None:
                        return
                    current, mask = picked
                    if mask.all():
                        uniform, apart, mask = True, 0, None
                moved = False
            step = self.code.get(current) or self._make_ready(current)
            self.steps += 1
            if self.steps > self.max_steps:
                raise PtxError(f"more than {self.max_steps} steps, an endless loop? {step.line}")
            active = self._active(step, mask)
            idle = active is not None and not active.any()
            undefined = None
            if not idle and not self.incomplete.keys().isdisjoint(step.sources):
                undefined = self._undefined(step, active)
            if step.control:
                uniform, current = self._control(step.control, uniform, current, mask, active, idle)
                continue
            retry = None if idle else step.run(active)
            if undefined is not None:
                for name in step.targets:
                    self.incomplete.setdefault(name, np.ones(self.n, bool))[undefined] = False
            if retry is None:
                moved, current = not uniform, current + uniform
                continue
            here = np.ones(self.n, bool) if mask is None else mask
            uniform = False
            self.place[here] = current
            self.place[here & ~retry] = current + 1
            self.state[retry & (self.state == RUNNING)] = AT_WARP

    def _active(self, step: Step, mask: Mask) -> Mask:
        """The lanes for which the guard of the step holds."""
        if step.guard is None:
            return mask
        if step.guard_name in self.incomplete:
            written = self.incomplete[step.guard_name]
            if not (written if mask is None else written[mask]).all():
                raise PtxError(f"predicate {step.guard_name} was never written: {step.line}")
        active = ~step.guard if step.negated else step.guard.copy()
        if mask is not None:
            active &= mask
        return None if active.all() else active

    def _chosen_targets(self, control: Control, active: Mask) -> np.ndarray:
        """Where the active lanes of an indexed branch go."""
        assert control.index is not None
        index = np.broadcast_to(control.index(), (self.n,))
        index = index if active is None else index[active]
        if (index >= len(control.table)).any():
            raise PtxError(f"brx.idx beyond its {len(control.table)} targets in {self.kernel.name}")
        return np.array(control.table)[index] if len(index) else np.zeros(1, int)

    def _control(
        self, control: Control, uniform: bool, current: int, mask: Mask, active: Mask, idle: bool
    ) -> tuple[bool, int]:
        """Execute a branch, return or barrier; returns whether the threads are together, and where."""
        target = self.end if control.kind == "return" else control.target
        if control.index is not None:
            targets = self._chosen_targets(control, active if active is not None else mask)
            if idle or (targets == targets[0]).all():
                target = int(targets[0])
            else:
                self.place[np.ones(self.n, bool) if mask is None else mask] = current + 1
                self.place[np.ones(self.n, bool) if active is None else active] = targets
                return False, current
        if uniform and (active is None or idle):
            if control.kind == "barrier":
                if not idle:
                    self.order.barrier()
                return True, current + 1
            return True, current + 1 if idle else target
        if uniform:
            self.place[:] = current
        here = np.ones(self.n, bool) if mask is None else mask
        act = here if active is None else active
        self.place[here] = current + 1
        if control.kind == "barrier":
            self.state[act] = AT_BARRIER
            self._open_barriers()
        else:
            self.place[act] = target
        return False, current


def _registers(types: Mapping[str, str], threads: int) -> dict[str, np.ndarray]:
    """The value of each register in each thread: one allocation for each width."""
    dtypes = {name: np.dtype(bool if t == "pred" else UINT[max(8, WIDTH[t])]) for name, t in types.items()}
    rows = {
        dtype: iter(np.zeros((count, threads), dtype)) for dtype, count in Counter(dtypes.values()).items()
    }
    return {name: next(rows[dtype]) for name, dtype in dtypes.items()}


def _seen_as(register: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """A register as its own width of the kind of a result: integers may be narrower, floats may not."""
    fits = (dtype.kind == "b") == (register.dtype == bool) and dtype.kind in "buif"
    if not fits or (dtype.kind == "f" and dtype.itemsize != register.itemsize):
        raise PtxError(f"a {dtype} result for register {name}")
    return register if dtype.kind == "b" else register.view(f"{dtype.kind}{register.itemsize}")


@cache
def _base_and_offset(operand: str) -> tuple[str, int]:
    match = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+?\s*(-?\w+))?\s*\]", operand)
    if not match:
        raise PtxError(f"unsupported address {operand}")
    return match.group(1), int(match.group(2) or "0", 0)


@cache
def _passes_on(op: str) -> bool:
    """Whether an instruction computes from an undefined register just another undefined register."""
    return OPCODES[op][0].__module__ in (scalar.__name__, floating.__name__) or op == "cvta"


def access_granules(kernel: Kernel) -> dict[str, int]:
    """The narrowest access to each address space, in bytes (at most 16)."""
    narrowest = {"shared": 16, "global": 16, "local": 16}
    for ins in kernel.code:
        width, spaces = 16, ["shared", "global"]
        if ins.op in ("ld", "st", "atom", "red"):
            if "param" in ins.mods:
                continue
            count = int((ins.has("v2", "v4", "v8") or "v1")[1:]) if ins.op in ("ld", "st") else 1
            width = WIDTH[ins.types[0]] // 8 * count if ins.types else 1
            named = [s.split("::")[0] for s in ins.mods if s.split("::")[0] in narrowest]
            spaces = named or list(narrowest)
        elif ins.op == "cp.async" and len(ins.args) > 2:
            width = int(ins.args[2], 0)
        elif ins.op == "cp.async.bulk.tensor":
            width, spaces = 1, ["global"]
        for space in spaces:
            narrowest[space] = min(narrowest[space], width)
    return narrowest


@opcode("bra", "uni")
def _bra(machine: Machine, ins: Instruction) -> Control:
    if ins.args[0] not in machine.kernel.labels:
        raise PtxError(f"no label {ins.args[0]}: {ins.line}")
    return Control("branch", machine.kernel.labels[ins.args[0]])


@opcode("brx", "idx uni")
def _brx(machine: Machine, ins: Instruction) -> Control:
    labels = machine.kernel.branch_targets.get(ins.args[1])
    if "idx" not in ins.mods or labels is None or any(x not in machine.kernel.labels for x in labels):
        raise PtxError(f"no list of targets {ins.args[1]}: {ins.line}")
    table = tuple(machine.kernel.labels[x] for x in labels)
    return Control("branch", table=table, index=machine.read(ins.args[0], "u32"))


@opcode("ret exit", "uni")
def _ret(machine: Machine, ins: Instruction) -> Control:
    return Control("return")


@opcode("trap")
def _trap(machine: Machine, ins: Instruction) -> Execute:
    def run(mask: Mask) -> None:
        raise PtxError(f"trap: {ins.line}")

    return run


def orders_blocks(kernel: Kernel) -> bool:
    """Whether blocks may wait for one another: atomic operations or strong accesses to global memory."""
    strong = ("volatile", "relaxed", "acquire", "release")
    return any(
        (i.op in ("atom", "red") or (i.op in ("ld", "st") and i.has(*strong)))
        and not i.has("shared", "shared::cta", "shared::cluster")
        for i in kernel.code
    )


def constant(operand: str, type_name: str, symbols: dict[str, int]) -> np.ndarray:
    """The value of a literal or of the name of a variable, which is its address."""
    if operand in symbols:
        return np.array([symbols[operand]]).astype(numpy_type(type_name))
    value = _literal(operand, type_name)
    value.flags.writeable = False  # all kernels share it
    return value


@lru_cache(maxsize=10_000)
def _literal(operand: str, type_name: str) -> np.ndarray:
    width = WIDTH[type_name]
    if match := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", operand):
        bits = {"f": 32, "d": 64}[match.group(1).lower()]
        if bits != width:
            raise PtxError(f"{operand} used as {type_name}")
        return np.array([int(match.group(2), 16)], UINT[bits]).view(numpy_type(type_name))
    if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
        raise PtxError(f"unknown operand {operand}")
    value = int(operand.rstrip("U"), 0)
    if type_name == "pred":
        return np.array([value != 0])
    if type_name in ("f32", "f64"):
        raise PtxError(f"integer constant {operand} used as {type_name}")
    return np.array([value & ((1 << width) - 1)], UINT[width]).view(numpy_type(type_name))


def _check_shape(kernel: Kernel, block: Sequence[int]) -> None:
    threads = int(np.prod(block))
    if threads % 32 or not 0 < threads <= 1024:
        raise PtxError(f"blocks must be whole warps, at most 1024 threads: {tuple(block)}")
    if kernel.threads and int(np.prod(kernel.threads)) != threads:
        raise PtxError(f"{kernel.name} requires blocks of {kernel.threads} threads, not {tuple(block)}")


def _cluster_shape(
    module: Module, kernel: Kernel, grid: Sequence[int], cluster: Sequence[int] | None
) -> tuple[int, ...]:
    """The blocks of a cluster: those of the launch, or those that the kernel was compiled for."""
    asked = tuple(cluster) if cluster else None
    if kernel.cluster and asked and asked != kernel.cluster:
        raise PtxError(f"{kernel.name} requires clusters of {kernel.cluster} blocks, not {asked}")
    shape = asked or kernel.cluster
    if shape is None:
        if kernel.explicit_cluster:
            raise PtxError(f"{kernel.name} must be launched with a cluster shape")
        return (1, 1, 1)
    architecture = re.match(r"sm_(\d+)", module.target)
    if architecture and int(architecture.group(1)) < 90:
        raise PtxError(f"{kernel.name} is compiled for {module.target}, which has no clusters")
    if min(shape) < 1 or int(np.prod(shape)) > MAX_CLUSTER:
        raise PtxError(f"clusters have 1 to {MAX_CLUSTER} blocks, not {shape}")
    if any(g % c for g, c in zip(grid, shape, strict=True)):
        raise PtxError(f"a grid of {tuple(grid)} blocks is not made of clusters of {shape}")
    return shape


def _lay_out(
    module: Module, kernel: Kernel, dynamic_shared: int, memory: GlobalMemory
) -> tuple[dict[str, int], int, int]:
    """Addresses of all variables; bytes of shared memory of a block and of local memory of a thread."""
    symbols: dict[str, int] = {"WARP_SZ": 32}
    at = local_size = 0
    for name, size in kernel.shared.items():
        symbols[name] = at = (at + 127) // 128 * 128
        at += size
    if module.dynamic:
        at = (at + 1023) // 1024 * 1024 if at else 0
    symbols.update({name: at for name in module.dynamic})
    for name, size in kernel.local.items():
        symbols[name], local_size = local_size, (local_size + size + 15) // 16 * 16
    for name, (kind, count, values) in module.data.items():
        array = np.zeros(count, UINT[WIDTH[kind]])
        for i, value in enumerate(values):
            array[i : i + 1] = constant(value, kind, symbols).view(array.dtype)
        symbols[name] = memory.add_array(array)
    memory.freeze()
    return symbols, at + dynamic_shared, local_size


def _parameters(kernel: Kernel, args: Sequence[Any]) -> dict[str, np.ndarray]:
    """The bytes of every parameter."""
    if len(args) != len(kernel.params):
        raise PtxError(f"{kernel.name} takes {len(kernel.params)} arguments, got {len(args)}")
    out = {}
    for param, arg in zip(kernel.params, args, strict=True):
        if isinstance(arg, bytes) or param.count is not None:
            data = np.frombuffer(bytes(arg), np.uint8)
            if data.size != param.size:
                raise PtxError(f"parameter {param.name} has {param.size} bytes, got {data.size}")
        else:
            data = np.asarray(arg).astype(numpy_type(param.type)).reshape(1).view(np.uint8)
        out[param.name] = data
    return out


def run_kernel(
    module: Module,
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    dynamic_shared: int,
    args: Sequence[Any],
    memory: GlobalMemory | None = None,
    cluster: Sequence[int] | None = None,
    races: bool = True,
    **options: Any,
) -> int:
    """Launch a kernel and return the number of its steps.

    A numpy array among `args` is registered and becomes a pointer; other arguments are numbers, addresses
    that the caller registered in `memory`, or bytes for parameters passed by value. cluster: blocks of a
    cluster along each axis; races: check races. Further options are those of `Machine`.
    """
    memory = memory or GlobalMemory()
    if name not in module.kernels:
        raise PtxError(f"no kernel {name} among {', '.join(module.kernels)}")
    kernel = module.kernels[name]
    values = [memory.add_array(a) if isinstance(a, np.ndarray) and a.ndim else a for a in args]
    _check_shape(kernel, block)
    shape = _cluster_shape(module, kernel, grid, cluster)
    symbols, shared_size, local_size = _lay_out(module, kernel, dynamic_shared, memory)
    units = memory.total // access_granules(kernel)["global"] + 1
    shadow = Shadow(units, "global", int(np.prod(grid)) > 1) if races else None
    explicit, parameters = bool(cluster or kernel.cluster), _parameters(kernel, values)
    named = zip(kernel.params, values, strict=True)
    tensor_maps = {param.name: value.fields for param, value in named if hasattr(value, "fields")}
    launch = Launch(
        *(kernel, grid, block, shape, explicit, symbols, shared_size, local_size),
        *(parameters, tensor_maps, memory, shadow),
    )
    return sum(_run_part(launch, blocks, options) for blocks in launch.parts())


def _run_part(launch: Launch, blocks: range, options: dict[str, Any]) -> int:
    collects = gc.isenabled()
    gc.disable()  # it would look at thousands of steps again and again, and find nothing
    try:
        machine = Machine(launch, blocks, **options)
        try:
            machine.run()
        finally:
            # The steps refer to the machine: free its arrays now, not at some collection.
            machine.code.clear()
            machine.reads.clear()
            machine.operands.clear()
    finally:
        if collects:
            gc.enable()
    return machine.steps
