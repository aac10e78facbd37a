"""Writing safetensors directories: streamed tensor by tensor, sharded above a size, and never half visible.

Files are written under temporary names in the same directory, flushed to disk and then renamed; where shards replace
shards the old index goes first, so that a save that is killed leaves the old checkpoint, the new one, or a directory
that says it has no weights, and never a mixture.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxinfer.checkpoint.safetensors_io import DTYPES, INDEX, MAX_HEADER, SINGLE, read_json
from jaxinfer.errors import CheckpointError, InputError

_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to be written. `data()` is called once, when its turn comes, and gives `shape` and `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    data: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def save(
    directory: str | os.PathLike[str],
    entries: Sequence[Entry],
    *,
    max_shard_size: int = 5 * 2**30,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write `entries` as `model.safetensors`, or as shards of at most `max_shard_size` bytes and their index.

    One tensor is in host memory at a time. `metadata` defaults to `{"format": "pt"}`, which transformers asks for. In
    several processes all must call (gathering a tensor may be collective), and process 0 writes. Returns the files.
    """
    directory = Path(directory)
    _check(entries)
    if jax.process_index() != 0:
        for entry in entries:
            entry.data()
        return []
    directory.mkdir(parents=True, exist_ok=True)
    groups = _split(entries, max_shard_size)
    names = [SINGLE] if len(groups) == 1 else [_shard_name(i, len(groups)) for i in range(len(groups))]
    temporary = [directory / f".{name}.{os.getpid()}.tmp" for name in names]
    try:
        for path, group in zip(temporary, groups, strict=True):
            write_file(path, group, metadata={"format": "pt"} if metadata is None else metadata)
        _swap(directory, dict(zip(names, temporary, strict=True)), dict(zip(names, groups, strict=True)))
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return [directory / name for name in names]


def write_file(path: Path, entries: Sequence[Entry], *, metadata: Mapping[str, str]) -> None:
    """Write one safetensors file in place, streaming; `save` is the atomic way in."""
    ordered = sorted(entries, key=lambda e: -np.dtype(e.dtype).itemsize)  # keeps every tensor aligned to its item size
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for e in ordered:
        code, end = _CODES[np.dtype(e.dtype)], at + e.nbytes
        header[e.name] = {"dtype": code, "shape": list(e.shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER:
        raise InputError(f"{path}: a header of {len(raw)} bytes, at most {MAX_HEADER}; lower max_shard_size")
    with path.open("wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        for e in ordered:
            data = np.asarray(e.data(), order="C")
            if data.shape != e.shape or data.dtype != e.dtype:
                raise InputError(f"tensor {e.name!r}: announced {e.shape} {e.dtype}, got {data.shape} {data.dtype}")
            f.write(data.reshape(-1).view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())


def write_json(path: Path, record: Mapping[str, object]) -> None:
    """Write a JSON object atomically: a temporary name, flushed, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _check(entries: Sequence[Entry]) -> None:
    names = [e.name for e in entries]
    if not names:
        raise InputError("nothing to save: no tensors")
    if len(set(names)) != len(names):
        raise InputError(f"tensor names repeat: {sorted({n for n in names if names.count(n) > 1})[:3]}")
    for e in entries:
        if np.dtype(e.dtype) not in _CODES:
            raise InputError(f"tensor {e.name!r}: safetensors has no {e.dtype}; it has {', '.join(map(str, _CODES))}")


def _split(entries: Sequence[Entry], max_shard_size: int) -> list[list[Entry]]:
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    return groups


def _shard_name(i: int, n: int) -> str:
    return f"model-{i + 1:05d}-of-{n:05d}.safetensors"


def _swap(directory: Path, files: Mapping[str, Path], groups: Mapping[str, Sequence[Entry]]) -> None:
    stale = _written_before(directory) - set(files)
    if SINGLE in files:
        os.replace(files[SINGLE], directory / SINGLE)  # readers prefer it to an index: this is the moment of change
        (directory / INDEX).unlink(missing_ok=True)
    else:
        (directory / INDEX).unlink(missing_ok=True)
        for name, path in files.items():
            os.replace(path, directory / name)
        total = sum(e.nbytes for group in groups.values() for e in group)
        weight_map = {e.name: name for name, group in groups.items() for e in group}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for name in stale:
        (directory / name).unlink(missing_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the renames themselves
    finally:
        os.close(descriptor)


def _written_before(directory: Path) -> set[str]:
    """The weight files of the checkpoint that stands here, which the new one replaces."""
    names = {SINGLE} if (directory / SINGLE).is_file() else set()
    if (directory / INDEX).is_file():
        try:
            weight_map = read_json(directory / INDEX).get("weight_map")
        except CheckpointError:
            return names  # a damaged index names nothing that we dare remove
        if isinstance(weight_map, dict):
            values = weight_map.values()
            names |= {n for n in values if isinstance(n, str) and Path(n).name == n and n.endswith(".safetensors")}
    return names
