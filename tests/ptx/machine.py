"""One kernel launch: the registers of all threads of the grid, access to operands, and the scheduler.

Every register is a numpy array with one element per thread of the whole grid, so one numpy operation executes
an instruction for all threads. The threads at the lowest place in the code step first; as long as all threads
are at one place, no masks are needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import floating, scalar
from .formats import UINT, WIDTH, PtxError, numpy_type
from .memory import GlobalMemory, Memories
from .opcodes import OPCODES, Control, Execute, Mask, Operand, build, opcode
from .order import Order
from .parser import Instruction, Kernel, Module

RUNNING, AT_MBARRIER, AT_BARRIER, AT_WARP = range(4)
STATES = {
    RUNNING: "running",
    AT_MBARRIER: "an mbarrier",
    AT_BARRIER: "a barrier",
    AT_WARP: "a warp instruction",
}
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


class Machine:
    """A launch that is ready to `run`.

    races: check races; max_steps: the end of endless loops; seed: of the order of atomic operations;
    serial_wgmma: products complete when they are committed, as where ptxas adds the wait (Triton relies on it
    for fp16 accumulators); strict_mbarrier, strict_proxy: the fences of the asynchronous proxy are needed for
    mbarriers and for operands; strict_registers: registers must be written before their value is used.
    """

    def __init__(
        self,
        module: Module,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        dynamic_shared: int,
        args: Sequence[Any],
        memory: GlobalMemory,
        races: bool = True,
        max_steps: int = 3_000_000,
        seed: int = 0,
        serial_wgmma: bool = False,
        strict_mbarrier: bool = True,
        strict_proxy: bool = True,
        strict_registers: bool = True,
    ) -> None:
        if name not in module.kernels:
            raise PtxError(f"no kernel {name} among {', '.join(module.kernels)}")
        self.kernel: Kernel = module.kernels[name]
        self.max_steps, self.random = max_steps, np.random.default_rng(seed)
        self.serial_wgmma, self.strict_mbarrier = serial_wgmma, strict_mbarrier
        self.threads, self.blocks = int(np.prod(block)), int(np.prod(grid))
        self.n = self.threads * self.blocks
        self.all_lanes = np.arange(self.n)
        self._check_block(block)
        self._special_registers(grid, block)
        self._lay_out(module, dynamic_shared, memory)
        self.order = Order(self.blocks, self.threads)
        self.memory = Memories(
            memory, self.order, self.shared_size, self.local_size, access_granules(self.kernel), races
        )
        self.memory.strict_proxy = strict_proxy
        self.registers = {
            r: np.zeros(self.n, bool if t == "pred" else UINT[max(8, WIDTH[t])])
            for r, t in self.kernel.registers.items()
        }
        # which threads have written a register, for the registers that not all have
        self.incomplete = {r: np.zeros(self.n, bool) for r in self.registers} if strict_registers else {}
        self.carry = np.zeros(self.n, np.uint64)
        self.params = self._parameters(args)
        self.state, self.place = np.zeros(self.n, np.int8), np.zeros(self.n, np.int32)
        self._asynchronous_state()
        self.code: list[Step] = []
        self.end = len(self.kernel.code)
        self.code = [self._step(ins) for ins in self.kernel.code]
        self.steps = 0

    def _check_block(self, block: Sequence[int]) -> None:
        if self.threads % 32 or not 0 < self.threads <= 1024:
            raise PtxError(f"blocks must be whole warps, at most 1024 threads: {tuple(block)}")
        required = self.kernel.threads
        if required and int(np.prod(required)) != self.threads:
            raise PtxError(f"{self.kernel.name} requires blocks of {required} threads, not {tuple(block)}")

    def _special_registers(self, grid: Sequence[int], block: Sequence[int]) -> None:
        thread = np.arange(self.n, dtype=np.uint32)
        number, local = thread // self.threads, thread % self.threads
        self.special = {"%laneid": local % 32, "%warpid": local // 32}
        for i, axis in enumerate("xyz"):
            self.special[f"%tid.{axis}"] = local // int(np.prod(block[:i])) % block[i]
            self.special[f"%ctaid.{axis}"] = number // int(np.prod(grid[:i])) % grid[i]
            self.special[f"%ntid.{axis}"] = np.full(self.n, block[i])
            self.special[f"%nctaid.{axis}"] = np.full(self.n, grid[i])
        self.special = {k: v.astype(np.uint32) for k, v in self.special.items()}

    def _lay_out(self, module: Module, dynamic_shared: int, memory: GlobalMemory) -> None:
        """Addresses of all variables."""
        self.symbols: dict[str, int] = {"WARP_SZ": 32}
        at = 0
        for name, size in {**module.shared, **self.kernel.shared}.items():
            self.symbols[name] = at = (at + 127) // 128 * 128
            at += size
        if module.dynamic:
            at = (at + 1023) // 1024 * 1024 if at else 0
        self.symbols.update({name: at for name in module.dynamic})
        self.shared_size, self.local_size = at + dynamic_shared, 0
        for name, size in self.kernel.local.items():
            self.symbols[name], self.local_size = self.local_size, (self.local_size + size + 15) // 16 * 16
        for name, (kind, count, values) in module.data.items():
            array = np.zeros(count, UINT[WIDTH[kind]])
            for i, value in enumerate(values):
                array[i : i + 1] = self._constant(value, kind).view(array.dtype)
            self.symbols[name] = memory.add_array(array)
        memory.freeze()

    def _parameters(self, args: Sequence[Any]) -> dict[str, np.ndarray]:
        """The bytes of every parameter."""
        params = self.kernel.params
        if len(args) != len(params):
            raise PtxError(f"{self.kernel.name} takes {len(params)} arguments, got {len(args)}")
        out = {}
        for param, arg in zip(params, args, strict=True):
            if isinstance(arg, bytes) or param.count is not None:
                data = np.frombuffer(bytes(arg), np.uint8)
                if data.size != param.size:
                    raise PtxError(f"parameter {param.name} has {param.size} bytes, got {data.size}")
            else:
                data = np.asarray(arg).astype(numpy_type(param.type)).reshape(1).view(np.uint8)
            out[param.name] = data
        return out

    def _asynchronous_state(self) -> None:
        self.copies: list[Any] = []  # cp.async
        self.group = np.zeros(self.n, np.int64)
        self.mbarriers: dict[tuple[int, int], Any] = {}
        self.unfenced_mbarriers: dict[tuple[int, int], int] = {}
        self.tensor_maps: dict[tuple[int | None, int], dict[tuple[str, int | None], int]] = {}
        self.loads: list[Any] = []  # bulk copies to shared memory
        self.stores: list[Any] = []  # bulk copies to global memory
        self.bulk_group = np.zeros(self.n, np.int64)
        self.products: list[Any] = []  # wgmma
        self.accumulators: dict[Any, Any] = {}
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
        if operand in self.special:
            if WIDTH[type_name] < 32:
                raise PtxError(f"{operand} read as {type_name}")
            value = self.special[operand].astype(numpy_type(type_name))
        else:
            value = self._constant(operand, type_name)
        return lambda: value

    def _register(self, name: str, type_name: str) -> Operand:
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

    def _constant(self, operand: str, type_name: str) -> np.ndarray:
        width = WIDTH[type_name]
        if operand in self.symbols:
            return np.array([self.symbols[operand]]).astype(numpy_type(type_name))
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

    def write(self, operand: str) -> Callable[[Any, Mask], None]:
        """A function (values, mask) that sets a register; smaller integers are extended by their own sign."""
        if operand == "_":
            return lambda values, mask: None
        if operand not in self.registers:
            raise PtxError(f"unknown destination {operand}")
        target = self.registers[operand]
        views = {"b": target}
        if target.dtype != bool:
            views = {k: target.view(f"{k}{target.itemsize}") for k in "ui"}
            if target.itemsize > 1:
                views["f"] = target.view(f"f{target.itemsize}")

        def put(values: Any, mask: Mask) -> None:
            values = np.asarray(values)
            kind = values.dtype.kind
            if kind not in views or (kind == "f" and values.itemsize != target.itemsize):
                raise PtxError(f"a {values.dtype} result for register {operand}")
            if mask is None:
                np.copyto(views[kind], values, casting="safe")
                self.incomplete.pop(operand, None)
            else:
                np.copyto(views[kind], values, where=mask, casting="safe")
                if operand in self.incomplete:
                    self.incomplete[operand] |= mask

        return put

    def address(self, operand: str) -> Operand:
        """ "[base + offset]": a function that returns an int64 address per thread (or one for all)."""
        match = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+?\s*(-?\w+))?\s*\]", operand)
        if not match:
            raise PtxError(f"unsupported address {operand}")
        base, offset = match.group(1), int(match.group(2) or "0", 0)
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
        writes = (
            bool(ins.args) and ins.args[0][0] != "[" and ins.op not in ("st", "bra", "brx", "bar", "barrier")
        )
        sources, targets = (
            [x for arg in part for x in re.findall(r"[%$\w]+", arg) if x in self.registers]
            for part in (ins.args[2 if ins.op == "shfl" else writes :], ins.args[:writes])
        )
        guard_name, uses = ins.guard or "", not _passes_on(ins.op)
        merges = ins.op in MERGES
        return Step(guard, ins.negated, run, control, ins.line, guard_name, sources, targets, uses, merges)

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
            places = sorted({self.code[x - 1].line for x in self.place[part][waits[block]]})
            where = " / ".join(places)
            if ended[block].any():
                raise PtxError(f"barrier divergence: threads exited while others wait at {where}")
            if (self.place[part] != self.place[part][0]).any():
                raise PtxError(f"barrier divergence: threads wait at different barriers: {where}")
            self.state[part] = RUNNING
            self.order.barrier(int(block))
        return bool(full.any())

    def _deadlock(self) -> PtxError:
        waiting = np.flatnonzero(self.place < self.end)
        seen = sorted({(int(self.place[x]), int(self.state[x])) for x in waiting})
        words = []
        for place, state in seen:
            count = int(((self.place == place) & (self.state == state)).sum())
            line = self.code[place - (state == AT_BARRIER)].line
            words.append(f"{count} threads wait in {STATES[state]} at {line}")
        return PtxError("deadlock: " + "; ".join(words))

    def _pick(self, furthest: bool) -> tuple[int, np.ndarray] | None:
        """The place and the threads that step next; None at the end."""
        from .asynchronous import deliver

        while True:
            runs = (self.state == RUNNING) & (self.place < self.end)
            if runs.any():
                places = self.place[runs]
                current = int(places.max() if furthest else places.min())
                mask = (self.place == current) & ((self.state == RUNNING) | (self.state == AT_WARP))
                self.state[mask] = RUNNING
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

    def _run(self) -> None:
        uniform, current, apart = True, 0, 0
        mask: Mask = None
        while True:
            if uniform:
                if current >= self.end:
                    return
                mask = None
            else:
                apart += 1
                picked = self._pick(apart % (PATIENCE + TURN) >= PATIENCE)
                if picked is None:
                    return
                current, mask = picked
                if mask.all():
                    uniform, apart, mask = True, 0, None
            step = self.code[current]
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
            if retry is None and uniform:
                current += 1
                continue
            here = np.ones(self.n, bool) if mask is None else mask
            if uniform:
                self.place[:] = current
                uniform = False
            self.place[here if retry is None else here & ~retry] = current + 1
            if retry is not None:
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


def run_kernel(
    module: Module,
    name: str,
    grid: Sequence[int],
    block: Sequence[int],
    dynamic_shared: int,
    args: Sequence[Any],
    memory: GlobalMemory | None = None,
    **options: Any,
) -> int:
    """Launch a kernel and return the number of its steps.

    A numpy array among `args` is registered and becomes a pointer; other arguments are numbers, addresses
    that the caller registered in `memory`, or bytes for parameters passed by value. Options are those of
    `Machine`.
    """
    memory = memory or GlobalMemory()
    values = [memory.add_array(a) if isinstance(a, np.ndarray) and a.ndim else a for a in args]
    machine = Machine(module, name, grid, block, dynamic_shared, values, memory, **options)
    try:
        machine.run()
    finally:
        machine.code.clear()  # the steps refer to the machine: free its arrays now, not at some collection
    return machine.steps
