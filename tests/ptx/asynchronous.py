"""Asynchronous copies: cp.async, mbarriers, bulk copies with and without tensor maps (TMA).

Data lands at the latest moment the rules allow: when the copy is waited for. Until then the destination
counts as uninitialised, so a read that comes too early is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .formats import PtxError
from .opcodes import Execute, Mask, opcode
from .parser import Instruction
from .warp import collective

if TYPE_CHECKING:
    from .machine import Machine


# ---- cp.async ----


@dataclass
class Copies:
    """cp.async copies of some threads that have not landed, one entry per thread."""

    lanes: np.ndarray
    positions: np.ndarray  # in shared memory
    units: np.ndarray
    sources: np.ndarray  # addresses in global memory
    sizes: np.ndarray  # bytes copied; the rest becomes zero
    groups: np.ndarray
    width: int

    def part(self, chosen: np.ndarray) -> Copies:
        arrays = (self.lanes, self.positions, self.units, self.sources, self.sizes, self.groups)
        lanes, positions, units, sources, sizes, groups = (a[chosen] for a in arrays)
        return Copies(lanes, positions, units, sources, sizes, groups, self.width)


@opcode(
    "cp.async",
    "ca cg shared shared::cta global commit_group wait_group wait_all "
    "L2::cache_hint L2::64B L2::128B L2::256B",
)
def copy_async(machine: Machine, ins: Instruction) -> Execute | None:
    if "commit_group" in ins.mods:
        return lambda mask: _commit(machine.group, machine.lanes(mask))
    if ins.has("wait_group", "wait_all"):
        keep = int(ins.args[0], 0) if "wait_group" in ins.mods else -1
        return lambda mask: _land(machine, np.ones(machine.n, bool) if mask is None else mask, keep, ins.line)
    return _start_copies(machine, ins)


def _commit(groups: np.ndarray, lanes: np.ndarray) -> None:
    groups[lanes] += 1


def _start_copies(machine: Machine, ins: Instruction) -> Execute | None:
    args = ins.args[:-1] if "L2::cache_hint" in ins.mods else ins.args
    width = int(args[2], 0)
    target, source = machine.address(args[0]), machine.address(args[1])
    count = machine.read(args[3], "u32") if len(args) > 3 else lambda: np.array([width], np.uint32)
    if width not in (4, 8, 16) or ("cg" in ins.mods and width != 16) or len(args) > 4:
        return None
    memory = machine.memory

    def run(mask: Mask) -> None:
        lanes = machine.lanes(mask)
        to, sources, sizes = (machine.per_lane(x())[lanes] for x in (target, source, count))
        if (to % width).any() or (sources % width).any() or (sizes > width).any():
            raise PtxError(f"misaligned or oversized cp.async: {ins.line}")
        positions = memory.shared.positions(to, width, lanes, ins.line)
        units = memory.shared.units(positions, width)
        memory.claim(units, lanes, ins.line)
        for size in np.unique(sizes[sizes > 0]):
            chosen = sizes == size
            memory.global_read(sources[chosen], int(size), lanes[chosen], ins.line)
        groups = machine.group[lanes].copy()
        machine.copies.append(Copies(lanes, positions, units, sources, sizes, groups, width))

    return run


def _land(machine: Machine, waiting: np.ndarray, keep: int, line: str) -> None:
    """The copies of all but the last `keep` groups of each waiting thread are complete."""
    rest = []
    for copies in machine.copies:
        done = waiting[copies.lanes]
        if keep >= 0:
            done &= copies.groups < machine.group[copies.lanes] - keep
        if done.all():
            _write(machine, copies, line)
            continue
        if done.any():
            _write(machine, copies.part(done), line)
        rest.append(copies.part(~done))
    machine.copies = rest


def _write(machine: Machine, copies: Copies, line: str) -> None:
    memory, width = machine.memory, copies.width
    data = np.zeros((len(copies.lanes), width), np.uint8)
    for size in np.unique(copies.sizes[copies.sizes > 0]):
        chosen = copies.sizes == size
        data[chosen, : int(size)] = memory.memory.bytes_at(
            copies.sources[chosen, None] + np.arange(int(size))
        )
    if memory.shared.shadow is not None:
        memory.shared.shadow.write(copies.units, copies.lanes, None, line)
    view = memory.shared.view[width]
    view[copies.positions // width] = data.view(view.dtype)[:, 0]
    memory.shared.ready[copies.units] = True  # type: ignore[index]
    memory.unfenced[copies.units] = copies.lanes[:, None]


# ---- mbarriers ----


class MBarrier:
    """Counts arrivals and bytes; `phase` advances when both are complete."""

    def __init__(self, count: int, threads: int) -> None:
        self.count = self.left = count
        self.bytes = self.phase = 0
        # clocks of the block: gathered in this phase, and known to whoever waited for the last one
        self.gathered, self.published = np.zeros(threads, np.uint32), np.zeros(threads, np.uint32)

    def complete(self, machine: Machine) -> None:
        if self.left == 0 and self.bytes == 0:
            self.phase, self.left, self.published = self.phase + 1, self.count, self.gathered.copy()
            machine.state[machine.state == 1] = 0  # those who wait at an mbarrier try again
            machine.limit = 0


def _find_mbarrier(machine: Machine, lane: int, address: int, line: str) -> MBarrier:
    key = int(machine.memory.block[lane]), int(address)
    if key not in machine.mbarriers:
        raise PtxError(f"mbarrier not initialised: {line}")
    return machine.mbarriers[key]


@opcode(
    "mbarrier",
    "init inval arrive expect_tx try_wait test_wait parity shared shared::cta release acquire cta",
    "b64",
)
def mbarrier(machine: Machine, ins: Instruction) -> Execute | None:
    kind = ins.mods[0]
    waits, has_result = kind in ("try_wait", "test_wait"), kind in ("arrive", "try_wait", "test_wait")
    address, extra = machine.address(ins.args[has_result]), ins.args[has_result + 1 :]
    value = machine.read(extra[0], "u32") if extra else lambda: np.array([1], np.uint32)
    put = machine.write(ins.args[0]) if has_result else None
    if not ins.has("shared", "shared::cta") or waits != ("parity" in ins.mods):
        return None
    if machine.order.full is None:
        machine.order.full = np.zeros((machine.n, machine.threads), np.uint32)
    if waits:
        return _wait_for_phase(machine, ins, address, value, put)

    def run(mask: Mask) -> None:
        addresses, values = machine.per_lane(address()), machine.per_lane(value())
        for lane in machine.lanes(mask):
            at, number = int(addresses[lane]), int(values[lane])
            if kind == "init":
                _init_mbarrier(machine, int(lane), at, number, ins.line)
                continue
            barrier = _find_mbarrier(machine, lane, at, ins.line)
            if kind == "inval":
                del machine.mbarriers[int(machine.memory.block[lane]), at]
            elif kind == "expect_tx":
                barrier.bytes += number
            else:
                _arrive(machine, barrier, int(lane), number, "expect_tx" in ins.mods, ins.line)

    return run


def _wait_for_phase(machine: Machine, ins: Instruction, address: Any, value: Any, put: Any) -> Execute:
    """try_wait and test_wait; the lanes of one mbarrier together."""

    def run(mask: Mask) -> Mask:
        lanes = machine.lanes(mask)
        addresses, values = machine.per_lane(address())[lanes], machine.per_lane(value())[lanes]
        blocks = machine.memory.block[lanes]
        passed, left = np.zeros(machine.n, bool), np.zeros(machine.n, bool)
        todo = np.ones(len(lanes), bool)
        while todo.any():
            first = int(todo.argmax())
            same = (addresses == addresses[first]) & (blocks == blocks[first])
            barrier = _find_mbarrier(machine, lanes[first], addresses[first], ins.line)
            over = values[same] != barrier.phase % 2
            here = lanes[same]
            done = here[over]
            full = machine.order.full
            full[done] = np.maximum(full[done], barrier.published)  # type: ignore[index]
            passed[done], left[here[~over]] = True, True
            todo &= ~same
        put(passed, passed | left if ins.mods[0] == "test_wait" else passed)
        if ins.mods[0] == "test_wait" or not left.any():
            return None
        machine.state[left] = 1
        return left

    return run


def _init_mbarrier(machine: Machine, lane: int, address: int, count: int, line: str) -> None:
    key = int(machine.memory.block[lane]), address
    if address % 8:
        raise PtxError(f"misaligned mbarrier: {line}")
    machine.memory.shared_positions(np.array([address]), 8, lane, line)
    machine.mbarriers[key], machine.unfenced_mbarriers[key] = MBarrier(count, machine.threads), lane


def _arrive(machine: Machine, barrier: MBarrier, lane: int, value: int, expects: bool, line: str) -> None:
    barrier.bytes += value if expects else 0
    count = 1 if expects else value
    if barrier.left < count:
        raise PtxError(f"too many arrivals: {line}")
    first = lane // machine.threads * machine.threads
    known = machine.order.known(lane)[first : first + machine.threads]
    np.maximum(barrier.gathered, known, out=barrier.gathered)
    machine.order.clock[lane] += np.uint32(1)
    barrier.left -= count
    barrier.complete(machine)


# ---- bulk copies: loads land when every thread waits, stores happen when they are waited for ----

BULK = (
    "shared::cta shared::cluster global mbarrier::complete_tx::bytes bulk_group commit_group wait_group read "
    "L2::cache_hint"
)


@dataclass
class BulkLoad:
    """A bulk copy to shared memory that has not landed."""

    lane: int
    positions: np.ndarray
    source: Callable[[], np.ndarray]  # fetches the bytes
    mbarrier: int
    size: int
    clock: int
    line: str


@opcode("cp.async.bulk", BULK)
def bulk_copy(machine: Machine, ins: Instruction) -> Execute | None:
    if "commit_group" in ins.mods:
        return lambda mask: _commit(machine.bulk_group, machine.lanes(mask))
    if "wait_group" in ins.mods:
        return lambda mask: _wait_for_stores(machine, mask, int(ins.args[0], 0))
    args = ins.args[:-1] if "L2::cache_hint" in ins.mods else ins.args
    size = machine.read(args[2], "u32")
    if ins.mods[0].startswith("shared") and "mbarrier::complete_tx::bytes" in ins.mods and len(args) == 4:
        to, source, barrier = (machine.address(args[i]) for i in (0, 1, 3))
        return _bulk_load(machine, ins, to, source, size, barrier)
    if ins.mods[0] == "global" and "bulk_group" in ins.mods and len(args) == 3:
        return _bulk_store(machine, ins, machine.address(args[0]), machine.address(args[1]), size)
    return None


def _bulk_load(machine: Machine, ins: Instruction, to: Any, source: Any, size: Any, barrier: Any) -> Execute:
    memory = machine.memory

    def run(mask: Mask) -> None:
        for lane in machine.lanes(mask):
            d, a, n, b = (int(machine.per_lane(x())[lane]) for x in (to, source, size, barrier))
            if d % 16 or a % 16 or n % 16:
                raise PtxError(f"misaligned bulk copy: {ins.line}")
            positions = memory.shared_positions(np.array([d]), n, int(lane), ins.line)[0]
            memory.global_read(np.array([a]), n, np.array([lane]), ins.line)
            source_bytes = partial(memory.memory.bytes_at, a + np.arange(n))
            _start_load(machine, int(lane), positions, source_bytes, b, n, ins.line)

    return run


def _bulk_store(machine: Machine, ins: Instruction, to: Any, source: Any, size: Any) -> Execute:
    memory = machine.memory

    def run(mask: Mask) -> None:
        for lane in machine.lanes(mask):
            d, s, n = (int(machine.per_lane(x())[lane]) for x in (to, source, size))
            if d % 16 or s % 16 or n % 16:
                raise PtxError(f"misaligned bulk copy: {ins.line}")
            memory.globals.positions(np.array([d]), n, np.array([lane]), ins.line)
            positions = memory.shared_positions(np.array([s]), n, int(lane), ins.line)[0]
            _start_store(machine, int(lane), positions, d + np.arange(n), 1, ins.line)

    return run


def _start_store(
    machine: Machine, lane: int, positions: np.ndarray, targets: np.ndarray, size: int, line: str
) -> None:
    """targets: the global address of every element of `size` bytes, in the order of `positions`."""
    memory = machine.memory
    units = memory.shared_units(positions)
    started = memory.async_read_starts(positions, units, line, [(lane, units)])

    def finish() -> None:
        data = memory.async_read_ends(started)
        memory.global_write(targets, size, np.array([lane]), line)
        memory.memory.set_bytes(targets[:, None] + np.arange(size), data.reshape(-1, size))

    machine.stores.append((lane, int(machine.bulk_group[lane]), finish))


def _wait_for_stores(machine: Machine, mask: Mask, keep: int) -> None:
    waiting = np.isin(np.arange(machine.n), machine.lanes(mask))
    done = [s for s in machine.stores if waiting[s[0]] and s[1] < machine.bulk_group[s[0]] - keep]
    machine.stores = [s for s in machine.stores if s not in done]
    for _, _, finish in done:
        finish()


def _start_load(
    machine: Machine,
    lane: int,
    positions: np.ndarray,
    source: Callable[[], np.ndarray],
    mbarrier_address: int,
    size: int,
    line: str,
) -> None:
    _find_mbarrier(machine, lane, mbarrier_address, line)
    key = int(machine.memory.block[lane]), mbarrier_address
    if machine.strict_mbarrier and key in machine.unfenced_mbarriers:
        raise PtxError(f"mbarrier initialised without a fence for the asynchronous proxy: {line}")
    machine.memory.claim(machine.memory.shared_units(positions)[None], np.array([lane]), line)
    clock = int(machine.order.clock[lane])
    machine.loads.append(BulkLoad(lane, positions, source, mbarrier_address, size, clock, line))
    machine.order.clock[lane] += np.uint32(1)


def deliver(machine: Machine) -> None:
    """Complete the oldest bulk load; called when no thread can step."""
    load: BulkLoad = machine.loads.pop(0)
    barrier = _find_mbarrier(machine, load.lane, load.mbarrier, load.line)
    shared = machine.memory.shared
    shared.data[load.positions] = load.source()
    shared.ready[machine.memory.shared_units(load.positions)] = True  # type: ignore[index]
    thread = load.lane % machine.threads
    barrier.gathered[thread] = max(int(barrier.gathered[thread]), load.clock)
    barrier.bytes -= load.size
    barrier.complete(machine)


# ---- tensor maps: kept as fields, not as bytes ----

ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 9: 8, 10: 2, 11: 4}


class TensorMap(bytes):
    """A tensor map made on the host: a kernel parameter whose 128 bytes nobody reads, with its fields."""

    fields: dict[tuple[str, int | None], int]

    @classmethod
    def tiled(
        cls,
        address: int,
        element: int,
        swizzle: int,
        box: Sequence[int],
        shape: Sequence[int],
        strides: Sequence[int],
    ) -> TensorMap:
        """Of a tensor in global memory; strides are in elements, the last dimension is contiguous.

        element, swizzle: as PTX numbers them. Raises PtxError for what the driver refuses.
        """
        size = ELEMENT_BYTES[element]
        steps = [stride * size for stride in strides[:-1]]
        if address % 16 or any(step % 16 for step in steps) or strides[-1] != 1:
            raise PtxError("a tensor map needs an address and strides that are multiples of 16 bytes")
        if not all(1 <= extent <= 256 for extent in box) or box[-1] * size % 16:
            raise PtxError(f"a tensor map cannot have a box of {list(box)} elements of {size} bytes")
        fields: dict[tuple[str, int | None], int] = {
            **{("global_address", None): address, ("rank", None): len(shape) - 1},
            **{("elemtype", None): element, ("swizzle_mode", None): swizzle},
            **{("interleave_layout", None): 0, ("fill_mode", None): 0},
        }
        for i, (extent, length) in enumerate(zip(reversed(shape), reversed(box), strict=True)):
            fields |= {("global_dim", i): extent, ("box_dim", i): length, ("element_stride", i): 1}
        fields |= {("global_stride", i): step for i, step in enumerate(reversed(steps))}
        made = cls(128)
        made.fields = fields
        return made


FIELDS = (
    "global_address rank box_dim global_dim global_stride element_stride elemtype interleave_layout "
    "swizzle_mode fill_mode"
)


@opcode("tensormap.replace", "tile shared::cta b1024 " + FIELDS, "b32 b64")
def replace_field(machine: Machine, ins: Instruction) -> Execute | None:
    address, name = machine.address(ins.args[0]), ins.has(*FIELDS.split())
    value = machine.read(ins.args[-1], ins.types[0])
    place = int(ins.args[1], 0) if len(ins.args) == 3 else None
    if name is None:
        return None

    def run(mask: Mask) -> None:
        addresses, values = machine.per_lane(address()), machine.per_lane(value())
        for lane in machine.lanes(mask):
            key = int(machine.memory.block[lane]), int(addresses[lane])
            machine.tensor_maps.setdefault(key, {})[name, place] = int(values[lane])

    return run


@opcode("tensormap", "cp_fenceproxy global shared::cta tensormap::generic release gpu sync aligned")
def publish_tensor_map(machine: Machine, ins: Instruction) -> Execute:
    to, source = machine.address(ins.args[0]), machine.address(ins.args[1])

    def run(mask: Mask) -> None:
        targets, sources = machine.per_lane(to()), machine.per_lane(source())
        for lane in machine.lanes(mask):
            at = targets[lane : lane + 1]
            machine.memory.globals.positions(at, 128, np.array([lane]), ins.line)
            fields = machine.tensor_maps[int(machine.memory.block[lane]), int(sources[lane])]
            machine.tensor_maps[None, int(at[0])] = dict(fields)

    return collective(machine, run)


def _tile(
    machine: Machine, at: int, origin: list[int], start: int, lane: int, line: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(shared positions, global addresses, inside the tensor) of every element of a box, and their size."""
    if (None, at) not in machine.tensor_maps:
        raise PtxError(f"no tensor map at this address: {line}")
    fields = machine.tensor_maps[None, at]
    rank, size = fields["rank", None] + 1, ELEMENT_BYTES[fields["elemtype", None]]
    unusual = fields["interleave_layout", None] or fields["fill_mode", None] or start % 128
    if rank != len(origin) or unusual or any(fields["element_stride", i] != 1 for i in range(rank)):
        raise PtxError(f"unsupported tensor map: {line}")
    box = [fields["box_dim", i] for i in range(rank)]
    swizzle = 16 << fields["swizzle_mode", None]
    if swizzle > 16 and box[0] * size > swizzle:
        raise PtxError(f"box wider than its swizzle: {line}")
    rest = np.arange(int(np.prod(box)))
    places, inside = start + rest * size, np.ones(rest.shape, bool)
    addresses = np.full(rest.shape, fields["global_address", None])
    for i in range(rank):
        index, rest = origin[i] + rest % box[i], rest // box[i]
        inside &= (index >= 0) & (index < fields["global_dim", i])
        addresses = addresses + index * (size if i == 0 else fields["global_stride", i - 1])
    places = places ^ (places >> 7 & (swizzle // 16 - 1)) << 4
    return machine.memory.shared_positions(places, size, lane, line), addresses, inside, size


@opcode("cp.async.bulk.tensor", "1d 2d 3d 4d 5d tile " + BULK)
def bulk_tensor_copy(machine: Machine, ins: Instruction) -> Execute | None:
    loads = "mbarrier::complete_tx::bytes" in ins.mods
    args = ins.args[:-1] if "L2::cache_hint" in ins.mods else ins.args
    if loads == ("bulk_group" in ins.mods) or len(args) != 2 + loads:
        return None
    base, _, coordinates = args[1 if loads else 0].strip("[] ").partition(",")
    origin = [machine.read(c.strip(), "s32") for c in coordinates.strip(" {}").split(",")]
    tensor_map, start = machine.address(f"[{base}]"), machine.address(args[0 if loads else 1])
    barrier = machine.address(args[2]) if loads else None

    def value(operand: Any, lane: int) -> int:
        return int(machine.per_lane(operand())[lane])

    def run(mask: Mask) -> None:
        for lane in map(int, machine.lanes(mask)):
            corner = [value(c, lane) for c in origin]
            tile = _tile(machine, value(tensor_map, lane), corner, value(start, lane), lane, ins.line)
            positions, addresses, inside, size = tile
            machine.memory.globals.positions(addresses[inside], size, np.array([lane]), ins.line)
            if barrier is not None:
                _load_tile(machine, tile, lane, value(barrier, lane), ins.line)
            else:
                _start_store(machine, lane, positions[inside].reshape(-1), addresses[inside], size, ins.line)

    return run


def _load_tile(machine: Machine, tile: Any, lane: int, mbarrier_address: int, line: str) -> None:
    positions, addresses, inside, size = tile
    machine.memory.global_read(addresses[inside], size, np.array([lane]), line)

    def source() -> np.ndarray:
        data = np.zeros(positions.shape, np.uint8)
        data[inside] = machine.memory.memory.bytes_at(addresses[inside][:, None] + np.arange(size))
        return data.reshape(-1)

    _start_load(machine, lane, positions.reshape(-1), source, mbarrier_address, positions.size, line)
