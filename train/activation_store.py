"""Activations on disk: written in the background, handed back from memory while they are on their way, read ahead in
the order of a backward pass, and deleted as they are read.

Every store has a folder of its own below the one it is given, and holds a lock on a file in it as long as its process
lives. Whoever opens a store removes the folders of processes that are gone (`sweep`), however they ended.

Stability: internal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jaxinfer.errors import ConfigError, JobError
from jaxinfer.sharding.streamer import Block, Streamer

PREFIX, LOCK = "activations-", "lock"


@dataclasses.dataclass
class Counts:
    """Bytes `written` to the disk, `read` from it, `forwarded` from memory while being written; `pending`: the most
    bytes of host memory that waited to be written; `on_disk`: the most bytes in files at a time."""

    written: int = 0
    read: int = 0
    forwarded: int = 0
    pending: int = 0
    on_disk: int = 0


@dataclasses.dataclass
class Kept:
    """What one ticket stands for: the arrays while they are in memory, and then the file."""

    shapes: list[tuple[tuple[int, ...], np.dtype]]
    nbytes: int
    arrays: list[np.ndarray] | None
    writing: Future | None = None
    on_disk: bool = False
    used: bool = False  # it was read, so that a write that still runs is in vain


class ActivationStore:
    """`write(arrays) -> ticket`, `read(ticket) -> arrays`, in a folder of this process below `folder`.

    budget: bytes of host memory for what waits to be written, and as many again for what is read ahead; a writer waits
    while it is used up. Raises ConfigError for a folder that cannot be written to, JobError where a write fails.
    """

    def __init__(self, folder: str | os.PathLike[str], *, budget: int = 2**28, threads: int = 2):
        parent = Path(folder)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            sweep(parent)
            self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        except OSError as error:
            raise ConfigError(f"{parent}: cannot keep activations here: {error.strerror or error}") from None
        self._lock_file = (self.folder / LOCK).open("wb")
        fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.counts, self.budget, self._threads = Counts(), budget, threads
        self._events: list[tuple[float, int]] = []  # time and bytes of each write since the profile began
        self._busy, self._at_work, self._since = 0.0, 0, 0.0  # seconds in which a thread used the disk
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="jaxinfer-activations")
        self._changed = threading.Condition()
        self._kept: dict[int, Kept] = {}
        self._pending = self._on_disk = self._last = 0
        self._failure: OSError | None = None
        self._ahead: Streamer | None = None  # of the backward pass that is running
        self._order: dict[int, int] = {}  # its tickets and their places in it
        self._finalizer = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._kept)

    def write(self, arrays: Sequence[np.ndarray]) -> int:
        """Begin to write copies of `arrays`; the ticket that `read` takes once."""
        shapes = [(array.shape, array.dtype) for array in arrays]
        nbytes = sum(array.nbytes for array in arrays)
        with self._changed:
            self._check()
            while self._pending and self._pending + nbytes > self.budget:
                self._changed.wait()
                self._check()
            self._pending += nbytes
            self.counts.pending = max(self.counts.pending, self._pending)
            self._last += 1
            ticket = self._last
        # A copy: the arrays may be the program's own memory, which it uses again when this returns.
        kept = Kept(shapes, nbytes, [np.array(array, copy=True) for array in arrays])
        with self._changed:
            self._kept[ticket] = kept
            self._events.append((time.perf_counter(), nbytes))
            kept.writing = self._pool.submit(self._write, ticket, kept)
        return ticket

    def read(self, ticket: int) -> list[np.ndarray]:
        """The arrays of `ticket`, which is used up. A backward pass reads in the reverse order of the writes, and that
        is what is read ahead."""
        with self._changed:
            self._check()
            if ticket not in self._kept:
                raise JobError(f"activations {ticket} were read before, or never written")
            before = self._ahead
            if before is None or ticket not in self._order:
                self._begin(ticket)
            ahead, place = self._ahead, self._order.pop(ticket)
        assert ahead is not None
        if before is not None and before is not ahead:
            before.close()  # without the lock, which its threads may wait for
        arrays = ahead.take(place)
        ahead.release()
        with self._changed:
            kept = self._kept.pop(ticket)
            kept.used = True
            if kept.writing is not None and kept.writing.cancel():
                self._forget(kept)
            elif kept.on_disk:
                self._delete(ticket, kept)
        return arrays

    def begin_profile(self) -> float:
        """Forget what was recorded; the time now."""
        with self._changed:
            self._events, self._busy = [], 0.0
        return time.perf_counter()

    def end_profile(self) -> tuple[list[tuple[float, int]], float]:
        """`(time, bytes)` of each write since the profile began, and the seconds in which the disk was used. Waits for
        writes to end."""
        with self._changed:
            while self._pending and self._failure is None:
                self._changed.wait()
            return list(self._events), self._busy

    def close(self) -> None:
        """Waits for the threads, then removes the folder with all that is in it."""
        with self._changed:
            ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._finalizer()
        self._lock_file.close()
        self._kept.clear()

    def path(self, ticket: int) -> Path:
        """The file of a ticket, while there is one."""
        return self.folder / f"{ticket}.bin"

    def _begin(self, ticket: int) -> None:
        """A backward pass begins at `ticket`: all older ones will follow it, newest first."""
        order = sorted((t for t in self._kept if t <= ticket), reverse=True)
        self._order = {t: place for place, t in enumerate(order)}
        blocks = [Block(f"activations {t}", self._kept[t].nbytes, functools.partial(self._load, t)) for t in order]
        least = sum(sorted((block.nbytes for block in blocks), reverse=True)[:2])
        self._ahead = Streamer(blocks, budget=max(self.budget, least), threads=self._threads)

    def _load(self, ticket: int) -> list[np.ndarray]:
        kept = self._kept[ticket]
        with self._changed:
            if kept.arrays is not None:  # its write has not ended: what is in memory is handed on
                self.counts.forwarded += kept.nbytes
                return kept.arrays
        return self._read(ticket, kept)

    def _write(self, ticket: int, kept: Kept) -> None:
        try:
            with self._using_disk(), self.path(ticket).open("wb") as file:
                for array in kept.arrays or ():
                    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        except OSError as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()
            return
        with self._changed:
            self._forget(kept)
            kept.on_disk = True
            self.counts.written += kept.nbytes
            self._on_disk += kept.nbytes
            self.counts.on_disk = max(self.counts.on_disk, self._on_disk)
            if kept.used:
                self._delete(ticket, kept)

    def _delete(self, ticket: int, kept: Kept) -> None:
        """Remove the file of what was used; the caller holds the lock."""
        self.path(ticket).unlink()
        self._on_disk -= kept.nbytes

    def _forget(self, kept: Kept) -> None:
        """The store needs the arrays no more; the caller holds the lock."""
        kept.arrays = None
        self._pending -= kept.nbytes
        self._changed.notify_all()

    def _read(self, ticket: int, kept: Kept) -> list[np.ndarray]:
        with self._using_disk():
            raw = np.fromfile(self.path(ticket), np.uint8)
        if raw.nbytes != kept.nbytes:
            raise JobError(f"{self.path(ticket)}: got {raw.nbytes} bytes, wrote {kept.nbytes}; the file was changed")
        with self._changed:
            self.counts.read += kept.nbytes
        found, at = [], 0
        for shape, dtype in kept.shapes:
            size = int(np.prod(shape)) * dtype.itemsize
            found.append(raw[at : at + size].view(dtype).reshape(shape))
            at += size
        return found

    @contextlib.contextmanager
    def _using_disk(self) -> Iterator[None]:
        with self._changed:
            self._at_work += 1
            if self._at_work == 1:
                self._since = time.perf_counter()
        try:
            yield
        finally:
            with self._changed:
                self._at_work -= 1
                if self._at_work == 0:
                    self._busy += time.perf_counter() - self._since

    def _check(self) -> None:
        if self._failure is not None:
            full = self._failure.errno == errno.ENOSPC
            reason = "no space left on device" if full else self._failure.strerror or str(self._failure)
            raise JobError(f"cannot write activations below {self.folder.parent}: {reason}")


def sweep(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove what stores of processes that are gone left below `folder`; the folders removed."""
    removed = []
    for left in sorted(Path(folder).glob(f"{PREFIX}*")):
        try:
            with (left / LOCK).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:  # killed between the folder and its lock, or being made right now
            if time.time() - left.stat().st_mtime < 60:
                continue
        except OSError:  # its process lives
            continue
        shutil.rmtree(left, ignore_errors=True)
        removed.append(left)
    return removed
