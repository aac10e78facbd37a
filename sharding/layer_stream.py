"""Decoding a model whose layers do not fit into memory: they are read from its files ahead of the computation, in turn.

Li et al. 2025, "TPI-LLM: Serving 70B-scale LLMs Efficiently on Low-resource Mobile Devices" (arXiv:2410.00531): a
window of blocks slides over the layers and round to the first of them for the next token; a block is loaded while those
before it compute, and released after its use. `LayerFiles` streams a Hugging Face directory so, and `StreamedStep` is
the model as every loop here takes it: one program for all tokens, in which a layer asks the host for its weights. So
all that runs a `Step` runs a streamed one: sampling, drafters (whose verified tokens share one pass over the file),
beams, batch jobs, ragged rows, any cache.

    layers = LayerFiles(directory, budget=600 * 2**20)
    step, params = layers.step(), layers.resident()        # embedding, head and last norm stay in memory

Guarantee: exact. The products are those of the model in memory with `quant.Transposed` weights (the order in which
files hold them), bit for bit. State: none in the program; blocks of the window in host memory.
Budget: bytes of layers that stand in memory at once: the window, and what the program has room for (`PLACES`). With a
mesh each process reads the slices of its own devices alone (the paper's tensor parallelism), within its budget.
A run of layers of one kind is one loop in the program, and free memory that the C library keeps from compiling it is
given back before the first layer comes: a program of 32 layers leaves 110 MB so (334 where the library keeps it), and
246 where its layers are written out one by one.

Departures: a block is a layer, not its attention or MLP; the window is as wide as the budget allows, where the paper's
default is 2 blocks; nothing is kept resident when the disk is slow, since a cyclic order makes every block equally far.
The window's blocks are pages of the files' maps where a tensor lies in one piece, so the system may take them back and
read them again when memory is short; its cache of other file pages is not counted. A file that is cut while a block of
it is in use ends the process; one that was cut before is an error.
Measured by `scripts/bench_streaming.py`: 32 layers of 61 MB under 600 MB took 327 MB of the process's own memory above
a model without layers. Known limit: no product runs while a layer is copied from the window into the program.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.experimental import io_callback
from jax.sharding import Mesh, PartitionSpec

from jaxinfer import host_memory, quant
from jaxinfer.cache.base import new_blocks
from jaxinfer.checkpoint import hub
from jaxinfer.checkpoint.chat import ChatTemplate
from jaxinfer.checkpoint.safetensors_io import open_weights, place
from jaxinfer.checkpoint.tokenizer import Tokenizer
from jaxinfer.decode.language_model import LanguageModel, load_draft
from jaxinfer.errors import ConfigError
from jaxinfer.models import ModelConfig, Step
from jaxinfer.models.decoder import Around, Decoder, DecoderLayer
from jaxinfer.models.hf import MANIFEST, checked_places, load_config, source_of
from jaxinfer.models.hf_names import Place
from jaxinfer.sharding.layer_reader import Leaf, Reader, leaf_of, positions
from jaxinfer.sharding.rules import AxisRules, shardings
from jaxinfer.sharding.streamer import Block, Streamer

# Layers that a compiled program is taken to have room for. Seen on CPU: 1.0, for plain decoding and with drafts to
# verify, since a prompt's forward and a step's share one place; with 400 rows of activations 1.3.
PLACES = 2


class LayerSource(Protocol):
    """Gives a layer's params inside the program, when the layers before it have run."""

    def kind(self, i: int) -> Hashable:
        """Layers of equal kinds have params of the same shapes and types, and `fetch` takes a traced number."""
        ...

    def fetcher(self, params: Any) -> Callable[[Any, jax.Array, int], Any]:
        """`fetch(i, x, like) -> params of layer i`, of the kind of layer `like`, for one forward; `x` is its input."""
        ...


@dataclasses.dataclass(frozen=True)
class StreamedStep(Step):
    """A Step whose layers' params come from `source`; `params` holds the others. Inference alone: no gradients."""

    source: Any = None  # a LayerSource; compared by identity

    def __call__(
        self, params, inputs, positions, cache=None, block=None, at: jax.Array | int = 0, mask=None, *, taps=()
    ) -> Any:
        """As `Step.__call__`."""
        block = new_blocks(cache, inputs.shape[1]) if cache is not None and block is None else block
        around = self._around(self.source.fetcher(params), cache, block, bool(taps))
        variables = {"params": params}
        return Decoder(self.config).apply(variables, inputs, positions, cache, block, at, mask, taps, around)

    def _kind(self, i: int, cache: Any) -> Hashable:
        """Layers of equal kinds are one program."""
        own = self.config.attention(i), self.config.is_sparse(i), self.source.kind(i)
        if cache is None:
            return own
        return own, cache.specs[i], tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(cache.states[i]))

    def _around(self, fetch: Callable[..., Any], cache: Any, blocks: Any, tapped: bool) -> Around:
        """Each run of like layers as one loop, at the turn of its first layer; the others' turns hand on their parts.
        A loop is compiled once, whatever its length: what compiling leaves in memory does not grow with the layers."""
        kinds = [self._kind(i, cache) for i in range(self.config.num_layers)]
        done: tuple[int, Any] = (0, None)  # the run's first layer, and what the loop gave

        def loop(begin: int, end: int, run: Any, x: jax.Array, positions: jax.Array) -> Any:
            layer = DecoderLayer(self.config, layer=begin, parent=None)
            fixed = {name: value for name, value in run.keywords.items() if name != "state"}

            def body(x: jax.Array, turn: tuple[jax.Array, Any]) -> Any:
                i, block = turn
                # One layer's state at a time is copied; a stack of them all would be as large as the cache.
                states = [None] if cache is None else cache.states[begin:end]
                state = jax.lax.switch(i - begin, [lambda own=own: own for own in states])
                variables = {"params": fetch(i, x, begin)}
                x, *given = layer.apply(variables, x, positions, state=state, block=block, **fixed)
                return x, (x if tapped else None, *given)

            pending = None if cache is None else jax.tree.map(lambda *own: jnp.stack(own), *blocks[begin:end])
            return jax.lax.scan(body, x, (jnp.arange(begin, end, dtype=jnp.int32), pending))

        def around(i: int, run: Any, x: jax.Array, positions: jax.Array, block: Any) -> Any:
            nonlocal done
            if i == 0 or kinds[i] != kinds[i - 1]:
                end = next((j for j in range(i, len(kinds)) if kinds[j] != kinds[i]), len(kinds))
                if end == i + 1:
                    layer = DecoderLayer(self.config, layer=i, parent=None)
                    return layer.apply({"params": fetch(i, x, i)}, x, positions, block=block, **run.keywords)
                done = i, loop(i, end, run, x, positions)
            begin, (last, parts) = done
            after, block, notes = jax.tree.map(lambda leaf: leaf[i - begin], parts)
            return after if tapped else last, block, notes

        return around


class LayerFiles:
    """The layers of a Hugging Face directory, streamed within `budget` bytes by `threads` threads.

    dtype: of the params in the program; files are read as they are. mesh, rules: how layers are split over devices.
    Raises CheckpointError for a directory that does not hold the model, ConfigError for a budget below four layers
    (one in use, one read ahead, `PLACES` in the program), naming the least that would do.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        budget: int,
        dtype: str = "float32",
        max_length: int | None = None,
        threads: int = 2,
        mesh: Mesh | None = None,
        rules: AxisRules | None = None,
    ):
        directory = Path(directory)
        self.config: ModelConfig = load_config(directory, max_length=max_length)
        self.dtype, self.mesh = dtype, mesh
        if (mesh is None) != (rules is None):
            raise ConfigError("mesh and rules: got one of the two; accepts both or neither")
        if (directory / MANIFEST).is_file():
            raise ConfigError(f"{directory}: holds quantized weights; only plain tensors can be streamed")
        self._weights = open_weights(directory)
        rows, self._names = checked_places(self.config, self._weights)
        self._shardings: dict[str, Any] = {}
        if mesh is not None and rules is not None:
            self._shardings = dict(quant.leaves(shardings(Step(self.config), mesh, rules)))
        self._positions = positions(mesh)
        self._resident = [row for row in rows if not row.path.startswith("layers_")]
        self._layers = tuple(
            tuple(self._leaf(row) for row in rows if row.path.startswith(f"layers_{i}/"))
            for i in range(self.config.num_layers)
        )
        self._reader = Reader(self._weights, self._layers)
        self._compiled = False  # since layers were last given
        self.streamer = self._streamer(budget, threads)

    def step(self, cache: Any = None) -> StreamedStep:
        """The model for every loop, with a cache policy."""
        step = StreamedStep(self.config, dtype=self.dtype, source=self)
        return step if cache is None else dataclasses.replace(step, cache=cache)

    def resident(self) -> dict[str, Any]:
        """The params that are no layer's, placed."""
        params = {}
        for row in self._resident:
            source = source_of(self._weights, row, self._names)
            params[row.path] = place(source, dtype=self.dtype, sharding=self._shardings.get(row.path))
        return unflatten_dict(params, sep="/")

    def close(self) -> None:
        """Waits for programs that run, stops reading and closes the files; the step cannot run any more."""
        jax.effects_barrier()
        self.streamer.close()
        self._reader.close()

    def kind(self, i: int) -> Hashable:
        """Shapes and types of the layer's params as the files hold them."""
        return tuple((leaf.path, leaf.dtype, leaf.shape, leaf.transposed, leaf.stacked) for leaf in self._layers[i])

    def fetcher(self, params: Any) -> Callable[[Any, jax.Array, int], Any]:
        """Asks the host for a layer once its input is there, so that the program holds one layer at a time."""
        del params
        self._compiled = True
        return self._fetch

    def _fetch(self, i: Any, x: jax.Array, like: int) -> dict[str, Any]:
        leaves, index = self._layers[like], jnp.asarray(i, jnp.int32)
        shapes = tuple(jax.ShapeDtypeStruct(leaf.local_shape, leaf.dtype) for leaf in leaves)
        ready = x[(0,) * x.ndim]  # an argument of the call, so that it waits for the layer before
        call = functools.partial(io_callback, self._take, shapes)
        if self.mesh is None:
            arrays = call(index, np.int32(0), ready)
        else:
            names = self.mesh.axis_names
            arrays = jax.shard_map(
                lambda index, ready: call(index, jax.lax.axis_index(names), ready),
                mesh=self.mesh,
                in_specs=PartitionSpec(),
                out_specs=tuple(leaf.spec for leaf in leaves),
                check_vma=False,  # what comes from the host has no type of its own
            )(index, ready)
        params = zip(leaves, arrays, strict=True)
        return unflatten_dict({leaf.path: leaf.to_param(array, self.dtype) for leaf, array in params}, sep="/")

    def _take(self, index: Any, position: Any, ready: Any) -> tuple[np.ndarray, ...]:
        """The callback: a device's slices of layer `index`; XLA copies them before the device asks for another."""
        del ready
        if self._compiled:
            self._compiled = False
            host_memory.give_back()
        place = int(position)
        _, arrays = self.streamer.take(int(index), self._positions.index(place))
        return arrays[place]

    def _leaf(self, row: Place) -> Leaf:
        tensors = tuple(self._weights.tensors[self._names[name]] for name in row.names)
        return leaf_of(row, tensors, self._shardings.get(row.path))

    def _streamer(self, budget: int, threads: int) -> Streamer:
        size = self._reader.size
        # What the program holds on each device: places for PLACES layers, and another form of what it converts.
        forms = [(leaf.dtype, jnp.dtype(self.dtype)) for leaf in self._layers[0]]
        wider = max(sum({a: a.itemsize, b: b.itemsize}.values()) / a.itemsize for a, b in forms)
        largest = max(sum(leaf.nbytes for leaf in layer) for layer in self._layers)
        inside = round(PLACES * largest * wider) * len(self._positions)
        if budget < 2 * size + inside:
            what = f"two of its layers ({size} bytes each) in memory and {inside} bytes in the program"
            raise ConfigError(f"budget: got {budget} bytes, accepts {2 * size + inside} or more: {what}")

        # A ring of equal buffers, each as large as the largest layer.
        def block(i: int) -> Block:
            return Block(f"layer {i}", size, lambda: self._reader.load(i), lambda held: self._reader.spare(held[0]))

        blocks = [block(i) for i in range(len(self._layers))]
        return Streamer(blocks, budget=budget - inside, threads=threads, wrap=True, takers=len(self._positions))


def load(
    model: str | os.PathLike[str],
    *,
    budget: int,
    dtype: str = "auto",
    max_length: int | None = None,
    cache: Any = None,
    draft: Any = None,
) -> LanguageModel:
    """As `jaxinfer.load`, with the layers streamed within `budget` bytes. Raises what `LayerFiles` raises."""
    directory = hub.resolve(model)
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    layers = LayerFiles(directory, budget=budget, dtype=dtype, max_length=max_length)
    tokenizer = Tokenizer.load(directory)
    template = ChatTemplate.load(directory, special_tokens=tokenizer.special_tokens)
    draft = load_draft(draft, dtype=dtype, max_length=layers.config.max_length)
    return LanguageModel(layers.step(cache), layers.resident(), tokenizer, template, draft, directory)
