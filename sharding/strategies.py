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
from jaxinfer import quant
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models.decoder import Attention, Experts, Mlp
from jaxinfer.models.step import WrappedStep
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
BETWEEN = ("batch", "length", None)  # the residual stream between blocks
INSIDE = ("batch", "context", None)


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


def state_axes(spec: Any, state: Any) -> Any:
    """The logical axes of each array of a cache's State (or Block), in its structure: rows, and heads where the second
    axis is the heads'; what the Spec says itself, where it does (`logical_axes`)."""
    own = getattr(spec, "logical_axes", None)
    if own is not None:
        return own
    groups = spec.attention.num_kv_heads

    def axes(leaf: Any) -> tuple[str | None, ...]:
        heads = "kv_heads" if leaf.ndim > 2 and leaf.shape[1] == groups else None
        return ("batch", heads, *[None] * leaf.ndim)[: leaf.ndim]

    return jax.tree.map(axes, state)


@dataclasses.dataclass(frozen=True)
class Sharded(WrappedStep):
    """`step` (a `jaxinfer.models.Step`) kept to `rules` on `mesh`: hashable, the static argument of any loop.

    Rows must be a multiple of what splits them (InputError); tokens of a call that their axes do not divide stay whole.
    """

    step: Any
    mesh: Mesh
    rules: AxisRules

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "step":
            raise AttributeError(name)
        return getattr(self.step, name)  # cache, abstract, init: the plain step's

    def shardings(self, params: Any = None) -> Any:
        """NamedShardings of the params (`rules.shardings`)."""
        return tables.shardings(self.step, self.mesh, self.rules, params)

    def place(self, params: Any) -> Any:
        """`params` on the mesh; quantized and adapted leaves as their logical arrays."""
        return jax.device_put(params, self.shardings(params))

    def __call__(self, params, inputs, positions, cache=None, block=None, at=0, mask=None, *, taps=()):
        """As `models.Step`. Without a cache under a context axis, attention goes round the ring."""
        # Not by `length`: what depends on positions is needed whole inside a block, and a split vocabulary's rows are
        # summed over the very axis that would split the tokens.
        tokens = ("batch", "context", None)
        inputs, positions = self.split(inputs, tokens[: inputs.ndim]), self.split(positions, tokens[:2])
        training = cache is None
        if training and self._parts("context") > 1:
            cache = ContextCache(self.mesh, self.rules).empty(self.config, inputs.shape[0])
        with nn.intercept_methods(self._intercept):
            output, block = self.step(params, inputs, positions, cache, block, at, mask, taps=taps)
        output = dataclasses.replace(
            output,
            hidden=self.split(output.hidden, BETWEEN),
            taps=tuple(self.split(tap, BETWEEN) for tap in output.taps),
        )
        return output, None if training else block

    def head(self, params, hidden: jax.Array) -> jax.Array:
        """Logits f32[..., V], split over the vocabulary."""
        logits = self.step.head(params, self.split(hidden, INSIDE) if hidden.ndim == 3 else hidden)
        axes = {2: ("batch", "vocab"), 3: ("batch", "context", "vocab")}.get(logits.ndim)
        return logits if axes is None else self.split(logits, axes)

    def new_cache(self, batch: int, capacity: int) -> kv.Cache:
        """An empty cache, split by rows and heads, and by slots where a context axis is there."""
        parts = self._parts("context")
        if parts == 1:
            return self._split_cache(self.step.new_cache(batch, capacity))
        policy = ContextCache(self.mesh, self.rules)
        layers = range(self.config.num_layers)
        specs = tuple(policy.spec(self.config.attention(i), capacity, self.step.dtype) for i in layers)
        return self._split_cache(kv.init(specs, batch))

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

    def _split_cache(self, cache: kv.Cache) -> kv.Cache:
        pairs = zip(cache.specs, cache.states, strict=True)
        states = tuple(jax.tree.map(self.split, state, state_axes(spec, state)) for spec, state in pairs)
        return dataclasses.replace(cache, states=states)

    def _whole_rows(self, table: Any) -> Any:
        """An embedding that is split both ways, gathered over its embed axis: XLA would exchange rows of the table.
        Where only its embed axis is split, what is exchanged is the tokens' rows, and that is less."""
        if self._parts("embed") == 1 or self._parts("vocab") == 1:
            return table
        named = quant.map_axes(table, ("vocab", "embed"))
        whole = self.rules.replace(embed=None)
        return jax.tree.map(lambda x, axes: tables.constrain(x, self.mesh, whole.spec(axes)), table, named)

    def _as_looked_up(self, x: jax.Array) -> jax.Array:
        """Tokens' rows as an embedding that is split over its embed axis alone gives them: columns split, and rows of
        the batch whole over those axes. The exchange after it, and backward before it, is then one all-to-all; left to
        itself, XLA gathers the whole batch's gradient where other axes split rows too."""
        embed, batch = (tables.names(self.rules[name]) for name in ("embed", "batch"))
        if self._parts("embed") == 1 or self._parts("vocab") > 1:
            return x
        rows = tuple(axis for axis in batch if axis not in embed)
        context = None if x.shape[1] % self._parts("context") else self.rules["context"]
        return tables.constrain(x, self.mesh, PartitionSpec(rows or None, context, embed))

    def _intercept(self, run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Around the decoder's own modules: tokens whole (or by context) inside a block, as `length` says between."""
        module = context.module
        if context.method_name == "_embed":
            return self._leave(self._as_looked_up(run(self._whole_rows(args[0]), *args[1:], **kwargs)))
        if context.method_name != "__call__" or not isinstance(module, Attention | Mlp | Experts):
            return run(*args, **kwargs)
        x, *rest = args
        # Where only rows are split too: left to XLA, tokens would be routed over all devices together.
        if isinstance(module, Experts) and any(self._parts(name) > 1 for name in ("experts", "mlp", "batch")):
            return self._leave(expert_parallel.apply(module, self.split(x, INSIDE), self.mesh, self.rules))
        out = run(self.split(x, INSIDE), *rest, **kwargs)
        if isinstance(module, Attention):
            return self._leave(out[0]), *out[1:]
        return self._leave(out)

    def _leave(self, x: jax.Array) -> jax.Array:
        """A block's output, whole and then split as between blocks: both, since a constraint holds for the gradient
        too, and XLA would carry the split of the tokens into the block's backward pass, where it gathers weights and
        exchanges scores for it. The sum that ends split is a reduce-scatter where the compiler makes them."""
        return self.split(self.split(x, INSIDE), BETWEEN)
