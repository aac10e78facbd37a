"""SSDTrain: activations go to a disk while the forward pass computes and come back ahead of the backward pass.

Wu et al. 2024, "SSDTrain: An Activation Offloading Framework to SSDs for Faster Large Language Model Training" (DAC
2025, arXiv:2408.10013). What a layer saves for its gradient is written in the background and dropped from memory; a
backward pass that asks for it while it is being written is handed the copy in memory, and what it will ask for next is
read ahead. The last layers, whose activations would come back at once, stay in memory: how many follows from a profile.

    with ActivationStore(folder) as store:
        objective = lm.NextToken(OffloadStep.of(step, store, keep_from=5))   # layers 5 and on stay in memory

Guarantee: exact; the same gradients, bit for bit, since nothing is computed again. State: files of one step in a folder
of the process, each deleted as it is read, and swept by the next process where one was killed (`activation_store`).
Paper's defaults: tensors below 2**23 elements stay in memory (`smallest`); so do weights and inputs, which are never
copies, and each tensor is written once; the loss and the head are not offloaded. The adaptive rule is `keep_from`.

Departures: a layer's activations are written as one file, where the paper has one a tensor; on one device, or inside a
`jax.shard_map` of the caller's. The host, not the device, holds what waits to be written (`budget` bytes at most).

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import io_callback

from jaxinfer.errors import ConfigError
from jaxinfer.models import Step
from jaxinfer.models.decoder import Decoder, DecoderLayer
from jaxinfer.train.activation_store import ActivationStore

SMALLEST = 2**23  # elements


@dataclasses.dataclass(frozen=True)
class OffloadStep(Step):
    """A Step that trains with the activations of layers 0 to `keep_from` - 1 in `store` (None: of all its layers).

    smallest: arrays of fewer elements stay in memory. With a cache (decoding) the layers run as they are.
    """

    store: ActivationStore | None = None  # compared by identity
    keep_from: int | None = None
    smallest: int = SMALLEST

    @classmethod
    def of(
        cls, step: Step, store: ActivationStore, *, keep_from: int | None = None, smallest: int = SMALLEST
    ) -> OffloadStep:
        """`step` with the same params. Raises ConfigError for a Step of another kind or a layer that it has not."""
        if type(step) not in (Step, OffloadStep):
            raise ConfigError(f"step: got a {type(step).__name__}, accepts a Step")
        if keep_from is not None and not 0 <= keep_from <= step.config.num_layers:
            raise ConfigError(f"keep_from: got {keep_from}, accepts 0 to {step.config.num_layers}")
        return cls(step.config, step.cache, step.dtype, store, keep_from, smallest)

    def __call__(
        self, params, inputs, positions, cache=None, block=None, at: jax.Array | int = 0, mask=None, *, taps=()
    ) -> Any:
        """As `Step.__call__`."""
        last = self.config.num_layers if self.keep_from is None else self.keep_from

        def around(i: int, run: Any, x: jax.Array, positions: jax.Array, block: Any) -> Any:
            if i >= last:
                return run(x, positions, block=block)
            rest = (positions, run.keywords["mask"], run.keywords["table"])
            return self._offloaded(i, params[f"layers_{i}"], x, rest), None, None

        variables = {"params": params}
        way = around if cache is None and self.store is not None else None
        return Decoder(self.config).apply(variables, inputs, positions, cache, block, at, mask, taps, way)

    def _offloaded(self, i: int, weights: Any, x: jax.Array, rest: Any) -> jax.Array:
        def apply(weights: Any, x: jax.Array, rest: Any) -> jax.Array:
            positions, mask, table = rest
            layer = DecoderLayer(self.config, layer=i, parent=None)
            y, _, _ = layer.apply({"params": weights}, x, positions, None, None, None, 0, mask, table)  # pyright: ignore[reportGeneralTypeIssues, reportAssignmentType]  # Linen types `apply` as if it could return variables
            return y

        return offloaded(apply, self.store, smallest=self.smallest)(weights, x, rest)


@struct.dataclass
class Saved:
    """What a gradient is made from: `leaves`, those in memory, with None where a number says which array of `ticket`
    belongs there."""

    ticket: jax.Array
    leaves: tuple[Any, ...]
    places: tuple[int | None, ...] = struct.field(pytree_node=False)
    shapes: tuple[jax.ShapeDtypeStruct, ...] = struct.field(pytree_node=False)
    structure: Any = struct.field(pytree_node=False)


def offloaded(function: Any, store: Any, *, smallest: int = SMALLEST) -> Any:
    """`function(weights, *inputs) -> array`, with what it saves for its gradient in `store`.

    Weights stay where they are, as do arrays of fewer than `smallest` elements. A call that nobody differentiates
    writes nothing. Raises, when run, `JobError` where the disk is full.
    """

    @jax.custom_vjp
    def run(weights, *inputs):
        return function(weights, *inputs)

    def forward(weights, *inputs):
        y, pull = jax.vjp(function, weights, *inputs)
        leaves, structure = jax.tree.flatten(pull)
        kept = {id(leaf) for leaf in jax.tree.leaves(weights)}
        sent: dict[int, Any] = {}
        for leaf in leaves:
            if leaf.size >= smallest and id(leaf) not in kept:
                sent.setdefault(id(leaf), leaf)  # what is saved twice is written once
        number = {key: place for place, key in enumerate(sent)}
        places = tuple(number.get(id(leaf)) for leaf in leaves)
        ticket = jnp.int32(0)
        if sent:
            ticket = io_callback(_writer(store), jax.ShapeDtypeStruct((), jnp.int32), *sent.values())
        inside = tuple(leaf if place is None else None for leaf, place in zip(leaves, places, strict=True))
        shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in sent.values())
        return y, Saved(ticket, inside, places, shapes, structure)

    def backward(saved: Saved, cotangent):
        arrays: Sequence[Any] = ()
        if saved.shapes:
            # An argument of the call, so that it waits until the layers after this one are done with their own.
            ready = cotangent[(0,) * cotangent.ndim]
            arrays = io_callback(_reader(store), saved.shapes, saved.ticket, ready)
        zipped = zip(saved.leaves, saved.places, strict=True)
        leaves = [leaf if place is None else arrays[place] for leaf, place in zipped]
        return jax.tree.unflatten(saved.structure, leaves)(cotangent)

    run.defvjp(forward, backward)
    return run


def keep_from(times: Sequence[float], sizes: Sequence[float], bandwidth: float, total: float | None = None) -> int:
    """The first layer whose activations should stay in memory, by the paper's rule; `len(times)` where none should.

    times: seconds of each layer's forward pass; sizes: bytes that each would write; bandwidth: bytes a second of the
    disk; total: seconds of the whole forward pass (default: the sum). With a backward pass twice as long as the
    forward, layer n is needed again `3 total - 2 (times before it)` after the start of the step; until then all before
    it must be written, and its own bytes be written and read. Raises ConfigError for lists of unequal length.
    """
    if len(times) != len(sizes) or bandwidth <= 0:
        raise ConfigError(f"got {len(times)} times, {len(sizes)} sizes, {bandwidth} bytes a second; accepts as many")
    total = sum(times) if total is None else total
    before_time = before_size = 0.0
    for n, (seconds, size) in enumerate(zip(times, sizes, strict=True)):
        window = 3 * total - 2 * before_time
        if before_size + 2 * size > bandwidth * window:
            return n
        before_time, before_size = before_time + seconds, before_size + size
    return len(times)


def profiled(step: OffloadStep, run: Any) -> OffloadStep:
    """`step` with the `keep_from` that one run of a training step tells: `run(step)` does it and waits for its end.

    Layers' times are those between their writes; the disk's speed that of the whole step's bytes, both ways. Run a
    step before, so that nothing is compiled in this one.
    """
    store = step.store
    if store is None:
        raise ConfigError("step: got one without a store, accepts OffloadStep.of(step, store)")
    step = dataclasses.replace(step, keep_from=None)
    run(step)
    begun, before = store.begin_profile(), dataclasses.replace(store.counts)
    run(step)
    events, busy = store.end_profile()
    moved = store.counts.written + store.counts.read - before.written - before.read
    if not events or not moved:
        return step
    times = np.diff([begun, *(time for time, _ in events)])
    bandwidth = moved / max(busy, 1e-9)
    kept = keep_from(times.tolist(), [size for _, size in events], bandwidth)
    return dataclasses.replace(step, keep_from=kept)


def _writer(store: ActivationStore) -> Any:
    return lambda *arrays: np.int32(store.write(arrays))


def _reader(store: ActivationStore) -> Any:
    return lambda ticket, ready: tuple(store.read(int(ticket)))
