"""Reads the layers of a Hugging Face directory one by one, in the order and types of its files, into buffers that are
used again; of each param the slices that this process's devices have.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
import math
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
    """Layers into buffers of `size` bytes, the largest layer's. `spare(buffer)` gives one back to be used again."""

    def __init__(self, weights: Weights, layers: tuple[tuple[Leaf, ...], ...]):
        self._weights, self._layers = weights, layers
        self.size = max((sum(size for *_, size in _layout(layer)) for layer in layers), default=0)
        self._files = {file: os.open(file, os.O_RDONLY) for file in _files(layers)}
        self._spare: list[np.ndarray] = []

    def load(self, index: int) -> tuple[np.ndarray, Arrays]:
        """Layer `index`: its buffer, and the arrays in it. Raises CheckpointError where a file became shorter."""
        try:
            buffer = self._spare.pop()
        except IndexError:
            buffer = np.empty(self.size, np.uint8)
        at, parts = 0, {}
        for leaf, index_of, size in _layout(self._layers[index]):
            array = buffer[at : at + leaf.nbytes].view(leaf.dtype).reshape(leaf.local_shape)
            self._read(leaf, index_of, array)
            parts[leaf.path, index_of] = array
            at += size
        leaves = self._layers[index]
        return buffer, {p: tuple(parts[leaf.path, leaf.slices[p]] for leaf in leaves) for p in leaves[0].slices}

    def spare(self, buffer: np.ndarray) -> None:
        """Memory that is written again is faster than memory that is new."""
        self._spare.append(buffer)

    def close(self) -> None:
        """Closes the files and frees the buffers that are not in use."""
        self._spare.clear()
        while self._files:
            os.close(self._files.popitem()[1])

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
                raise CheckpointError(f"{info.file}: ends before tensor {info.name!r} does; it was cut while in use")
            todo, offset = todo[count:], offset + count


def _layout(layer: tuple[Leaf, ...]) -> list[tuple[Leaf, Slice, int]]:
    """What a buffer holds, with the bytes it takes: slices that several positions have stand in it once."""
    found = [(leaf, index) for leaf in layer for index in dict.fromkeys(leaf.slices.values())]
    return [(leaf, index, -(-leaf.nbytes // ALIGN) * ALIGN) for leaf, index in found]


def _files(layers: tuple[tuple[Leaf, ...], ...]) -> list[Path]:
    return list(dict.fromkeys(tensor.file for layer in layers for leaf in layer for tensor in leaf.tensors))


def _slice(index: tuple[slice, ...], shape: tuple[int, ...]) -> Slice:
    return tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
