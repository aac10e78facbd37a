"""Who works on what, in files that many workers share: exclusive creation, leases that expire, orphans swept.

A lease is a file that names its worker. Its holder touches it while it makes progress; others take it over when its
process is seen to be dead (same machine) or when they have watched it stay untouched for the lease's time by their
own clock, so that clocks that disagree do no harm. Leases only save work: results are deterministic and the first
commit of a shard wins, so a worker that lost its lease without noticing changes nothing.

Stability: internal.
"""

import errno
import hashlib
import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from jaxinfer.errors import JobError


class Disk:
    """The file operations that the protocol rests on. Tests put one in that dies in the middle of them."""

    def write(self, path: Path, chunks: Iterable[bytes], *, durable: bool = True) -> None:
        """Writes a new file and, if `durable`, waits until it is on the disk. FileNotFoundError without its folder."""
        try:
            with path.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        except FileNotFoundError:
            raise
        except OSError as error:
            path.unlink(missing_ok=True)
            raise JobError(f"{path.parent}: cannot be written ({error.strerror or error})") from None

    def link(self, temporary: Path, path: Path, *, durable: bool = True) -> bool:
        """Gives a written file its name, for good; False where the name is taken. `temporary` is gone afterwards."""
        try:
            os.link(temporary, path)
            created = True
        except FileExistsError:
            created = False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            raise JobError(
                f"{path.parent}: got a file system without hard links ({error.strerror}); accepted: one with them, "
                "since a commit that can be neither lost nor doubled needs them. Put --output on another disk"
            ) from None
        temporary.unlink(missing_ok=True)
        if durable:
            self.sync_folder(path.parent)
        return created

    def sync_folder(self, folder: Path) -> None:
        """Makes the names in a folder durable, where the system can."""
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError:
            return
        try:
            os.fsync(handle)
        except OSError:
            pass
        finally:
            os.close(handle)


@dataclass(frozen=True)
class Process:
    """A process that can be told from every other one, also from a later one of the same number."""

    host: str
    pid: int
    started: str

    @classmethod
    def this(cls) -> "Process":
        return cls(_host(), os.getpid(), _started(os.getpid()) or "")

    def is_dead(self) -> bool:
        """Whether it certainly ended; False where that cannot be known from here (another machine)."""
        if self.host != _host():
            return False
        started = _started(self.pid)
        if started is not None:
            return started != self.started
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return _started(os.getpid()) is not None  # /proc is there and shows no living process of this number


def _host() -> str:
    """The machine, this boot of it, and the space that process numbers live in (containers share names)."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        pass
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:12]


def _started(pid: int) -> str | None:
    """When a living process began, in clock ticks since the boot; None for none, or for one that is only a corpse."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]


@dataclass
class Scratch:
    """Names for a worker's temporary files, which say whose they are."""

    folder: Path
    process: Process
    _numbers: Iterable[int] = field(default_factory=itertools.count)

    def new(self, label: str) -> Path:
        number = next(iter(self._numbers))
        p = self.process
        return self.folder / f"{label}.{p.host}.{p.pid}.{p.started}.{number}-{secrets.token_hex(4)}.tmp"

    def sweep(self) -> int:
        """Removes what dead processes of this machine left behind; returns how many files."""
        swept = 0
        for path in self.folder.glob("*.tmp"):
            parts = path.name.split(".")
            if len(parts) >= 6 and parts[-4].isdigit() and Process(parts[-5], int(parts[-4]), parts[-3]).is_dead():
                path.unlink(missing_ok=True)
                swept += 1
        return swept


@dataclass
class Lease:
    """A claim on one name, held through an open file: touching it can never touch a successor's."""

    path: Path
    handle: int

    def touch(self) -> None:
        os.utime(self.handle)

    def release(self) -> None:
        """Gives the name back, unless another worker has taken it over."""
        try:
            mine, there = os.fstat(self.handle), os.stat(self.path)
            if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
                self.path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        finally:
            os.close(self.handle)


@dataclass
class Leases:
    """Leases in one folder. `seconds`: how long an untouched lease of a worker that may still live is respected."""

    folder: Path
    scratch: Scratch
    disk: Disk
    seconds: float
    clock: Callable[[], float] = time.monotonic
    _watched: dict[str, tuple[bytes, int, float]] = field(default_factory=dict)

    def claim(self, name: str) -> Lease | None:
        """The lease on `name`, or None while another worker holds it."""
        path = self.folder / name
        if path.exists() and not (self._is_stale(name, path) and self._bury(name, path)):
            return None
        p = self.scratch.process
        owner = {"host": p.host, "pid": p.pid, "started": p.started, "nonce": secrets.token_hex(8)}
        temporary = self.scratch.new(f"lease-{name}")
        self.disk.write(temporary, [json.dumps(owner).encode()], durable=False)
        handle = os.open(temporary, os.O_RDWR)
        if self.disk.link(temporary, path, durable=False):
            return Lease(path, handle)
        os.close(handle)
        return None

    def held(self) -> dict[str, bytes]:
        """Which names are leased, and to which process (told apart, not named)."""
        out = {}
        for path in self.folder.iterdir():
            try:
                owner = json.loads(path.read_bytes())
                out[path.name] = json.dumps([owner[key] for key in ("host", "pid", "started")]).encode()
            except (OSError, ValueError, KeyError, TypeError):
                out[path.name] = b""
        return out

    def _is_stale(self, name: str, path: Path) -> bool:
        try:
            content, touched = path.read_bytes(), path.stat().st_mtime_ns
        except FileNotFoundError:
            self._watched.pop(name, None)
            return False  # given back just now: the next round may claim it
        watched = self._watched.get(name)
        if watched is None or watched[:2] != (content, touched):
            watched = self._watched[name] = (content, touched, self.clock())
        try:
            owner = json.loads(content)
            if Process(owner["host"], owner["pid"], owner["started"]).is_dead():
                return True
        except (ValueError, KeyError, TypeError):
            pass  # not a lease that we wrote: it can only expire
        return self.clock() - watched[2] > self.seconds

    def _bury(self, name: str, path: Path) -> bool:
        """Takes a stale lease out of the way. Another worker may have been quicker and already hold a new one."""
        stale = self._watched.pop(name)[0]
        tomb = self.scratch.new(f"dead-{name}")
        try:
            os.rename(path, tomb)
        except FileNotFoundError:
            return True
        ours = tomb.read_bytes() == stale
        if not ours:
            self.disk.link(tomb, path, durable=False)  # it was a living one: put it back
        tomb.unlink(missing_ok=True)
        return ours
