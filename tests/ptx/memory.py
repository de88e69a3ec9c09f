"""Global, shared and local memory: where bytes lie, and the checks of every access.

Global memory is the memory of this process: the caller registers the bytes that a kernel may touch at their
real addresses, so pointer arithmetic and alignment are those of the real tensors. Shared memory belongs to a
block, local memory to a thread. Each access is checked for bounds, alignment, bytes that were never written
(shared and local) and races (shared and global).

The checks work on granules: all accesses of PTX are aligned to their own size, so no access touches a part of
a granule as wide as the narrowest access of the kernel.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

from .formats import UINT, PtxError
from .order import Order


class _RawMemory:
    """Lets numpy see `size` bytes at an address, mapped or not; only registered bytes are ever indexed."""

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }


def _views(data: np.ndarray) -> dict[int, np.ndarray]:
    """The same bytes as elements of 1 to 16 bytes, for whole accesses in one step."""
    types = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
    return {n: data.view(t) for n, t in types.items()}


class GlobalMemory:
    """The regions of this process's memory that kernels may touch."""

    def __init__(self) -> None:
        self._regions: list[tuple[int, int, np.ndarray | None]] = []
        self._keep: list[np.ndarray] = []
        self.total = 0
        self.starts: list[int] = []

    def add_region(self, address: int, data: np.ndarray, accessible: np.ndarray | None = None) -> None:
        """Register a writable view of the bytes at an address; only `accessible` bytes may be touched."""
        if data.dtype != np.uint8 or not data.flags.c_contiguous or data.ctypes.data != address:
            raise ValueError("a region must be a contiguous uint8 view of the memory at its address")
        if data.size:
            self._keep.append(data)
            self._regions.append((address, address + data.size, accessible))

    def add_array(self, array: np.ndarray) -> int:
        """Register a whole contiguous array; returns its address."""
        self.add_region(array.ctypes.data, array.reshape(-1).view(np.uint8))
        return array.ctypes.data

    def freeze(self) -> None:
        """Lay out the registered regions; overlapping ones become one."""
        merged: list[list[Any]] = []
        for start, end, accessible in sorted(self._regions, key=lambda r: (r[0], r[1])):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
                merged[-1][2].append((start, end, accessible))
            else:
                merged.append([start, end, [(start, end, accessible)]])
        self.starts, self.ends = [m[0] for m in merged], [m[1] for m in merged]
        self.first, at = [], 0
        for start, end, _ in merged:
            at = (at + 15) // 16 * 16 + start % 16  # positions keep the alignment of addresses
            self.first.append(at)
            at += end - start
        self.total = (at + 15) // 16 * 16
        self._holes(merged)
        self.base = (self.starts[0] if merged else 0) & ~255
        size = ((self.ends[-1] if merged else 0) - self.base + 255) & ~255
        self.view = _views(np.asarray(_RawMemory(self.base, size))) if merged else {}
        self._arrays = [np.array(v, np.int64) for v in (self.starts, self.ends, self.first)]

    def _holes(self, merged: list[list[Any]]) -> None:
        """Counts of the bytes that may not be touched before each position; None where there are none."""
        self.blocked: np.ndarray | None = None
        if all(accessible is None for m in merged for _, _, accessible in m[2]):
            return
        allowed = np.zeros(self.total, bool)
        for (start, _, parts), first in zip(merged, self.first, strict=True):
            for low, high, accessible in parts:
                at = slice(first + low - start, first + high - start)
                allowed[at] |= True if accessible is None else accessible
        self.blocked = np.concatenate([[0], np.cumsum(~allowed)])

    def positions(self, addresses: np.ndarray, size: int, line: str) -> np.ndarray:
        """Positions (dense over all regions) of `size` bytes at each address; every byte must be allowed."""
        if not addresses.size:
            return addresses
        low, high = int(addresses.min()), int(addresses.max())
        r = bisect_right(self.starts, low) - 1
        if r >= 0 and high + size <= self.ends[r]:
            at = addresses - (self.starts[r] - self.first[r])
            bad = None
        else:
            starts, ends, first = self._arrays
            if not starts.size:
                raise PtxError(f"global access out of bounds, no memory is registered: {line}")
            region = np.maximum(np.searchsorted(starts, addresses, "right") - 1, 0)
            bad = (addresses < starts[region]) | (addresses + size > ends[region])
            at = np.where(bad, 0, addresses - starts[region] + first[region])
        if self.blocked is not None:
            hole = self.blocked[at + size] != self.blocked[at]
            bad = hole if bad is None else bad | hole
        if bad is not None and bad.any():
            raise PtxError(
                f"global access out of bounds, {self._describe(int(addresses[bad][0]), size)}: {line}"
            )
        return at

    def _describe(self, address: int, size: int) -> str:
        r = max(0, bisect_right(self.starts, address) - 1)
        start, end = self.starts[r], self.ends[r]
        if start <= address and address + size <= end:
            return f"{size} bytes at {address:#x} are not part of any argument"
        place = (
            f"{address - end} bytes past the end" if address >= start else f"{start - address} bytes before"
        )
        return f"{size} bytes at {address:#x}, {place} of the nearest argument"

    def bytes_at(self, addresses: np.ndarray) -> np.ndarray:
        """The single bytes at (checked) addresses."""
        return self.view[1][addresses - self.base]

    def set_bytes(self, addresses: np.ndarray, values: np.ndarray) -> None:
        self.view[1][addresses - self.base] = values


class Shadow:
    """The last writer and the last readers of every granule, with their clocks.

    Of the readers it keeps the last one, the last one of another warp and the last one of another block: for
    barriers and for whatever orders whole blocks, that is enough to see every write after an unordered read.
    """

    WRITER, READER, OTHER_WARP, OTHER_BLOCK = range(4)

    order: Order  # of the part of the grid that runs now

    def __init__(self, granules: int, name: str, across: bool) -> None:
        """across: threads of several blocks have access."""
        self.name, self.across = name, across
        self.who = np.full((4 if across else 3, granules), -1, np.int32)
        self.when = np.zeros(self.who.shape, np.uint32)
        self.atomic = np.zeros(granules, bool)

    def _check(self, kind: int, units: np.ndarray, lanes: np.ndarray, what: str, line: str) -> None:
        who = self.who[kind][units]
        if (who >= 0).any():
            fine = self.order.before(who, self.when[kind][units], lanes)
            if not fine.all():
                lane, unit = np.argwhere(~fine)[0]
                mine = lanes[lane if len(lanes) > 1 else 0] + self.order.first
                pair = f"thread {mine} after thread {who[lane, unit]}"
                raise PtxError(f"race on {self.name} memory ({what}, {pair}): {line}")

    def read(self, units: np.ndarray, lanes: np.ndarray, line: str) -> None:
        self._check(self.WRITER, units, lanes, "read after write", line)
        last, when = self.who[self.READER][units], self.when[self.READER][units]
        me = lanes[:, None] + self.order.first
        if (last >= 0).any():
            self._keep(self.OTHER_WARP, units, last, when, (last >= 0) & (last // 32 != me // 32), lanes)
            if self.across:
                threads = self.order.threads
                elsewhere = (last >= 0) & (last // threads != me // threads)
                self._keep(self.OTHER_BLOCK, units, last, when, elsewhere, lanes)
        self.who[self.READER][units], self.when[self.READER][units] = me, self.order.clock[lanes][:, None]

    def read_strongly(self, units: np.ndarray, lanes: np.ndarray, line: str) -> None:
        """A read that may meet atomic operations and other strong writes."""
        for i in np.flatnonzero(~self.atomic[units].all(1)):
            self._check(self.WRITER, units[i : i + 1], lanes[i : i + 1], "read after write", line)

    def _keep(
        self,
        kind: int,
        units: np.ndarray,
        last: np.ndarray,
        when: np.ndarray,
        keep: np.ndarray,
        lanes: np.ndarray,
    ) -> None:
        """Move the last reader to another slot, unless the new reader is ordered after it anyway."""
        if keep.any():
            keep &= ~self.order.before(last, when, lanes)
            if keep.any():
                units = np.broadcast_to(units, keep.shape)[keep]
                self.who[kind][units], self.when[kind][units] = last[keep], when[keep]

    def write(self, units: np.ndarray, lanes: np.ndarray, values: np.ndarray | None, line: str) -> None:
        """values: the bytes written, [lanes, bytes]; several lanes may write one value to one place."""
        self._check(self.WRITER, units, lanes, "write after write", line)
        for kind in range(self.READER, len(self.who)):
            self._check(kind, units, lanes, "write after read", line)
        me = lanes[:, None] + self.order.first
        self.who[self.WRITER][units], self.when[self.WRITER][units] = me, self.order.clock[lanes][:, None]
        self.atomic[units] = False
        if (self.who[self.WRITER][units] != me).any():
            self._several_writers(units, values, line)

    def _several_writers(self, units: np.ndarray, values: np.ndarray | None, line: str) -> None:
        if values is None:
            raise PtxError(f"several threads write one {self.name} address: {line}")
        flat, per_unit = units.reshape(-1), values.reshape(units.size, -1)
        by_place = np.argsort(flat, kind="stable")
        same = np.diff(flat[by_place]) == 0
        if (per_unit[by_place][1:] != per_unit[by_place][:-1])[same].any():
            raise PtxError(f"several threads write different values to one {self.name} address: {line}")

    def update(self, units: np.ndarray, lane: int, line: str) -> None:
        """An atomic operation of one lane: ordered with other atomic operations by definition."""
        lanes = np.array([lane])
        if not self.atomic[units].all():
            self._check(self.WRITER, units, lanes, "atomic operation after write", line)
        for kind in range(self.READER, len(self.who)):
            self._check(kind, units, lanes, "atomic operation after read", line)
        self.who[self.WRITER][units] = lane + self.order.first
        self.when[self.WRITER][units] = self.order.clock[lane]
        self.atomic[units] = True


class Space:
    """The parts of one address space that all threads of a launch see, in one array."""

    def __init__(self, name: str, owners: int, size: int, granule: int, owner_of_lane: np.ndarray) -> None:
        self.name, self.size, self.granule, self.owner = name, size, granule, owner_of_lane
        self.stride = (size + 15) // 16 * 16
        self.data = np.full(owners * self.stride, 0xFF, np.uint8)
        self.view = _views(self.data)
        self.ready: np.ndarray | None = np.zeros(len(self.data) // granule, bool)
        self.shadow: Shadow | None = None

    def positions(self, addresses: np.ndarray, size: int, lanes: np.ndarray, line: str) -> np.ndarray:
        if addresses.size and (addresses.min() < 0 or addresses.max() + size > self.size):
            bad = addresses[(addresses < 0) | (addresses + size > self.size)][0]
            raise PtxError(f"{self.name} access out of bounds, {size} bytes at {bad} of {self.size}: {line}")
        return addresses + self.owner[lanes] * self.stride

    def places(self, addresses: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Indices into `view[1]`."""
        return positions

    def units(self, positions: np.ndarray, size: int) -> np.ndarray:
        """[lanes, granules] of accesses."""
        g = self.granule
        first = positions[:, None] // g
        return first if size <= g else first + np.arange(-(-size // g))


class GlobalSpace(Space):
    """Global memory, seen through the registered regions."""

    def __init__(self, memory: GlobalMemory, granule: int) -> None:
        self.name, self.granule, self.memory = "global", granule, memory
        self.view, self.ready, self.shadow = memory.view, None, None
        self.too_early: np.ndarray | None = None  # threads that must wait for the launch before this one

    def positions(self, addresses: np.ndarray, size: int, lanes: np.ndarray, line: str) -> np.ndarray:
        if self.too_early is not None and self.too_early[lanes].any():
            raise PtxError(f"global memory before griddepcontrol.wait: {line}")
        return self.memory.positions(addresses, size, line)

    def places(self, addresses: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return addresses - self.memory.base


# An address in the shared memory of block r of a cluster carries r + 1 above these bits.
RANK_SHIFT = 24


class ClusterSpace(Space):
    """The shared memory of all blocks of a cluster."""

    def __init__(self, shared: Space, order: Order) -> None:
        self.name, self.size, self.granule, self.owner = "shared", shared.size, shared.granule, shared.owner
        self.stride, self.data, self.view = shared.stride, shared.data, shared.view
        self.ready, self.shadow, self.order = shared.ready, None, order
        self.blocks = order.of_cluster // order.threads
        # the clock of each thread at its last access to the block of each rank, and the instruction's line
        self.last = np.zeros((self.blocks, order.n if self.blocks > 1 else 0), np.uint32)
        self.line = ""

    def positions(self, addresses: np.ndarray, size: int, lanes: np.ndarray, line: str) -> np.ndarray:
        rank, own = (addresses >> RANK_SHIFT) - 1, self.owner[lanes]
        if (rank < 0).all():
            return super().positions(addresses, size, lanes, line)
        if (rank >= self.blocks).any():
            raise PtxError(f"no block {rank.max()} in a cluster of {self.blocks}: {line}")
        block = np.where(rank < 0, own, own // self.blocks * self.blocks + rank)
        remote = block != own
        if (self.order.waited[lanes[remote]] == 0).any():
            raise PtxError(f"no cluster barrier before: the other block may not have started: {line}")
        there = lanes[remote]
        self.last[rank[remote], there], self.line = self.order.clock[there], line
        offsets = super().positions(addresses & ((1 << RANK_SHIFT) - 1), size, lanes, line)
        return offsets + (block - own) * self.stride

    def check_exits(self) -> None:
        """No block may have left while its shared memory was still in use."""
        threads = self.order.threads
        for rank, last in enumerate(self.last):
            users = np.flatnonzero(last)
            block = users // self.order.of_cluster * self.blocks + rank
            for left in np.unique(block):
                who, part = users[block == left], self.order.waited[left * threads : (left + 1) * threads]
                knows = left * threads + part.argmax(keepdims=True)
                fine = self.order.before(who[None] + self.order.first, last[who][None], knows)
                if not fine.all():
                    thread = int(who[~fine[0]][0]) + self.order.first
                    raise PtxError(
                        f"the block has left: thread {thread} uses the shared memory of the block of rank "
                        f"{rank}, and no cluster barrier is between that and its end: {self.line}"
                    )


class ParameterSpace(Space):
    """The parameters of a kernel, with gaps between them so that no access leads from one into the next."""

    GAP = 64

    def __init__(self, parameters: dict[str, np.ndarray]) -> None:
        self.addresses, at = {}, self.GAP
        for name, data in parameters.items():
            self.addresses[name] = at
            at += (data.size + 2 * self.GAP - 1) // self.GAP * self.GAP
        super().__init__("param", 1, at, 1, np.zeros(1, np.int64))
        for name, data in parameters.items():
            part = slice(self.addresses[name], self.addresses[name] + data.size)
            self.data[part], self.ready[part] = data, True  # type: ignore[index]

    def positions(self, addresses: np.ndarray, size: int, lanes: np.ndarray, line: str) -> np.ndarray:
        places = np.clip(addresses, 0, self.size - size)[:, None] + np.arange(size)
        bad = (addresses < 0) | (addresses + size > self.size) | ~self.ready[places].all(1)  # type: ignore[index]
        if bad.any():
            raise PtxError(f"access beyond a kernel parameter, {size} bytes: {line}")
        return addresses


class Memories:
    """What one launch can address: global memory, shared memory per block, local memory per thread."""

    def __init__(
        self,
        memory: GlobalMemory,
        order: Order,
        shared_size: int,
        local_size: int,
        granules: dict[str, int],
        parameters: ParameterSpace,
        shadow: Shadow | None,
    ) -> None:
        """shadow: of global memory, kept from earlier parts of the grid; None: races are not checked."""
        threads = np.arange(order.n)
        self.memory, self.order, self.races = memory, order, shadow is not None
        self.strict_proxy = True
        self.block, self.size = threads // order.threads, shared_size
        self.shared = Space("shared", order.blocks, shared_size, granules["shared"], self.block)
        self.local = Space("local", order.n, local_size, granules["local"], threads)
        self.globals = GlobalSpace(memory, granules["global"])
        self.cluster = ClusterSpace(self.shared, order)
        self.spaces = {
            "shared": self.shared,
            "cluster": self.cluster,
            "local": self.local,
            "global": self.globals,
            "const": GlobalSpace(memory, granules["global"]),
            "param": parameters,
        }
        # writer of a granule of shared memory until its fence.proxy.async
        self.unfenced = np.full(len(self.shared.data) // self.shared.granule, -1, np.int32)
        if shadow is not None:
            units = len(self.shared.data) // self.shared.granule
            own = Shadow(units, "shared", order.of_cluster > order.threads)
            self.shared.shadow = self.cluster.shadow = own
            self.globals.shadow, own.order, shadow.order = shadow, order, order

    def _access(
        self, space: Space, addresses: np.ndarray, size: int, lanes: np.ndarray, line: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Checked places (in elements of `size` bytes) and granules of one access per lane."""
        if (addresses & (size - 1)).any():
            raise PtxError(f"misaligned {space.name} access, not a multiple of {size} bytes: {line}")
        at = space.positions(addresses, size, lanes, line)
        return space.places(addresses, at) // size, space.units(at, size)

    def load(
        self,
        space_name: str,
        addresses: np.ndarray,
        size: int,
        lanes: np.ndarray,
        line: str,
        used: int | None = None,
        strong: bool = False,
    ) -> np.ndarray:
        """[lanes, size] bytes; `used`: which bytes the program looks at, where it says so."""
        space = self.spaces[space_name]
        places, units = self._access(space, addresses, size, lanes, line)
        if used is not None:
            g = space.granule
            units = units[:, [k for k in range(units.shape[1]) if used >> k * g & ((1 << g) - 1)]]
        if space.ready is not None and not space.ready[units].all():
            raise PtxError(f"read of uninitialised {space.name} memory: {line}")
        if space.shadow is not None:
            if strong and space is self.globals:
                space.shadow.read_strongly(units, lanes, line)
            else:
                space.shadow.read(units, lanes, line)
        return space.view[size][places].view(np.uint8).reshape(-1, size)

    def store(
        self,
        space_name: str,
        addresses: np.ndarray,
        values: np.ndarray,
        lanes: np.ndarray,
        line: str,
        strong: bool = False,
    ) -> None:
        """values: [lanes, size] bytes."""
        if space_name == "param":
            raise PtxError(f"kernel parameters cannot be written: {line}")
        space, size = self.spaces[space_name], values.shape[1]
        places, units = self._access(space, addresses, size, lanes, line)
        if space.shadow is not None:
            if strong and space is self.globals:
                for i, lane in enumerate(lanes.tolist()):
                    space.shadow.update(units[i : i + 1], lane, line)
            else:
                space.shadow.write(units, lanes, values, line)
        space.view[size][places] = np.ascontiguousarray(values).view(space.view[size].dtype)[:, 0]
        if space.ready is not None:
            space.ready[units] = True
        if space.name == "shared":
            self.unfenced[units] = lanes[:, None]

    def atomic_cell(self, space_name: str, address: int, size: int, lane: int, line: str) -> np.ndarray:
        """A view of the bytes that an atomic operation of one lane changes."""
        if space_name == "param":
            raise PtxError(f"kernel parameters cannot be written: {line}")
        space, one = self.spaces[space_name], np.array([lane])
        places, units = self._access(space, np.array([address]), size, one, line)
        if space.ready is not None and not space.ready[units].all():
            raise PtxError(f"atomic operation on uninitialised {space.name} memory: {line}")
        if space.shadow is not None:
            space.shadow.update(units, lane, line)
        if space.name == "shared":
            self.unfenced[units] = lane
        at = int(places[0]) * size
        return space.view[1][at : at + size]

    # What follows serves the asynchronous copies and matrix products, which work on byte positions.

    def shared_positions(self, addresses: np.ndarray, size: int, lane: int, line: str) -> np.ndarray:
        """[addresses, size] checked positions of bytes of shared memory."""
        at = self.shared.positions(addresses, size, np.full(addresses.shape, lane), line)
        return at[..., None] + np.arange(size)

    def global_read(self, addresses: np.ndarray, size: int, lanes: np.ndarray, line: str) -> None:
        """Check a read whose data is fetched later."""
        at = self.globals.positions(addresses, size, lanes, line)
        if self.globals.shadow is not None and at.size:
            self.globals.shadow.read(self.globals.units(at, size), lanes, line)

    def global_write(self, addresses: np.ndarray, size: int, lanes: np.ndarray, line: str) -> None:
        at = self.globals.positions(addresses, size, lanes, line)
        if self.globals.shadow is not None and at.size:
            self.globals.shadow.write(self.globals.units(at, size), lanes, None, line)

    def shared_units(self, positions: np.ndarray) -> np.ndarray:
        """The granules of byte positions, each once."""
        touched = np.zeros(len(self.shared.data) // self.shared.granule, bool)
        touched[positions // self.shared.granule] = True
        return np.flatnonzero(touched)

    def async_read_starts(
        self,
        positions: np.ndarray,
        units: np.ndarray,
        line: str,
        readers: Sequence[tuple[int, np.ndarray]],
    ) -> Any:
        """The asynchronous proxy will read shared memory any time from now on.

        readers: (thread that waits for it, granules that it reads). Returns what `async_read_ends` needs.
        """
        if not self.shared.ready[units].all():  # type: ignore[index]
            raise PtxError(f"read of uninitialised shared memory: {line}")
        if self.strict_proxy and (self.unfenced[units] >= 0).any():
            raise PtxError(f"operand written without fence.proxy.async: {line}")
        shadow = self.shared.shadow
        if shadow is None:
            return positions, units, line, readers, self.shared.data[positions]
        for lane, part in readers:
            shadow.read(part[None], np.array([lane]), line)
        return positions, units, line, readers, (shadow.who[0][units], shadow.when[0][units])

    def async_read_ends(self, started: Any) -> np.ndarray:
        """The reads have completed: their bytes, which nothing may have written since the start."""
        positions, units, line, readers, before = started
        shadow = self.shared.shadow
        if shadow is None:
            same = np.array_equal(before, self.shared.data[positions])
        else:
            now = shadow.who[0][units], shadow.when[0][units]
            same = all(np.array_equal(a, b) for a, b in zip(before, now, strict=True))
            for lane, part in readers if same else ():
                shadow.read(part[None], np.array([lane]), line)
        if not same or not self.shared.ready[units].all():  # type: ignore[index]
            raise PtxError(f"operand overwritten before it was waited for: {line}")
        return self.shared.data[positions]

    def claim(self, units: np.ndarray, lanes: np.ndarray, line: str) -> None:
        """Destination of an asynchronous copy: nothing may read it until the copy is waited for."""
        if self.shared.shadow is not None:
            self.shared.shadow.write(units, lanes, None, line)
        self.shared.ready[units], self.unfenced[units] = False, -1  # type: ignore[index]


def as_bytes(columns: list[np.ndarray], lanes: int, bits: int) -> np.ndarray:
    """Register columns of `bits` bits, one value or one per lane, as [lanes, bytes]."""
    values = np.empty((lanes, len(columns)), UINT[bits])
    for k, column in enumerate(columns):
        values[:, k] = column
    return values.view(np.uint8)
