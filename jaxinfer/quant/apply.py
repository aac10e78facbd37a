"""Recipes: ordered rules from paths to formats, and what the result weighs and loses.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxinfer import ops
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.quant.tree import check_rules, choose, input_axis, leaves, map_leaves, stored, wraps


class Spec(Protocol):
    """What a rule names: a frozen dataclass that turns a dense weight into a leaf. `Int8` is the first."""

    def quantize(self, weight: Any, *, axis: int = -2) -> Any:
        """The leaf for `weight`; `axis` is the one that products sum over."""
        ...


def apply(params: Any, rules: Sequence[tuple[str, Spec | None]], *, donate: bool = False) -> dict[str, Any]:
    """Params with the weights that `rules` name in the rules' formats: `apply(params, [(r".*/mlp/.*", Int8())])`.

    A rule is `(pattern, spec)`. The pattern is a regular expression that must match the whole path
    (`layers_0/mlp/gate`); the first rule that matches decides; `None` leaves a weight as it is; paths that no rule
    matches stay too. Only matrices are candidates: norms and biases stay arrays. Under an adapter or
    `ExtendedRows` it is the base that is quantized. Works leaf by leaf, eagerly, on sharded arrays, and in
    `jax.eval_shape`; `donate` frees each original as soon as its replacement exists (not those used twice).

    Raises InputError for a rule that matches nothing (with the nearest paths) or a weight that is quantized already,
    ConfigError for a malformed rule or a spec that does not fit a weight, naming the path.
    """
    pairs = check_rules(rules, "quantize", "quant.Int8()")
    chosen = choose(params, [pattern for pattern, _ in pairs])
    uses = Counter(id(array) for _, leaf in leaves(params) for array in jax.tree.leaves(leaf))

    def convert(path: str, leaf: Any) -> Any:
        spec = pairs[chosen[path]][1] if path in chosen else None
        if spec is None:
            return leaf
        try:
            return _quantize(leaf, spec, input_axis(path), lambda array: donate and uses[id(array)] == 1)
        except (ConfigError, InputError) as error:
            raise type(error)(f"{path}: {error}") from error

    return map_leaves(convert, params)


def _quantize(leaf: Any, spec: Spec, axis: int, may_free) -> Any:
    if wraps(leaf):
        return dataclasses.replace(leaf, base=_quantize(leaf.base, spec, axis, may_free))
    if hasattr(leaf, "map_axes"):
        kind = type(leaf).__name__
        raise InputError(f"the weight is a {kind} already: materialize it first, or rule it out by None")
    result = spec.quantize(leaf, axis=axis)
    if may_free(leaf) and isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
        jax.block_until_ready(result)
        leaf.delete()
    return result


def materialize(params: Any) -> dict[str, Any]:
    """Params with every leaf as one dense array: the reference that every format is compared with."""
    return map_leaves(lambda _, leaf: ops.materialize(leaf), params)


def bits_per_weight(params: Any) -> float:
    """Stored bits, everything counted (codes, scales, factors, added rows), over logical weights."""
    bits = weights = 0
    for _, leaf in leaves(params):
        weights += _size(leaf.shape)
        bits += sum(_size(array.shape) * jnp.dtype(array.dtype).itemsize * 8 for _, array in stored(leaf))
    if weights == 0:
        raise InputError("bits_per_weight: the tree holds no weights")
    return bits / weights


def relative_error(reference: Any, leaf: Any) -> jax.Array:
    """`||leaf - reference||^2 / ||reference||^2` of one weight, f32[]."""
    exact = ops.materialize(reference).astype(jnp.float32)
    return jnp.sum((ops.materialize(leaf).astype(jnp.float32) - exact) ** 2) / jnp.sum(exact**2)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
