"""Strategies: one table from logical to mesh axes each, products of them, and the step that keeps a model to a table.

A table says where weights lie and how a call's arrays are split: `batch` rows, `length` tokens between blocks,
`context` tokens inside attention and slots of a cache. `Sharded` is a model's `Step` under a mesh: any loop, drafter
or recipe takes it in place of the plain one, and gets the same numbers.

- data: rows. - fsdp: rows, and every weight over its embed axis, gathered where it is used (ZeRO-3: Rajbhandari et al.
2020, 1910.02054; FSDP). - tensor: heads and MLP columns, one all-reduce after attention and one after the MLP
(Megatron-LM: Shoeybi et al. 2019, 1909.08053), vocabulary too. - sequence: tensor, with tokens split between blocks, so
that the all-reduce becomes a reduce-scatter and an all-gather (Korthikanti et al. 2022, 2205.05198). - expert: experts
and rows over one axis (`experts.py`). - context: tokens of a row (`ring_attention.py`).

Guarantee: exact (sums in another order). State: none of its own; caches are split by rows, heads and, under context,
slots. Departure: Megatron pads a vocabulary that does not divide; here it stays whole.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxinfer import cache as kv
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models.decoder import Attention, Experts, Mlp
from jaxinfer.sharding import experts as expert_parallel
from jaxinfer.sharding import rules as tables
from jaxinfer.sharding.mesh import AXES, check, describe
from jaxinfer.sharding.ring_attention import ContextCache
from jaxinfer.sharding.rules import AxisRules

WHOLE = tables.REPLICATED.replace(batch=None, length=None, context=None)
STRATEGIES: Mapping[str, AxisRules] = {
    "data": WHOLE.replace(batch="data"),
    "fsdp": WHOLE.replace(batch="fsdp", embed="fsdp"),
    "tensor": WHOLE.replace(vocab="tensor", heads="tensor", kv_heads="tensor", mlp="tensor"),
    "sequence": WHOLE.replace(vocab="tensor", heads="tensor", kv_heads="tensor", mlp="tensor", length="tensor"),
    "expert": WHOLE.replace(batch="expert", experts="expert"),
    "context": WHOLE.replace(length="context", context="context"),
}


def product(*names: str) -> AxisRules:
    """The table of several strategies at once: an axis that two of them split is split by both, in the given order."""
    rows: dict[str, tuple[str, ...]] = {name: () for name, _ in WHOLE.table}
    for name in names:
        if name not in STRATEGIES:
            raise ConfigError(f"strategy {name!r} is unknown; accepted: {', '.join(STRATEGIES)}")
        for logical, axes in STRATEGIES[name].table:
            rows[logical] += tuple(axis for axis in tables.names(axes) if axis not in rows[logical])
    joined = {name: axes[0] if len(axes) == 1 else axes or None for name, axes in rows.items()}
    return AxisRules(tuple(joined.items()))


def strategy_for(axes: Mapping[str, int], config: Any = None, *, sequence: bool = False) -> AxisRules:
    """The table of a mesh's axes: `{"data": 2, "tensor": 4}` is data by tensor; with `sequence`, tensor splits tokens
    too.

    A vocabulary that `config` has and tensor does not divide stays whole. Raises ConfigError for an unknown axis, for
    `stage` (a pipeline is a program, not a table), and as `mesh.check` for a model that does not divide.
    """
    check(axes, config)
    if axes.get("stage", 1) > 1:
        raise ConfigError(f"mesh {describe(axes)}: stage is no row of a table; accepted: sharding.pipeline_*")
    table = product(*("sequence" if sequence and name == "tensor" else name for name in AXES if name in axes))
    if config is not None and config.vocab_size % axes.get("tensor", 1):
        table = table.replace(vocab=None)
    return table


def sharded(step: Any, mesh: Mesh, *, sequence: bool = False) -> Sharded:
    """`step` under the strategy of the mesh's axes. Errors as `strategy_for`."""
    return Sharded(step, mesh, strategy_for(dict(mesh.shape), step.config, sequence=sequence))


def automatic(function: Callable[..., Any], mesh: Mesh, out: Any) -> Callable[..., Any]:
    """`function` for callers whose mesh has Explicit axes: inside, they are Auto. `out`: PartitionSpecs of its results
    (a prefix of their tree). The caller has set the mesh (`jax.set_mesh`). A mesh of Auto axes leaves it as it is."""
    explicit = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit]
    if not explicit:
        return function
    return jax.sharding.auto_axes(function, axes=tuple(explicit), out_sharding=out)


@dataclasses.dataclass(frozen=True)
class Sharded:
    """`step` (a `jaxinfer.models.Step`) kept to `rules` on `mesh`: hashable, the static argument of any loop.

    Rows must be a multiple of what splits them (InputError); tokens of a call that their axes do not divide stay whole.
    """

    step: Any
    mesh: Mesh
    rules: AxisRules

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "step":
            raise AttributeError(name)
        return getattr(self.step, name)  # config, dtype, eos, cache, abstract, init: the plain step's

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self.step.vocab_size

    def shardings(self, params: Any = None) -> Any:
        """NamedShardings of the params (`rules.shardings`)."""
        return tables.shardings(self.step, self.mesh, self.rules, params)

    def place(self, params: Any) -> Any:
        """`params` on the mesh; quantized and adapted leaves as their logical arrays."""
        return jax.device_put(params, self.shardings(params))

    def __call__(self, params, inputs, positions, cache=None, block=None, at=0, mask=None, *, taps=()):
        """As `models.Step`. Without a cache under a context axis, attention goes round the ring."""
        tokens = ("batch", "length", None)[: inputs.ndim]
        inputs, positions = self.split(inputs, tokens), self.split(positions, ("batch", "length"))
        training = cache is None
        if training and self._parts("context") > 1:
            cache = ContextCache(self.mesh, self.rules).empty(self.config, inputs.shape[0])
        with nn.intercept_methods(self._intercept):
            output, block = self.step(params, inputs, positions, cache, block, at, mask, taps=taps)
        output = dataclasses.replace(
            output,
            hidden=self.split(output.hidden, ("batch", "length", None)),
            taps=tuple(self.split(tap, ("batch", "length", None)) for tap in output.taps),
        )
        return output, None if training else self._states(block)

    def head(self, params, hidden: jax.Array) -> jax.Array:
        """Logits f32[..., V], split over the vocabulary."""
        logits = self.step.head(params, hidden)
        between = (None,) * (logits.ndim - 2)
        return self.split(logits, ("batch", *between, "vocab") if logits.ndim > 1 else ("vocab",))

    def embed(self, params, ids: jax.Array) -> jax.Array:
        """As `models.Step.embed`."""
        return self.step.embed(params, ids)

    def new_cache(self, batch: int, capacity: int) -> kv.Cache:
        """An empty cache, split by rows and heads, and by slots where a context axis is there."""
        parts = self._parts("context")
        if parts == 1:
            cache = self.step.new_cache(batch, capacity)
            return dataclasses.replace(cache, states=self._states(cache.states))
        policy = ContextCache(self.mesh, self.rules)
        layers = range(self.config.num_layers)
        specs = tuple(policy.spec(self.config.attention(i), capacity, self.step.dtype) for i in layers)
        cache = kv.init(specs, batch)
        return dataclasses.replace(cache, states=self._states(cache.states, slots=True))

    def split(self, x: jax.Array, logical: tuple[str | None, ...]) -> jax.Array:
        """`x` constrained to the table's layout of its logical axes."""
        spec = []
        for size, name in zip(x.shape, logical, strict=True):
            axes, parts = (None, 1) if name is None else (self.rules[name], self.rules.parts(name, self.mesh))
            if size % parts and name == "batch":
                raise InputError(f"a batch of {size} rows cannot be split {parts} ways over {axes!r} of the mesh")
            spec.append(None if size % parts else axes)
        return tables.constrain(x, self.mesh, PartitionSpec(*spec))

    def _parts(self, logical: str) -> int:
        return self.rules.parts(logical, self.mesh)

    def _states(self, states: Any, *, slots: bool = False) -> Any:
        """Every leaf by rows, and by heads where its second axis is the heads'."""
        groups = self.config.num_kv_heads

        def one(leaf: jax.Array) -> jax.Array:
            heads = "kv_heads" if leaf.ndim > 2 and leaf.shape[1] == groups else None
            axes = ["batch", heads, *[None] * leaf.ndim][: leaf.ndim]
            if slots and leaf.ndim > 2:
                axes[2] = "context"
            return self.split(leaf, tuple(axes))

        return jax.tree.map(one, states)

    def _intercept(self, run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Around the decoder's own modules: tokens whole (or by context) inside a block, as `length` says between."""
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, Attention | Mlp | Experts):
            return run(*args, **kwargs)
        x, *rest = args
        if isinstance(module, Experts) and self._parts("experts") > 1:
            return self.split(expert_parallel.apply(module, x, self.mesh, self.rules), ("batch", "length", None))
        out = run(self.split(x, ("batch", "context", None)), *rest, **kwargs)
        between = ("batch", "length", None)
        if isinstance(module, Attention):
            return self.split(out[0], between), *out[1:]
        return self.split(out, between)
