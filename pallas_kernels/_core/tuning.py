"""Block sizes: a table measured on the device, else the op's own rule.

`pallas_kernels/tuned/<device>.json` holds `{op: {dtype: {bucket: [block, ...]}}}`. A bucket names the call's sizes,
each rounded up to a power of two: `"2048x2048x64"`. A table is data that was measured; nothing is tuned while running.

Stability: internal.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.sharding import get_abstract_mesh

TABLES = Path(__file__).parent.parent / "tuned"


def block(
    op: str,
    dtype: str,
    sizes: Sequence[int],
    heuristic: Callable[[], tuple[int, ...]],
    *,
    device: str | None = None,
    serves: Callable[[tuple[int, ...]], bool] = lambda block: True,
) -> tuple[int, ...]:
    """Block sizes for `op` at `sizes`: those in the device's table, if they serve this very call, or the rule.

    The device is where the call runs, or, where that is of another make than `device`, `device`: a program for an H200
    that is traced on a CPU takes the H200's table, and one on an H100 the H100's. A bucket holds several sizes, so
    `serves` says whether blocks that were measured for one of them can be taken here.
    """
    found = _table(device_for(device)).get(op, {}).get(dtype, {}).get(bucket(sizes))
    return tuple(found) if found and serves(tuple(found)) else heuristic()


def device_for(device: str | None) -> str:
    """The kind of the device that a trace is for; `device` where that one's first word is another."""
    here = device_kind()
    return here if device is None or here.split()[0] == device.split()[0] else device


def bucket(sizes: Sequence[int]) -> str:
    """The sizes rounded up to powers of two, as tables name them."""
    return "x".join(str(1 << max(0, size - 1).bit_length()) for size in sizes)


def device_kind() -> str:
    """The device that a trace is for: the abstract mesh's where one is in use, else the default device."""
    abstract = getattr(get_abstract_mesh(), "abstract_device", None)
    return abstract.device_kind if abstract is not None else jax.devices()[0].device_kind


def table_path(device: str) -> Path:
    """Where the table of a kind of device lies."""
    return TABLES / f"{device.lower().replace(' ', '_')}.json"


@functools.cache
def _table(device: str) -> dict[str, dict[str, dict[str, list[int]]]]:
    path = table_path(device)
    return json.loads(path.read_text()) if path.exists() else {}
