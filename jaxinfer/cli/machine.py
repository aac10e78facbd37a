"""What this machine is: versions, processor, memory, devices, forms of operations, packaged models.

Stability: internal.
"""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

# What each package is for, where it is no part of the core.
PACKAGES = {
    "jaxinfer": "",
    "jax": "core",
    "jaxlib": "core",
    "flax": "core",
    "numpy": "core",
    "tokenizers": "core",
    "optax": "training",
    "orbax-checkpoint": "training",
    "pyarrow": "Parquet files (extra: data)",
    "huggingface_hub": "models by name",
    "llguidance": "grammars (extra: grammar)",
    "matplotlib": "plots (extra: plot)",
    "ray": "clusters of batch workers (extra: ray)",
    "torch": "comparisons (extra: peers)",
    "transformers": "comparisons (extra: peers)",
}
# Instruction sets that matter to matrix products, as /proc/cpuinfo spells them.
FEATURES = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "sve", "bf16", "i8mm"),
)


def report() -> dict[str, Any]:
    """Everything that `jaxinfer doctor` shows, as JSON values."""
    from jaxinfer.cli import compiled
    from jaxinfer.cli.forms import forms

    return {
        "versions": {name: {"version": _version(name), "for": what} for name, what in PACKAGES.items()},
        "host": _host(),
        "memory": host_memory(),
        "devices": _devices(),
        "compilation_cache": str(compiled.cache_directory()),
        "forms": forms(),
        "models": _models(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _host() -> dict[str, Any]:
    from jaxinfer.measure import host

    fields = _colon_file(Path("/proc/cpuinfo"))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    try:
        load = os.getloadavg()[0]
    except OSError:
        load = None
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": host.cores(),
        "features": [name for name in FEATURES if name in flags],
        "load": load,
    }


def host_memory() -> dict[str, int]:
    """Bytes of host memory, `total` and `available`: the machine's, or the container's where that is less."""
    info = {k: int(v.split()[0]) * 1024 for k, v in _colon_file(Path("/proc/meminfo")).items() if v.split()}
    if "MemTotal" in info:
        total, available = info["MemTotal"], info.get("MemAvailable", info["MemTotal"])
    else:
        total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, used in _container_limits():
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return {"total": total, "available": available}


def _container_limits() -> list[tuple[int, int]]:
    """(limit, used without the page cache that can be dropped) of this control group, versions 2 and 1."""
    found = []
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most = int((Path(folder) / limit).read_text())
            now = int((Path(folder) / used).read_text())
            stat = dict(line.split() for line in (Path(folder) / "memory.stat").read_text().splitlines())
            found.append((most, now - int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))))
        except (OSError, ValueError):  # "max": no limit; or another version of control groups
            continue
    return found


def _colon_file(path: Path) -> dict[str, str]:
    """`name: value` lines; of repeated names the first counts."""
    fields: dict[str, str] = {}
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    return fields


def _devices() -> list[dict[str, Any]]:
    import jax

    return [
        {"id": d.id, "platform": d.platform, "kind": d.device_kind, "memory": _stats(d).get("bytes_limit")}
        for d in jax.local_devices()
    ]


def _stats(device: Any) -> dict[str, int]:
    """What the device says of its memory; a CPU says nothing."""
    return device.memory_stats() or {}


def available_memory() -> tuple[int, str]:
    """Bytes that weights, cache and work may take on the default device, and where that is."""
    import jax

    device = jax.local_devices()[0]
    stats = _stats(device)
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0), f"{device.device_kind} {device.id}"
    return host_memory()["available"], "this machine"


def _models() -> list[dict[str, Any]]:
    from jaxinfer.checkpoint import hub
    from jaxinfer.errors import CheckpointError

    models = []
    for name in hub.PACKAGED:
        try:
            directory = hub.resolve(name)
            held = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
            models.append({"name": name, "state": "installed", "bytes": held})
        except CheckpointError as error:
            models.append({"name": name, "state": f"missing: {error}", "bytes": None})
    return models
