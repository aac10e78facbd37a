"""Params as paths: the walk over leaves, their axes and arrays, and the choice of leaves by regular expressions.

Stability: experimental.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxinfer.errors import ConfigError, InputError


def leaves(params: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(path, leaf)` of a nested dict, in its own order; paths join with "/": `layers_0/mlp/gate`."""
    if not isinstance(params, Mapping):
        yield prefix, params
        return
    for name, value in params.items():
        if not isinstance(name, str) or "/" in name or "." in name:
            raise InputError(f"params{'/' * bool(prefix)}{prefix}: names are strings without '/' and '.', got {name!r}")
        yield from leaves(value, f"{prefix}/{name}" if prefix else name)


def build(pairs: Iterator[tuple[str, Any]] | Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The nested dict of `(path, leaf)` pairs: the inverse of `leaves`."""
    tree: dict[str, Any] = {}
    for path, leaf in pairs:
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def map_leaves(fn: Callable[[str, Any], Any], params: Any) -> dict[str, Any]:
    """A new nested dict with `fn(path, leaf)` in place of every leaf."""
    return build((path, fn(path, leaf)) for path, leaf in leaves(params))


def map_axes(leaf: Any, logical_axes: tuple[str | None, ...]) -> Any:
    """Logical axis names in place of the leaf's arrays: a tuple for an array, the same pytree type for a leaf type."""
    return leaf.map_axes(logical_axes) if hasattr(leaf, "map_axes") else tuple(logical_axes)


def wraps(leaf: Any) -> bool:
    """True for a leaf type that stands over another weight, its `base` (which NumPy arrays happen to have too)."""
    return hasattr(leaf, "map_axes") and getattr(leaf, "base", None) is not None


def stored(leaf: Any) -> list[tuple[str, Any]]:
    """`(name, array)` of all that a leaf stores; the name is "" for an array, else like ".base.codes"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(leaf)
    return [("".join(str(key) for key in path), array) for path, array in flat]


def choose(params: Any, patterns: Sequence[str]) -> dict[str, int]:
    """`{path: index of the first pattern that matches the whole path}`; leaves that none matches are absent.

    Only matrices (two axes or more) are candidates: norms and biases stay arrays whatever the pattern.
    Raises InputError for a pattern that matches no matrix and ConfigError for one that is no regular expression.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves(params)}
    matrices = [path for path, shape in shapes.items() if len(shape) >= 2]
    chosen: dict[str, int] = {}
    for index, pattern in enumerate(patterns):
        found = [path for path in matrices if _compile(pattern).fullmatch(path)]
        if not found:
            raise InputError(_nothing(pattern, matrices, shapes))
        for path in found:
            chosen.setdefault(path, index)
    return chosen


def check_rules(rules: Sequence[tuple[str, Any]], method: str, example: str) -> list[tuple[str, Any]]:
    """Rules `(pattern, spec or None)` whose specs have `method`; ConfigError names the one that is none."""
    for rule in rules:
        if not isinstance(rule, tuple) or len(rule) != 2:
            raise ConfigError(f"a rule is a pair (pattern, spec or None), got {rule!r}")
        spec = rule[1]
        if spec is not None and (isinstance(spec, type) or not hasattr(spec, method)):
            hint = f"; did you mean {spec.__name__}()?" if isinstance(spec, type) else ""
            raise ConfigError(f"rule {rule[0]!r}: a spec such as {example} is needed, got {spec!r}{hint}")
    return list(rules)


def input_axis(path: str) -> int:
    """The axis that a product sums over: -1 for embedding tables `[V, D]`, -2 for kernels `[in, out]`."""
    name = path.rsplit("/", 1)[-1]
    return -1 if name == "embedding" or name.endswith("_embedding") else -2


def near(text: str, paths: Sequence[str]) -> str:
    """The paths most like `text`, for error messages."""
    return ", ".join(difflib.get_close_matches(text, paths, n=3, cutoff=0.0)) or "none"


def _compile(pattern: Any) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise ConfigError(f"a rule's pattern is a regular expression over paths, got {pattern!r}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"pattern {pattern!r} is no regular expression: {error}") from error


def _nothing(pattern: str, matrices: list[str], shapes: dict[str, tuple[int, ...]]) -> str:
    vectors = [path for path in shapes if path not in matrices and re.fullmatch(pattern, path)]
    if vectors:
        return f"rule {pattern!r} matches only vectors, which stay arrays: {', '.join(vectors[:3])}"
    return f"rule {pattern!r} matches no whole path of a matrix; nearest paths: {near(pattern, matrices)}"
