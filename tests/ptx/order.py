"""Which accesses happen before which: vector clocks, kept small by what barriers order anyway."""

from __future__ import annotations

import numpy as np


class Order:
    """Every thread has a clock that advances at its synchronisations.

    base: clock of a thread at the last barrier of its block, known to its whole block; warp: what a thread
    learnt of its warp by bar.warp.sync; full: what it learnt of its block by mbarriers; block_knows,
    thread_knows: what a block or a thread learnt of the whole grid by acquire operations.
    """

    def __init__(self, blocks: int, threads: int) -> None:
        self.n, self.blocks, self.threads = blocks * threads, blocks, threads
        self.clock, self.base = np.ones(self.n, np.uint32), np.zeros(self.n, np.uint32)
        self.warp: np.ndarray | None = None
        self.full: np.ndarray | None = None
        self.block_knows: dict[int, np.ndarray] = {}
        self.thread_knows: dict[int, np.ndarray] = {}
        self.released: dict[int, np.ndarray] = {}
        # a fence makes the next relaxed operation release, and earlier relaxed reads acquire
        self.fence_clock = np.zeros(self.n, np.uint32)
        self.relaxed_reads: dict[int, set[int]] = {}

    def before(self, who: np.ndarray, when: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Whether what thread `who` (-1: nobody) did at its clock `when` is ordered before `lanes` now."""
        me = lanes[:, None]
        fine = (who < 0) | (who == me)
        if fine.all():
            return fine
        who = np.maximum(who, 0)
        same_block = True if self.blocks == 1 else who // self.threads == me // self.threads
        fine |= same_block & (when <= self.base[who])
        if fine.all():
            return fine
        if self.warp is not None:
            fine |= (who // 32 == me // 32) & (when <= self.warp[me, who % 32])
        if self.full is not None:
            fine |= same_block & (when <= self.full[me, who % self.threads])
        for block, known in self.block_knows.items():
            fine |= (me // self.threads == block) & (when <= known[who])
        for lane, known in self.thread_knows.items():
            fine |= (me == lane) & (when <= known[who])
        return fine

    def barrier(self, block: int | None = None) -> None:
        """All threads of a block (None: of every block) meet."""
        part = slice(None) if block is None else slice(block * self.threads, (block + 1) * self.threads)
        self.base[part] = self.clock[part]
        self.clock[part] += np.uint32(1)
        for lane in [x for x in self.thread_knows if block is None or x // self.threads == block]:
            home, known = lane // self.threads, self.thread_knows.pop(lane)
            older = self.block_knows.get(home)
            self.block_knows[home] = known if older is None else np.maximum(older, known)

    def warp_sync(self, selected: np.ndarray) -> None:
        """The selected threads of each warp meet."""
        if self.warp is None:
            self.warp = np.zeros((self.n, 32), np.uint32)
        known = self.warp.reshape(-1, 32, 32).copy()
        known[:, np.arange(32), np.arange(32)] = self.clock.reshape(-1, 32)
        known[~selected.reshape(-1, 32)] = 0
        self.warp[selected] = known.max(1).repeat(32, 0)[selected]
        self.clock[selected] += np.uint32(1)

    def known(self, lane: int) -> np.ndarray:
        """Everything that happened before this point of a thread: a clock for every thread of the grid."""
        first_of_block, first_of_warp = lane // self.threads * self.threads, lane // 32 * 32
        block, warp = (slice(a, a + n) for a, n in ((first_of_block, self.threads), (first_of_warp, 32)))
        older = self.block_knows.get(lane // self.threads)
        clocks = np.zeros(self.n, np.uint32) if older is None else older.copy()
        clocks[block] = np.maximum(clocks[block], self.base[block])
        if self.full is not None:
            clocks[block] = np.maximum(clocks[block], self.full[lane])
        if self.warp is not None:
            clocks[warp] = np.maximum(clocks[warp], self.warp[lane])
        clocks[lane] = self.clock[lane]
        return np.maximum(clocks, self.thread_knows[lane]) if lane in self.thread_knows else clocks

    def acquire(self, lane: int, address: int) -> None:
        """A thread sees what was released at a global address."""
        if address in self.released:
            seen = self.released[address]
            older = self.thread_knows.get(lane)
            self.thread_knows[lane] = seen if older is None else np.maximum(older, seen)

    def release(self, lane: int, address: int, own_clock: int | None = None) -> None:
        """Whoever acquires at the address learns what this thread knows, of itself up to `own_clock`."""
        known, older = self.known(lane), self.released.get(address)
        if own_clock is not None:
            known[lane] = own_clock
        self.released[address] = known if older is None else np.maximum(older, known)
        self.clock[lane] += np.uint32(1)

    def fence(self, lanes: np.ndarray) -> None:
        """A fence of the whole device, in the given threads."""
        self.fence_clock[lanes] = self.clock[lanes]
        self.clock[lanes] += np.uint32(1)
        for lane in set(self.relaxed_reads).intersection(lanes.tolist()):
            for address in self.relaxed_reads.pop(lane):
                self.acquire(lane, address)

    def strong_read(self, lane: int, address: int, acquires: bool) -> None:
        """A read that synchronises: at once, or at the next fence."""
        if acquires:
            self.acquire(lane, address)
        elif address in self.released:
            self.relaxed_reads.setdefault(lane, set()).add(address)

    def strong_write(self, lane: int, address: int, releases: bool) -> None:
        """A write that synchronises: by itself, or because a fence came before it."""
        if releases:
            self.release(lane, address)
        elif self.fence_clock[lane]:
            self.release(lane, address, int(self.fence_clock[lane]))
