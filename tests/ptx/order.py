"""Which accesses happen before which: vector clocks, kept small by what barriers order anyway."""

from __future__ import annotations

import numpy as np


class Order:
    """Every thread has a clock that advances at its synchronisations.

    base: clock of a thread at the last barrier of its block, known to its whole block; warp: what a thread
    learnt of its warp by bar.warp.sync; full: what it learnt of its block by mbarriers; block_knows,
    thread_knows: what a block or a thread learnt of the whole grid by acquire operations; met, waited: what
    the last two barriers of its cluster told, and how many of them a thread has waited for.

    A grid may be executed in parts: `first` is the number of the first thread of this one. The threads of
    earlier parts have lower numbers, and nothing orders them.
    """

    def __init__(self, blocks: int, threads: int, first: int = 0, cluster: int = 1) -> None:
        self.n, self.blocks, self.threads, self.first = blocks * threads, blocks, threads, first
        self.of_cluster = threads * cluster  # threads of a cluster
        self.clock, self.base = np.ones(self.n, np.uint32), np.zeros(self.n, np.uint32)
        self.warp: np.ndarray | None = None
        self.full: np.ndarray | None = None
        self.block_knows: dict[int, np.ndarray] = {}
        self.thread_knows: dict[int, np.ndarray] = {}
        self.met: np.ndarray | None = None  # by the parity of the barrier
        self.gathered = self.base.copy()  # what the threads that have arrived at the next one told
        self.waited = np.zeros(self.n, np.int32)
        self.released: dict[int, np.ndarray] = {}
        # a fence makes the next relaxed operation release, and earlier relaxed reads acquire
        self.fence_clock = np.zeros(self.n, np.uint32)
        self.relaxed_reads: dict[int, set[int]] = {}

    def before(self, who: np.ndarray, when: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Whether what thread `who` (-1: nobody) did at its clock `when` is ordered before `lanes` now.

        `who` counts the threads of the whole grid, `lanes` those of this part.
        """
        me = lanes[:, None]
        fine = (who < 0) | (who == me + self.first)
        if fine.all():
            return fine
        here = True if self.first == 0 else who >= self.first
        who = np.maximum(who - self.first, 0)
        same_block = here if self.blocks == 1 else here & (who // self.threads == me // self.threads)
        fine |= same_block & (when <= self.base[who])
        if fine.all():
            return fine
        if self.warp is not None:
            fine |= here & (who // 32 == me // 32) & (when <= self.warp[me, who % 32])
        if self.full is not None:
            fine |= same_block & (when <= self.full[me, who % self.threads])
        if self.met is not None:
            phase, same_cluster = self.waited[me], here & (who // self.of_cluster == me // self.of_cluster)
            fine |= same_cluster & (phase > 0) & (when <= self.met[phase & 1, who])
        for block, known in self.block_knows.items():
            fine |= here & (me // self.threads == block) & (when <= known[who])
        for lane, known in self.thread_knows.items():
            fine |= here & (me == lane) & (when <= known[who])
        return fine

    def barrier(self, block: int | None = None) -> None:
        """All threads of a block (None: of every block) meet."""
        part = slice(None) if block is None else slice(block * self.threads, (block + 1) * self.threads)
        self.base[part] = self.clock[part]
        self.clock[part] += np.uint32(1)
        if self.met is not None:
            of_blocks = self.waited[part].reshape(-1, self.threads)
            of_blocks[:] = of_blocks.max(1, keepdims=True)
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

    def arrive_at_cluster(self, lanes: np.ndarray, relaxed: bool) -> None:
        """Threads tell their cluster what they know; relaxed, only what a fence of theirs came after."""
        if self.met is None:
            self.met = np.zeros((2, self.n), np.uint32)
        own = (self.fence_clock if relaxed else self.clock)[lanes]
        tells = lanes[own > 0]
        self.clock[lanes] += np.uint32(1)
        telling = np.zeros(self.n, bool)
        telling[tells] = True
        self.gathered[tells] = np.maximum(self.gathered[tells], own[own > 0])
        for size, known in ((self.threads, self.full), (32, self.warp)):
            if known is not None:
                each = known.reshape(-1, size, size).max(1, where=telling.reshape(-1, size, 1), initial=0)
                np.maximum(self.gathered, each.reshape(-1), out=self.gathered)
        blocks = telling.reshape(-1, self.threads).any(1).repeat(self.threads)
        np.maximum(self.gathered, self.base, out=self.gathered, where=blocks)
        for parity in (0, 1):
            knows = telling & (self.waited > 0) & (self.waited & 1 == parity)
            clusters = knows.reshape(-1, self.of_cluster).any(1).repeat(self.of_cluster)
            np.maximum(self.gathered, self.met[parity], out=self.gathered, where=clusters)

    def meet(self, threads: np.ndarray, phases: np.ndarray) -> None:
        """All threads of some clusters (a mask) have arrived; those that wait know what was told."""
        assert self.met is not None
        for parity in (0, 1):
            chosen = threads & (phases & 1 == parity)
            self.met[parity, chosen] = self.gathered[chosen]
        self.gathered[threads] = 0

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
        if self.met is not None and self.waited[lane]:
            first_of_cluster = lane // self.of_cluster * self.of_cluster
            cluster = slice(first_of_cluster, first_of_cluster + self.of_cluster)
            clocks[cluster] = np.maximum(clocks[cluster], self.met[self.waited[lane] & 1, cluster])
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
