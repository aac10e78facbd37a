"""Adapters as weight leaves: put them over chosen matrices, train them alone, merge them and take them off again.

An adapter is a leaf type that stands over another weight, its `base`, and names in `TRAINED` which of its arrays an
optimiser is given; the rest (the base, chosen indices, a start) is frozen. `adapt` puts fresh ones over matrices by
ordered rules; `split` and `join` part params into what is trained and what is not (`train.loop.Recipe.frozen`), so
that gradients and optimiser state exist for the trained arrays alone. Every kind starts as exactly the function of its
base. The kinds: `lora.py`, `paca.py`, `soka.py`, `hydra.py`.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import ops
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.quant.tree import build, check_rules, choose, input_axis, leaves, map_leaves, near, wraps


class AdapterSpec(Protocol):
    """What a rule of `adapt` names: a frozen dataclass that puts a fresh adapter over a weight. `Lora` is the first."""

    def adapt(self, weight: Any, key: jax.Array, *, axis: int = -2) -> Any:
        """The leaf over `weight`; `axis` is the one that products sum over (-1 for embedding tables)."""
        ...


class AdapterLeaf:
    """What the leaf types share; a subclass is a `flax.struct` dataclass with `base`, `TRAINED` and `shape`."""

    TRAINED: ClassVar[tuple[str, ...]] = ()
    base: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        raise NotImplementedError(type(self).__name__)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the base; of an adapter alone, that of its arrays."""
        return (getattr(self, self.TRAINED[0]) if self.base is None else self.base).dtype


def adapt(params: Any, rules: Sequence[tuple[str, AdapterSpec | None]], key: jax.Array) -> dict[str, Any]:
    """Params with fresh adapters: `adapt(params, [(r".*/attention/.*", Lora(rank=8))], key)`.

    Rules as in `quant.apply`: the first whose pattern matches the whole path decides, `None` leaves a weight alone,
    only matrices are candidates. The function of the model does not change. An adapter's start depends on the key and
    its own path, not on the other rules. Bases may be quantized.
    Raises InputError for a rule that matches nothing (with the nearest paths), ConfigError for a malformed rule or a
    spec that does not fit a weight, naming the path.
    """
    pairs = check_rules(rules, "adapt", "quant.Lora()")
    chosen = choose(params, [pattern for pattern, _ in pairs])

    def over(path: str, leaf: Any) -> Any:
        spec = pairs[chosen[path]][1] if path in chosen else None
        if spec is None:
            return leaf
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        try:
            return spec.adapt(leaf, own, axis=input_axis(path))
        except (ConfigError, InputError) as error:
            raise type(error)(f"{error}, at {path}") from error

    return map_leaves(over, params)


def is_adapter(leaf: Any) -> bool:
    """Whether a leaf is of an adapter type."""
    return hasattr(type(leaf), "TRAINED")


def split(params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(trained, frozen)`: the trained arrays as `{path: {field: array}}`, nested, and params with None in their place.

    Only the outermost adapter of a weight is trained. Raises InputError where there is none at all.
    """
    trained: list[tuple[str, Any]] = []

    def part(path: str, leaf: Any) -> Any:
        if not is_adapter(leaf):
            return leaf
        trained.append((path, {name: getattr(leaf, name) for name in leaf.TRAINED}))
        return dataclasses.replace(leaf, **dict.fromkeys(leaf.TRAINED))

    frozen = map_leaves(part, params)
    if not trained:
        raise InputError("split: got params without an adapter; accepted: what quant.adapt or quant.attach returned")
    return build(trained), frozen


def join(trained: Any, frozen: Any) -> dict[str, Any]:
    """Params from the two parts of `split`."""

    def whole(path: str, leaf: Any) -> Any:
        if not is_adapter(leaf):
            return leaf
        node = trained
        for name in path.split("/"):
            node = node[name]
        return dataclasses.replace(leaf, **node)

    return map_leaves(whole, frozen)


def adapters(params: Any) -> dict[str, Any]:
    """The adapters alone: a nested dict of the (outermost) adapter leaves with `base=None`. What is saved."""
    return build([(path, dataclasses.replace(leaf, base=None)) for path, leaf in leaves(params) if is_adapter(leaf)])


def detach(params: Any) -> dict[str, Any]:
    """Params without their (outermost) adapters: the very bases."""
    return map_leaves(lambda _, leaf: leaf.base if is_adapter(leaf) else leaf, params)


def attach(params: Any, adapters: Any) -> dict[str, Any]:
    """Params with `adapters` over them: the inverse of `detach`. Raises InputError for one that fits nowhere."""
    given = _given(params, adapters)
    return map_leaves(lambda path, leaf: _over(path, leaf, given[path]) if path in given else leaf, params)


def merge(params: Any) -> dict[str, Any]:
    """Params with every adapter added into its base, which becomes one dense array of the base's dtype.

    Computed in float32 and rounded once. A quantized base is materialized: the same function, more bytes; quantize
    again with `quant.apply` if its error is acceptable. `params` still holds the bases: nothing is overwritten.
    """
    return map_leaves(lambda _, leaf: _merge(leaf), params)


def unmerge(params: Any, adapters: Any, base: Any = None) -> dict[str, Any]:
    """The inverse of `merge`: the adapters over their bases again.

    A sum does not tell what was added. With `base`, any params that hold the weights as they were (a checkpoint, the
    tree that was merged), the very same base leaves come back, bit for bit, and InputError says where they and the
    adapters do not make up the merged weight. Without it the adapters are subtracted, exact up to one rounding; kinds
    whose update is no sum (Hydra) raise InputError.
    """
    given = _given(params, adapters)
    bases = {} if base is None else dict(leaves(detach(base)))

    def split_off(path: str, leaf: Any) -> Any:
        if path not in given:
            return leaf
        if base is None:
            return _over(path, _subtract(path, leaf, given[path]), given[path])
        if path not in bases:
            raise InputError(f"unmerge: the base has no weight {path}; nearest paths: {near(path, list(bases))}")
        back = _over(path, bases[path], given[path])
        if not bool(jnp.array_equal(ops.materialize(back), ops.materialize(leaf))):
            raise InputError(f"unmerge: base and adapter do not make up the merged weight {path}: another base?")
        return back

    return map_leaves(split_off, params)


def _subtract(path: str, leaf: Any, adapter: Any) -> jax.Array:
    if not hasattr(adapter, "update"):
        kind = type(adapter).__name__
        raise InputError(f"unmerge: the update of a {kind} depends on its base: pass base= ({path})")
    dense = ops.materialize(leaf)
    return (dense.astype(jnp.float32) - adapter.update()).astype(dense.dtype)


def _given(params: Any, adapters: Any) -> dict[str, Any]:
    given, paths = dict(leaves(adapters)), [path for path, _ in leaves(params)]
    for path in given:
        if path not in paths:
            raise InputError(f"adapter {path} has no weight to go over; nearest paths: {near(path, paths)}")
    return given


def _over(path: str, base: Any, adapter: Any) -> Any:
    if tuple(base.shape) != tuple(adapter.shape):
        raise InputError(f"{path}: an adapter for {adapter.shape} does not fit a weight of {tuple(base.shape)}")
    return dataclasses.replace(adapter, base=base)


def _merge(leaf: Any) -> Any:
    if is_adapter(leaf) and leaf.base is not None:
        return ops.materialize(leaf)
    return dataclasses.replace(leaf, base=_merge(leaf.base)) if wraps(leaf) else leaf


def added(base: Any, update: jax.Array) -> jax.Array:
    """`base + update` as one dense array of the base's dtype: what `materialize` of an additive kind is."""
    dense = ops.materialize(frozen(base))
    return (dense.astype(jnp.float32) + update).astype(dense.dtype)


def frozen(base: Any) -> Any:
    """The base, to which no gradient goes."""
    return jax.lax.stop_gradient(base)


def check_rank(kind: str, rank: Any) -> None:
    """ConfigError for a rank that is no positive integer."""
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"{kind}: rank must be a positive integer, got {rank!r}")


def check_alpha(kind: str, alpha: Any) -> None:
    """ConfigError for an alpha that is neither None nor a positive number."""
    good = isinstance(alpha, int | float) and not isinstance(alpha, bool) and 0 < alpha < float("inf")
    if alpha is not None and not good:
        raise ConfigError(f"{kind}: alpha must be a positive number or None, got {alpha!r}")


def check_fits(kind: str, rank: int, most: int, what: str, weight: Any) -> None:
    """ConfigError for a rank above the `most` that a weight has room for."""
    if rank > most:
        raise ConfigError(f"{kind}: rank {rank} is above the {most} {what} of a matrix {tuple(weight.shape)}")


def only_kernels(kind: str, weight: Any, axis: int) -> None:
    """ConfigError for an embedding table, where a method is defined for products alone."""
    if axis != -2:
        raise ConfigError(f"{kind}: got an embedding table {tuple(weight.shape)}; accepted: kernels [in, out]")
