"""Which machine this is, and whether anything else is running on it.

Stability: experimental.
"""

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")


def machine() -> dict[str, Any]:
    """Devices, processor, memory, versions and commit, as a results file keeps them."""
    device = jax.devices()[0]
    return {
        "device": device_name(),
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processor": _proc_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "memory": _proc_field("/proc/meminfo", "MemTotal"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _commit(),
    }


def device_name() -> str:
    """A word for file names: `cpu`, `nvidia-h200`, `tpu-v5-lite`."""
    device = jax.devices()[0]
    return "cpu" if device.platform == "cpu" else device.device_kind.lower().replace(" ", "-")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _proc_field(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key), None)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The checkout's commit, with `+changes` if tracked files differ from it; None for an installed copy."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True, timeout=20).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


@dataclasses.dataclass(frozen=True)
class Load:
    """`others` is the share of all cores that other processes used while we looked, None where that cannot be read;
    `average` the system's load averages, which also remember what we did ourselves."""

    others: float | None
    average: tuple[float, ...]
    seconds: float
    cores: int

    def __str__(self) -> str:
        average = " ".join(f"{x:.2f}" for x in self.average) or "unknown"
        if self.others is None:
            return f"load average {average} on {self.cores} cores"
        return f"others use {self.others:.0%} of {self.cores} cores over {self.seconds:.1f} s, load average {average}"


def _busy_seconds() -> float | None:
    """Seconds that all cores of the system have been busy or taken away from it, since it started."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (fields + [0] * 8)[:8]
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def load(
    seconds: float = 1.0,
    *,
    busy: Callable[[], float | None] = _busy_seconds,
    own: Callable[[], float] = time.process_time,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.perf_counter,
) -> Load:
    """Watch the machine for some seconds: how busy do other processes keep it?"""
    before, mine, start = busy(), own(), clock()
    sleep(seconds)
    after, mine, elapsed = busy(), own() - mine, clock() - start
    total = os.cpu_count() or 1
    others = None
    if before is not None and after is not None:
        others = min(1.0, max(0.0, (after - before - mine) / (elapsed * total)))
    average = os.getloadavg() if hasattr(os, "getloadavg") else ()
    return Load(others, tuple(average), elapsed, total)


def quiet(
    limit: float = 0.05, *, seconds: float = 1.0, reading: Load | None = None, file: TextIO | None = None
) -> bool:
    """Whether other processes use at most `limit` of the cores; prints the load (stderr). Never true of the unknown.

    Where the share cannot be read, the last minute's load average decides, and our own work counts against us.
    It sees the processors only: a GPU shared with other processes looks quiet.
    """
    reading = reading or load(seconds)
    share = reading.others
    if share is None:
        share = reading.average[0] / reading.cores if reading.average else 1.0
    verdict = share <= limit
    print(f"{'quiet' if verdict else 'BUSY'}: {reading}", file=file or sys.stderr)
    return verdict
