"""Reads the layers of a Hugging Face directory one by one, in the order and types of its files; of each param the
slices that this process's devices have.

A program copies what it is given; a copy from the file to a buffer before would be the second, in the process's own
memory. So what lies in one piece is given as it lies in the file's map.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.checkpoint.safetensors_io import TensorInfo, Weights
from jaxinfer.errors import CheckpointError
from jaxinfer.models.hf_names import Place
from jaxinfer.quant.transposed import TransposedArray

ALIGN = 64  # bytes between the starts of a buffer's arrays
Slice = tuple[tuple[int, int], ...]  # begin and end along each axis
# Arrays of the leaves in order, for each position in the mesh.
Arrays = dict[int, tuple[np.ndarray, ...]]
# A buffer, and pieces of maps: file, begin and bytes.
Held = tuple[np.ndarray, list[tuple[Path, int, int]]]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One param of one layer as its files hold it: `shape` and `spec` are of the stored order ([out, in] where
    `transposed`, experts first where `stacked`), from row `first_row` of its tensors on; `slices`: what of it each
    position in the mesh has."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    transposed: bool
    stacked: bool
    tensors: tuple[TensorInfo, ...]
    first_row: int
    spec: PartitionSpec
    slices: Mapping[int, Slice]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of a position's slice, the same for all."""
        return tuple(end - begin for begin, end in next(iter(self.slices.values())))

    @property
    def nbytes(self) -> int:
        """Bytes of a position's slice."""
        return math.prod(self.local_shape) * self.dtype.itemsize

    def to_param(self, array: jax.Array, dtype: str) -> Any:
        """The param, of `dtype`, of the stored array."""
        array = array.astype(dtype)
        if not self.transposed:
            return array
        return jnp.swapaxes(array, -1, -2) if self.stacked else TransposedArray(array)


def positions(mesh: Mesh | None) -> tuple[int, ...]:
    """The places in the mesh of this process's devices; 0 without one."""
    if mesh is None:
        return (0,)
    return tuple(p for p, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index())


def leaf_of(row: Place, tensors: tuple[TensorInfo, ...], sharding: NamedSharding | None) -> Leaf:
    """The leaf of a param that lies at `row`; `sharding` is that of the param, in its logical order."""
    begin, end = row.rows or (0, row.stored[0])
    shape = (end - begin, *row.stored[1:])
    shape = (len(tensors), *shape) if row.stacked else shape
    path = row.path.partition("/")[2]
    if sharding is None:
        spec, slices = PartitionSpec(), {0: tuple((0, n) for n in shape)}
    else:
        axes = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
        spec = PartitionSpec(*axes[:-2], axes[-1], axes[-2]) if row.transpose else PartitionSpec(*axes)
        mesh: Any = sharding.mesh  # never an abstract one: the params are placed by it
        found = NamedSharding(mesh, spec).devices_indices_map(shape)
        slices = {p: _slice(found[mesh.devices.flat[p]], shape) for p in positions(mesh)}
    return Leaf(path, tensors[0].dtype, shape, row.transpose, row.stacked, tensors, begin, spec, slices)


class Reader:
    """Layers as their files hold them. What lies in one piece there is given as a view of the file's map, whose pages
    have been read and stay mapped until `spare`; what does not is put together in a buffer, which is used again.

    `size`: bytes of the largest layer, in views and buffer.
    """

    def __init__(self, weights: Weights, layers: tuple[tuple[Leaf, ...], ...]):
        self._weights, self._layers = weights, layers
        self.size = max((sum(size for *_, size in _layout(layer)) for layer in layers), default=0)
        apart = [[size for leaf, index, size in _layout(layer) if not _in_one_piece(leaf, index)] for layer in layers]
        self._room = max(map(sum, apart), default=0)
        self._files = {file: os.open(file, os.O_RDONLY) for file in _files(layers)}
        self._maps = {file: mmap.mmap(fd, 0, access=mmap.ACCESS_READ) for file, fd in self._files.items()}
        self._spare: list[np.ndarray] = []

    def load(self, index: int) -> tuple[Held, Arrays]:
        """What `spare` wants back, and the arrays of layer `index`. Raises CheckpointError for a file that was cut."""
        leaves = self._layers[index]
        try:
            buffer = self._spare.pop()
        except IndexError:
            buffer = np.empty(self._room, np.uint8)
        at, parts, mapped = 0, {}, []
        for leaf, index_of, size in _layout(leaves):
            whole = _in_one_piece(leaf, index_of)
            raw = self._view(leaf, index_of) if whole else buffer[at : at + leaf.nbytes]
            array = parts[leaf.path, index_of] = raw.view(leaf.dtype).reshape(leaf.local_shape)
            if whole:
                mapped.append((leaf.tensors[0].file, _offset(leaf, index_of), leaf.nbytes))
            else:
                self._read(leaf, index_of, array)
                at += size
        return (buffer, mapped), {p: tuple(parts[x.path, x.slices[p]] for x in leaves) for p in leaves[0].slices}

    def spare(self, held: Held) -> None:
        """Lets the pages go, and keeps the buffer: memory that is written again is faster than memory that is new."""
        buffer, mapped = held
        self._spare.append(buffer)
        if hasattr(mmap, "MADV_DONTNEED"):  # read again from the file, should one still look at them
            for file, begin, nbytes in mapped:
                inside = begin % mmap.PAGESIZE
                self._maps[file].madvise(mmap.MADV_DONTNEED, begin - inside, nbytes + inside)

    def close(self) -> None:
        """Closes the files and frees the buffers that are not in use."""
        self._spare.clear()
        self._maps.clear()
        while self._files:
            os.close(self._files.popitem()[1])

    def _view(self, leaf: Leaf, index: Slice) -> np.ndarray:
        """The bytes of a slice in the file's map, read into memory."""
        info, begin = leaf.tensors[0], _offset(leaf, index)
        if os.fstat(self._files[info.file]).st_size < begin + leaf.nbytes:  # touching what is gone ends the process
            raise CheckpointError(_cut(info))
        if hasattr(os, "posix_fadvise"):  # all of it in one go, where touching alone asks for few pages at a time
            os.posix_fadvise(self._files[info.file], begin, leaf.nbytes, os.POSIX_FADV_WILLNEED)
        raw = np.frombuffer(self._maps[info.file], np.uint8, leaf.nbytes, begin)
        raw[:: mmap.PAGESIZE].max(initial=0)  # touches every page, while other threads run
        return raw

    def _read(self, leaf: Leaf, index: Slice, out: np.ndarray) -> None:
        if not leaf.stacked:
            self._read_tensor(leaf.tensors[0], leaf.first_row, index, out)
            return
        for tensor, to in zip(leaf.tensors[slice(*index[0])], out, strict=True):
            self._read_tensor(tensor, leaf.first_row, index[1:], to)

    def _read_tensor(self, info: TensorInfo, first: int, index: Slice, out: np.ndarray) -> None:
        begin, end = index[0][0] + first, index[0][1] + first
        if out.shape[1:] != info.shape[1:]:  # columns of rows do not stand together in the file: from its map
            out[...] = self._weights.read(info.name)[(slice(begin, end), *(slice(*part) for part in index[1:]))]
            return
        offset = info.begin + begin * math.prod(info.shape[1:]) * info.dtype.itemsize
        todo = memoryview(out.reshape(-1).view(np.uint8))  # pyright: ignore[reportArgumentType] - arrays are buffers
        while todo:
            count = os.preadv(self._files[info.file], [todo], offset)
            if count == 0:
                raise CheckpointError(_cut(info))
            todo, offset = todo[count:], offset + count


def _cut(info: TensorInfo) -> str:
    return f"{info.file}: ends before tensor {info.name!r} does; it was cut while in use"


def _in_one_piece(leaf: Leaf, index: Slice) -> bool:
    """Whether the slice is rows of one tensor, at a place where its type may stand."""
    if leaf.stacked or leaf.local_shape[1:] != leaf.tensors[0].shape[1:]:
        return False
    return _offset(leaf, index) % leaf.dtype.itemsize == 0


def _offset(leaf: Leaf, index: Slice) -> int:
    info = leaf.tensors[0]
    return info.begin + (index[0][0] + leaf.first_row) * math.prod(info.shape[1:]) * info.dtype.itemsize


def _layout(layer: tuple[Leaf, ...]) -> list[tuple[Leaf, Slice, int]]:
    """What a buffer holds, with the bytes it takes: slices that several positions have stand in it once."""
    found = [(leaf, index) for leaf in layer for index in dict.fromkeys(leaf.slices.values())]
    return [(leaf, index, -(-leaf.nbytes // ALIGN) * ALIGN) for leaf, index in found]


def _files(layers: tuple[tuple[Leaf, ...], ...]) -> list[Path]:
    return list(dict.fromkeys(tensor.file for layer in layers for leaf in layer for tensor in leaf.tensors))


def _slice(index: tuple[slice, ...], shape: tuple[int, ...]) -> Slice:
    return tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
