"""Reading, placing and writing safetensors files, single or sharded, by memory map.

`open_weights` validates every header before a byte of data is touched; `Weights.read` gives a numpy view of the file's
own pages; `place` puts any slice, transpose, split or stack of such views onto the devices of a sharding, one shard at
a time, so that a process reads only the bytes of its own shards and no second full copy exists in memory.

Why not a library. Orbax (0.12.8, v1 API, `CheckpointLayout.SAFETENSORS`) reads by byte range too and converts types,
but it cannot save ("not supported yet"), cannot transpose, split or stack while it reads (a Hugging Face linear is
[out, in] and ours [in, out], Phi-3 fuses q, k and v, experts are one tensor each: that would be a second copy on the
devices), answers a corrupt header length with a bare MemoryError, and its API is experimental and was renamed twice.
`safetensors.safe_open` copies, has no fp8 in its numpy framework, and names no tensor when a header is wrong. The
format is small; a test holds our verdict on damaged headers against the reference implementation's.

Format: https://github.com/huggingface/safetensors (8 bytes of little-endian header length, JSON header, data).

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np

from jaxinfer.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_MAX_ELEMENTS = 2**62
_MAX_DIMS = 32
_BLOCK = 256  # a transposing copy goes by blocks that fit the cache: 2.3 times faster than one strided pass

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "U16": np.dtype(np.uint16),
        "I16": np.dtype(np.int16),
        "U32": np.dtype(np.uint32),
        "I32": np.dtype(np.int32),
        "U64": np.dtype(np.uint64),
        "I64": np.dtype(np.int64),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F32": np.dtype(np.float32),
        "F64": np.dtype(np.float64),
        "C64": np.dtype(np.complex64),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
        "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    }
)


class Source(Protocol):
    """Anything with a shape that gives host arrays for slices: a numpy view, or `Stacked`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __getitem__(self, index: Any, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `dtype`, `shape`, and the bytes [begin, end) of `file`."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The validated header of one file."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Views of equal shape as one source [N, ...]; a slice reads only the parts and bytes that it names."""

    parts: tuple[np.ndarray, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    def __getitem__(self, index: tuple[slice, ...]) -> Stacked:
        return Stacked(tuple(part[index[1:]] for part in self.parts[index[0]]))


class Weights:
    """The tensors of a checkpoint, mapped and not read: `tensors` has names, dtypes and shapes; `read` gives a view."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]):
        self.path = path
        self.tensors = tensors
        self.metadata = metadata
        self._maps: dict[Path, np.ndarray] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the tensor in the memory map; nothing is copied. It keeps the map alive."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: no tensor {name!r} among {len(self.tensors)}")
        if info.begin == info.end:
            return np.empty(info.shape, info.dtype)
        if info.file not in self._maps:
            self._maps[info.file] = np.memmap(info.file, dtype=np.uint8, mode="r").view(np.ndarray)
        raw = self._maps[info.file][info.begin : info.end]
        if info.begin % info.dtype.itemsize:  # the format does not promise alignment
            return np.frombuffer(raw.tobytes(), info.dtype).reshape(info.shape)
        return raw.view(info.dtype).reshape(info.shape)


def open_weights(path: str | os.PathLike[str]) -> Weights:
    """Open a `.safetensors` file, or a directory that holds `model.safetensors` or `model.safetensors.index.json`.

    Every header is validated and every file checked for its length. Raises CheckpointError naming the file and tensor.
    """
    path = Path(path)
    if path.is_file():
        header = read_header(path)
        return Weights(path, header.tensors, header.metadata)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory")
    if (path / SINGLE).is_file():  # before the index, as transformers does
        header = read_header(path / SINGLE)
        return Weights(path, header.tensors, header.metadata)
    if (path / INDEX).is_file():
        return _open_sharded(path, path / INDEX)
    raise _nothing_found(path)


def _open_sharded(directory: Path, index: Path) -> Weights:
    record = read_json(index)
    weight_map = record.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be a non-empty object of tensor name to file name")
    headers: dict[str, Header] = {}
    tensors: dict[str, TensorInfo] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name or not file_name:
            raise CheckpointError(f"{index}: {name!r} is said to lie in {file_name!r}, which is not a plain file name")
        if file_name not in headers:
            if not (directory / file_name).is_file():
                raise CheckpointError(f"{index}: names {file_name!r}, which is not in {directory}")
            headers[file_name] = read_header(directory / file_name)
        if name not in headers[file_name].tensors:
            raise CheckpointError(f"{directory / file_name}: no tensor {name!r}, which {index.name} says is here")
        tensors[name] = headers[file_name].tensors[name]
    return Weights(directory, tensors, next(iter(headers.values())).metadata)


def _nothing_found(directory: Path) -> CheckpointError:
    names = sorted(p.name for p in directory.iterdir())
    pickled = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt")) and n != "training_args.bin"]
    if pickled:
        return CheckpointError(
            f"{directory}: holds {', '.join(pickled[:3])} and no safetensors. Pickled weights run code when they are "
            "opened, so jaxinfer does not open them. Convert them once where torch is installed: python -c 'from "
            f'transformers import AutoModelForCausalLM as M; M.from_pretrained("{directory}")'
            f'.save_pretrained("{directory}-safetensors")\''
        )
    held = ", ".join(names[:8]) or "nothing"
    return CheckpointError(f"{directory}: neither {SINGLE} nor {INDEX} is here; it holds {held}")


def read_json(path: Path, limit: int = MAX_HEADER) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError naming it. Repeated keys and over `limit` bytes are refused."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size} bytes of JSON, at most {limit} are read")
        return _parse_object(path, path.read_bytes())
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror or e}") from None


def _parse_object(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_repeats)
    except RecursionError:
        raise CheckpointError(f"{file}: JSON nested too deeply") from None
    except ValueError as e:
        raise CheckpointError(f"{file}: not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: a JSON object is expected, got {type(value).__name__}")
    return value


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        repeated = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"the name {repeated!r} stands twice in one object")
    return record


def read_header(file: str | os.PathLike[str]) -> Header:
    """Validate the header of one safetensors file against the file's length. Raises CheckpointError; reads no data."""
    file = Path(file)
    try:
        with file.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            prefix = f.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{file}: {size} bytes: too short for a safetensors file")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER:
                raise CheckpointError(f"{file}: header length {length}, at most {MAX_HEADER}: not a safetensors file?")
            if 8 + length > size:
                raise CheckpointError(f"{file}: truncated: the header ends at byte {8 + length}, the file at {size}")
            raw = f.read(length)
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e.strerror or e}") from None
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{file}: the header is not a JSON object")
    record = _parse_object(file, raw)
    metadata = record.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ must map strings to strings")
    infos = [_tensor_info(file, name, entry, 8 + length) for name, entry in record.items()]
    _check_layout(file, infos, 8 + length, size)
    return Header({i.name: i for i in infos}, metadata)


def _tensor_info(file: Path, name: str, entry: Any, base: int) -> TensorInfo:
    where = f"{file}: tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: an object with dtype, shape and data_offsets is expected")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype {str(dtype)[:40]!r} is not supported; supported are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS or math.prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
        raise CheckpointError(f"{where}: shape {str(shape)[:80]} is not a list of at most {_MAX_DIMS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {str(offsets)[:80]} is not [begin, end]")
    need = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != need:
        got = offsets[1] - offsets[0]
        raise CheckpointError(f"{where}: shape {tuple(shape)} of {dtype} takes {need} bytes, data_offsets span {got}")
    return TensorInfo(name, DTYPES[dtype], tuple(shape), file, base + offsets[0], base + offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_layout(file: Path, infos: list[TensorInfo], base: int, size: int) -> None:
    at, last = base, "the header"
    for info in sorted(infos, key=lambda i: (i.begin, i.end)):
        if info.end > size:
            where = f"tensor {info.name!r} ends at byte {info.end}, the file at {size}"
            raise CheckpointError(f"{file}: truncated: {where}")
        if info.begin != at:
            what = "overlaps" if info.begin < at else "leaves a gap after"
            where = f"tensor {info.name!r} at byte {info.begin} {what} {last}, which ends at {at}"
            raise CheckpointError(f"{file}: {where}")
        at, last = info.end, repr(info.name)
    if at != size:
        raise CheckpointError(f"{file}: {size - at} bytes follow the last tensor; the file is damaged")


def place(source: Source, *, dtype: Any = None, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
    """Put a source of any shape onto devices as `dtype` (default: its own), reading each shard's slice alone.

    `sharding` defaults to the default device. Works in several processes: each reads only its own shards.
    """
    dtype = np.dtype(source.dtype if dtype is None else dtype)
    if sharding is None:
        return jax.device_put(to_host(source, dtype))
    shape = tuple(source.shape)
    return jax.make_array_from_callback(shape, sharding, lambda index: to_host(source, dtype, index), dtype=dtype)


def to_host(source: Source, dtype: Any = None, index: tuple[slice, ...] | None = None) -> np.ndarray:
    """A slice of a source as one contiguous array of `dtype`, copied once."""
    part = source[index if index is not None else (slice(None),) * len(source.shape)]
    out = np.empty(part.shape, part.dtype if dtype is None else dtype)
    if isinstance(part, Stacked):
        for i, view in enumerate(part.parts):
            _copy(out[i : i + 1].reshape(view.shape), view)
    else:
        _copy(out, part)
    return out


def _copy(to: np.ndarray, view: np.ndarray) -> None:
    if view.ndim != 2 or view.strides[1] <= view.strides[0]:
        to[...] = view
        return
    for i in range(0, view.shape[0], _BLOCK):
        for j in range(0, view.shape[1], _BLOCK):
            to[i : i + _BLOCK, j : j + _BLOCK] = view[i : i + _BLOCK, j : j + _BLOCK]
