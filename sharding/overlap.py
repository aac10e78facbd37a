"""Collective matmuls: the ring steps of an all-gather or a reduce-scatter, each beside the product that it feeds.

In Megatron's tensor parallelism with sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198) a block gathers
its tokens, multiplies by columns of the weights, then by rows, and scatters the sums. Here a ring hands on one shard
of tokens a step while the shard at hand is multiplied, so that links and matrix units work at once: what T3 (Pati et
al. 2024, arXiv:2401.16677) does in hardware, by the decomposition of Wang et al. 2023 ("Overlap communication with
dependent computation", ASPLOS). `OverlappedStep` runs a decoder with it.

Guarantee: exact, up to the order of sums. State: none. Defaults: one ring; `bidirectional` sends half of each shard
each way, which pays where links carry both ways at once. Departs: T3 triggers transfers by tile in the memory
controller; here a step is a whole shard, and the compiler's scheduler overlaps it. The backward pass gathers again
instead of keeping what was gathered, and sums travel in the operands' dtype. Weights of one input (q, k, v) share its
ring, which XLA finds to be the same; their backward passes scatter a gradient each, where a fused weight would one.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxinfer import cache as kv
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models.decoder import Output
from jaxinfer.models.step import Step, WrappedStep
from jaxinfer.ops import weights
from jaxinfer.sharding.rules import TENSOR, AxisRules

COLUMNS = frozenset({"q", "k", "v", "gate", "up", "head"})
ROWS = frozenset({"o", "down"})


def all_gather_matmul(
    x: jax.Array, w: Any, axis: str, *, dim: int = -2, bidirectional: bool = False, transposed: bool = False
) -> jax.Array:
    """`all_gather(x, dim) @ w` inside `shard_map`: `x[..., K]` is this device's shard, `w[K, N / n]` its columns.

    `dim`: the axis of x that is split over mesh axis `axis`. `w`: an array or any weight leaf; `transposed`: `w[N / n,
    K]`, as tied embeddings are stored. Returns `[..., N / n]` with `dim` whole. Differentiable; one permute a step.
    """
    dim = dim % x.ndim
    product = weights.dot_transposed if transposed else weights.dot

    @jax.checkpoint
    def run(x, w):
        return jnp.concatenate(
            [
                _gathered(part, functools.partial(product, w=w), axis, dim, way)
                for part, way in _ways(x, dim, bidirectional)
            ],
            dim + 1,
        )

    n, out = _size(axis), run(x, w)  # [..., n, shard, ...]: shards in order, each put together of its two halves
    return out.reshape(*x.shape[:dim], n * x.shape[dim], *out.shape[dim + 2 :])


def matmul_reduce_scatter(x: jax.Array, w: Any, axis: str, *, dim: int = -2, bidirectional: bool = False) -> jax.Array:
    """`reduce_scatter(x @ w, dim)` inside `shard_map`: `x[..., K / n]`, `w[K / n, N]` (an array or any weight leaf).

    Returns this device's shard of the sum over `axis`: `[..., N]` with `dim` cut n ways. Differentiable; one permute a
    step. Raises InputError for a `dim` that the devices do not divide.
    """
    dim, shards = dim % x.ndim, _shards(x, dim, axis)

    @jax.checkpoint
    def run(shards, w):
        parts = _ways(shards, dim + 1, bidirectional)
        return jnp.concatenate(
            [_scattered(lambda r, p=p: weights.dot(_take(p, r, dim), w), axis, way) for p, way in parts], dim
        )

    return run(shards, w)


def take_reduce_scatter(
    table: Any, ids: jax.Array, axis: str, *, dim: int = -1, bidirectional: bool = False
) -> jax.Array:
    """Rows of a table whose vocabulary is split over `axis`, this device's shard of them: `table[V / n, D]`, `ids
    i32[...]` the same on every device -> `[..., D]` with `dim` of ids cut n ways."""
    dim, shards = dim % ids.ndim, _shards(ids, dim % ids.ndim, axis)
    rows = table.shape[0]

    def own(ids):
        local = ids - jax.lax.axis_index(axis) * rows
        mine = (local >= 0) & (local < rows)
        return jnp.where(mine[..., None], weights.take(table, jnp.clip(local, 0, rows - 1)), 0)

    parts = _ways(shards, dim + 1, bidirectional)
    return jnp.concatenate([_scattered(lambda r, p=p: own(_take(p, r, dim)), axis, way) for p, way in parts], dim)


def _gathered(x: jax.Array, product: Any, axis: str, dim: int, way: int) -> jax.Array:
    """`product` of every device's x, in the order of devices along a new axis `dim`."""
    n, i = _size(axis), jax.lax.axis_index(axis)
    ring = [(j, (j - way) % n) for j in range(n)]
    blocks = []
    for step in range(n):
        after = jax.lax.ppermute(x, axis, ring) if step < n - 1 else x  # sent while x is multiplied
        blocks.append(product(x))
        x = after
    # blocks[s] is of device i + way s; in order they are a rotation.
    index = (way * (jnp.arange(n) - i)) % n
    return jnp.take(jnp.stack(blocks, dim), index, axis=dim, unique_indices=True, mode="clip")


def _scattered(block: Any, axis: str, way: int) -> jax.Array:
    """The sum over devices of their `block(i)`, at device i."""
    n, i = _size(axis), jax.lax.axis_index(axis)
    ring = [(j, (j + way) % n) for j in range(n)]
    total = block((i - way) % n)
    for step in range(2, n + 1):
        total = jax.lax.ppermute(total, axis, ring) + block((i - way * step) % n)
    return total


def _ways(x: jax.Array, dim: int, bidirectional: bool) -> list[tuple[jax.Array, int]]:
    """The parts of x that go around the ring, and which way: all of it one way, or a half each."""
    half = x.shape[dim] // 2
    if not bidirectional or half == 0:
        return [(x, 1)]
    return [(p, way) for p, way in zip(jnp.split(x, [half], dim), (1, -1), strict=True)]


def _shards(x: jax.Array, dim: int, axis: str) -> jax.Array:
    n = _size(axis)
    if x.shape[dim] % n:
        raise InputError(f"{x.shape[dim]} entries of axis {dim} cannot be scattered over {n} devices of {axis!r}")
    return x.reshape(*x.shape[:dim], n, x.shape[dim] // n, *x.shape[dim + 1 :])


def _take(shards: jax.Array, r: jax.Array, dim: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(shards, r, dim, keepdims=False)


def _size(axis: str) -> int:
    return jax.lax.axis_size(axis)


@struct.dataclass
class Ring:
    """A tensor-parallel weight that is multiplied by a collective matmul: a leaf for `ops`, made inside `shard_map`.

    `kind`: "column" (input gathered), "row" (output scattered) or "vocab" (an embedding table: rows scattered when
    taken, input gathered where it is a tied head). `dim`: the axis of activations that is split.
    """

    weight: Any
    axis: str = struct.field(pytree_node=False)
    kind: str = struct.field(pytree_node=False)
    dim: int = struct.field(pytree_node=False)
    bidirectional: bool = struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of this device's part."""
        return tuple(self.weight.shape)


def _dot(x: jax.Array, w: Ring) -> jax.Array:
    run = matmul_reduce_scatter if w.kind == "row" else all_gather_matmul
    return run(x, w.weight, w.axis, dim=w.dim, bidirectional=w.bidirectional)


def _dot_transposed(x: jax.Array, w: Ring) -> jax.Array:
    return all_gather_matmul(x, w.weight, w.axis, dim=w.dim, bidirectional=w.bidirectional, transposed=True)


def _rows_of(w: Ring, ids: jax.Array) -> jax.Array:
    return take_reduce_scatter(w.weight, ids, w.axis, dim=w.dim, bidirectional=w.bidirectional)


weights.register(Ring, weights.Rules(lambda w: weights.materialize(w.weight), _dot, _dot_transposed, _rows_of))


@dataclasses.dataclass(frozen=True)
class OverlappedStep(WrappedStep):
    """A `Step` whose tensor-parallel layers are collective matmuls over mesh axis `axis`, for any loop that takes one.

    Params are placed by `rules.TENSOR` (`shardings(step, mesh, TENSOR)`). Tokens are split over the axis between the
    products: along the sequence where its length allows, else along the rows, as when decoding. Other axes of the mesh
    are left to XLA. Dense decoders with rotary, T5 or no positions, float weights, dense and ring caches. Raises
    ConfigError for others, and for heads, widths or a vocabulary that the axis does not divide; InputError for a call
    of which neither rows nor length are divided.
    """

    step: Step
    mesh: Mesh
    axis: str = "tensor"
    bidirectional: bool = False

    def __post_init__(self):
        config = self.step.config
        if self.axis not in self.mesh.axis_names or set(self.mesh.axis_types) != {AxisType.Auto}:
            raise ConfigError(f"overlap needs an AxisType.Auto mesh with axis {self.axis!r}, got {self.mesh}")
        if config.num_experts or config.position not in ("rope", "t5", "none"):
            raise ConfigError("overlap runs dense decoders with rope, t5 or no positions; use jit with sharded params")
        for name in ("num_heads", "num_kv_heads", "mlp_size", "vocab_size"):
            if getattr(config, name) % self.parts:
                fits = [n for n in range(1, self.parts) if getattr(config, name) % n == 0]
                raise ConfigError(f"{name} {getattr(config, name)} over {self.parts} devices: {fits} would fit")

    @property
    def parts(self) -> int:
        """Devices of the axis."""
        return self.mesh.shape[self.axis]

    def __call__(
        self, params, inputs, positions, cache=None, block=None, at: jax.Array | int = 0, mask=None, *, taps=()
    ) -> tuple[Output, tuple[Any, ...] | None]:
        """As `Step`, `hidden` split along its sequence or its rows. `inputs` are ids."""
        if inputs.ndim != 2:
            raise InputError("overlap takes ids i32[B, T], not embeddings")
        dim = self._split_dim(inputs.shape)
        specs = () if cache is None else cache.specs
        for spec in specs:
            if not isinstance(spec, kv.Dense):
                raise ConfigError(f"overlap runs with dense and ring caches, got {type(spec).__name__}")
        local, of_cache = self._local(), P(None, self.axis)

        def run(params, inputs, positions, states, block, at, mask):
            own = None
            if cache is not None:
                own = kv.Cache(states, tuple(dataclasses.replace(s, attention=_heads(s, self.parts)) for s in specs))
            output, block = local(self._leaves(params, dim), inputs, positions, own, block, at, mask, taps=taps)
            return output.hidden, output.taps, block

        if cache is not None and block is None:
            block = kv.new_blocks(cache, inputs.shape[1])
        states = None if cache is None else cache.states

        def of(tree):
            return jax.tree.map(lambda leaf: of_cache if leaf.ndim == 4 else P(), tree)

        split = P(self.axis) if dim == 0 else P(None, self.axis)
        program = self._shard_map(
            run, (self._specs(params), P(), P(), of(states), of(block), P(), P()), (split, split, of(block))
        )
        hidden, tapped, block = program(params, inputs, positions, states, block, jnp.asarray(at, jnp.int32), mask)
        return Output(hidden, tapped, (None,) * self.config.num_layers), block

    def head(self, params, hidden: jax.Array) -> jax.Array:
        """Logits f32[B, T, V], split over the vocabulary, of `hidden[B, T, D]`."""
        dim, local = self._split_dim(hidden.shape), self._local()
        names = ("embedding",) if self.config.tie_embeddings else ("head",)
        params = {name: params[name] for name in names}

        def run(params, hidden):
            return local.head(self._leaves(params, dim), hidden)

        split = P(self.axis) if dim == 0 else P(None, self.axis)
        return self._shard_map(run, (self._specs(params), split), P(None, None, self.axis))(params, hidden)

    def _shard_map(self, run, in_specs, out_specs):
        return jax.shard_map(
            run, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, axis_names={self.axis}, check_vma=False
        )

    def _split_dim(self, shape: tuple[int, ...]) -> int:
        """1 for the sequence, 0 for the rows."""
        for dim in (1, 0):
            if shape[dim] % self.parts == 0:
                return dim
        raise InputError(
            f"a call of {shape[0]} rows of {shape[1]} tokens: {self.parts} devices of {self.axis!r} must divide one"
        )

    def _local(self) -> Step:
        """The step of one device: its share of heads, width and vocabulary."""
        c, n = self.config, self.parts
        config = dataclasses.replace(
            c, num_heads=c.num_heads // n, num_kv_heads=c.num_kv_heads // n, mlp_size=c.mlp_size // n,
            vocab_size=c.vocab_size // n,
        )  # fmt: skip
        return dataclasses.replace(self.step, config=config)

    def _specs(self, params: Any) -> Any:
        abstract = self.step.abstract()
        rules: AxisRules = TENSOR.replace(**{name: self.axis for name, axes in TENSOR.table if axes == "tensor"})

        def of(path, leaf):
            declared = abstract
            for key in path:
                declared = declared[key.key]
            return rules.spec(declared.names)

        return jax.tree_util.tree_map_with_path(of, params)

    def _leaves(self, params: Any, dim: int) -> Any:
        """The params with `Ring` leaves."""

        def of(path, leaf):
            name = path[-1].key
            kinds = {**dict.fromkeys(COLUMNS, "column"), **dict.fromkeys(ROWS, "row"), "embedding": "vocab"}
            return Ring(leaf, self.axis, kinds[name], dim, self.bidirectional) if name in kinds else leaf

        return jax.tree_util.tree_map_with_path(of, params)


def _heads(spec: kv.Dense, parts: int) -> Any:
    """The attention arithmetic of one device's share of heads."""
    a = spec.attention
    return dataclasses.replace(a, num_heads=a.num_heads // parts, num_kv_heads=a.num_kv_heads // parts)
