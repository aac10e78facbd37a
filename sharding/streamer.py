"""Blocks of bytes from disk or host, loaded ahead of their use by a few threads, never more of them than a budget.

What streams is a list of blocks in the order of their use: the weights of a model's layers, which come round again
with every token (TPI-LLM, `sharding.layer_stream`), or the activations that a backward pass asks for from the last
layer to the first (SSDTrain, `train.disk_offload`). A block counts against the budget from the moment that its load is
begun until it is released, and no load is begun that would not fit.

Stability: internal.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jaxinfer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Block:
    """`load()` gives the block's contents, of `nbytes`; `release(contents)` is told when they are not needed any more,
    so that it may use their memory again."""

    name: str
    nbytes: int
    load: Callable[[], Any]
    release: Callable[[Any], None] | None = None


@dataclasses.dataclass
class Counts:
    """`loads` and the `bytes` of them, `waited` seconds in `take` for blocks that were late, `peak` bytes held."""

    loads: int = 0
    bytes: int = 0
    waited: float = 0.0
    peak: int = 0


class Streamer:
    """`take(i)` gives block i and begins to load those after it, as many as fit into `budget` bytes.

    wrap: after the last block comes the first. takers: how many users take each block; a taker holds what it took until
    it takes the next, and a block is released when all of them are done with it.
    A block out of turn is served too: what was loaded ahead and taken by nobody is dropped for it.
    Raises ConfigError for a budget that does not hold the largest block and one to load meanwhile.
    """

    def __init__(self, blocks: Sequence[Block], *, budget: int, threads: int = 2, wrap: bool = False, takers: int = 1):
        least = sum(sorted((block.nbytes for block in blocks), reverse=True)[:2])
        if budget < least:
            raise ConfigError(f"budget: got {budget} bytes, accepts {least} or more: the two largest blocks")
        self.counts = Counts()
        self._blocks, self._budget, self._wrap, self._takers = blocks, budget, wrap, takers
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="jaxinfer-stream")
        self._ahead: collections.deque[int] = collections.deque()  # begun, and taken by nobody yet
        self._loads: dict[int, Future] = {}
        self._taken: dict[int, set[int]] = {}  # block: who took it
        self._done: dict[int, set[int]] = {}  # and who of them is done with it
        self._holds: dict[int, int] = {}  # taker: the block that it holds
        self._next: int | None = 0 if blocks else None
        self._held = 0

    def __enter__(self) -> Streamer:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    @property
    def window(self) -> int:
        """How many of the largest blocks the budget holds."""
        return self._budget // max(block.nbytes for block in self._blocks)

    def take(self, index: int, taker: int = 0) -> Any:
        """The contents of block `index`, which `taker` may use until it takes another; raises what its load raised."""
        with self._changed:
            self._let_go(taker)
            begun = time.perf_counter()
            if taker in self._done.get(index, ()):
                self._restart(index)  # this use of the block is over: the others were stopped in the middle
            while index not in self._loads:
                self._check_open()
                # What is next in turn waits for a slower taker to make room; anything else was not expected.
                if index != self._next or not self._taken:
                    self._restart(index)
                else:
                    self._changed.wait()
            self._holds[taker] = index
            self._taken.setdefault(index, set()).add(taker)
            if index in self._ahead:
                self._ahead.remove(index)
            load = self._loads[index]
        try:
            contents = load.result()
        except BaseException:
            with self._changed:
                self._let_go(taker)
            raise
        with self._changed:
            self.counts.waited += time.perf_counter() - begun
            self._fill()
        return contents

    def release(self, taker: int = 0) -> None:
        """`taker` is done with what it holds."""
        with self._changed:
            self._let_go(taker)
            self._fill()

    def close(self) -> None:
        """Waits for loads that run, and lets everything go."""
        with self._changed:
            self._next = None
            self._drop_ahead()
            self._drop_taken()
            self._blocks = ()
            self._changed.notify_all()
        self._pool.shutdown(wait=True)

    def _check_open(self) -> None:
        if not self._blocks:
            raise RuntimeError("a block was taken from a streamer that is closed")

    def _let_go(self, taker: int) -> None:
        index = self._holds.pop(taker, None)
        if index is None:
            return
        self._done.setdefault(index, set()).add(taker)
        if len(self._done[index]) == self._takers:
            del self._taken[index], self._done[index]
            self._free(index)
        self._changed.notify_all()

    def _free(self, index: int) -> None:
        block, load = self._blocks[index], self._loads.pop(index)
        if not load.cancel() and load.exception() is None and block.release is not None:
            block.release(load.result())
        self._held -= block.nbytes

    def _drop_ahead(self) -> None:
        for index in list(self._ahead):
            self._free(index)
        self._ahead.clear()

    def _drop_taken(self) -> None:
        for index in list(self._taken):
            self._free(index)
        self._taken.clear()
        self._done.clear()
        self._holds.clear()

    def _restart(self, index: int) -> None:
        """Begin again at `index`: also after a user was stopped in the middle and left what it held."""
        self._drop_ahead()
        self._drop_taken()
        self._next = index
        self._fill()

    def _fill(self) -> None:
        while self._next is not None and self._next not in self._loads:
            block = self._blocks[self._next]
            if self._held + block.nbytes > self._budget:
                return
            self._held += block.nbytes
            self.counts.loads += 1
            self.counts.bytes += block.nbytes
            self.counts.peak = max(self.counts.peak, self._held)
            self._loads[self._next] = self._pool.submit(block.load)
            self._ahead.append(self._next)
            following = self._next + 1
            self._next = following if following < len(self._blocks) else 0 if self._wrap else None
            self._changed.notify_all()
