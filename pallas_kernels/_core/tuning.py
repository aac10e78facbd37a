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
    op: str, dtype: str, sizes: Sequence[int], heuristic: Callable[[], tuple[int, ...]], *, device: str | None = None
) -> tuple[int, ...]:
    """Block sizes for `op` at `sizes`: those in the table of `device` (default: where it runs), or the rule."""
    table = _table(device or device_kind())
    found = table.get(op, {}).get(dtype, {}).get(bucket(sizes))
    return tuple(found) if found else heuristic()


def bucket(sizes: Sequence[int]) -> str:
    """The sizes rounded up to powers of two, as tables name them."""
    return "x".join(str(1 << max(0, size - 1).bit_length()) for size in sizes)


def device_kind() -> str:
    """The device that a trace is for: the abstract mesh's where one is in use, else the default device."""
    abstract = getattr(get_abstract_mesh(), "abstract_device", None)
    return abstract.device_kind if abstract is not None else jax.devices()[0].device_kind


@functools.cache
def _table(device: str) -> dict[str, dict[str, dict[str, list[int]]]]:
    path = TABLES / f"{device.lower().replace(' ', '_')}.json"
    return json.loads(path.read_text()) if path.exists() else {}
