"""Tables from logical to mesh axes, and the shardings of a model's params, quantized and adapted leaves included.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer import quant
from jaxinfer.errors import ConfigError, InputError

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Which mesh axes each logical axis is split over: `AxisRules((("mlp", "tensor"), ("embed", None), ...))`.

    A model's every logical axis must have a row: None keeps an axis whole, a tuple splits it over several mesh axes.
    """

    table: tuple[tuple[str, MeshAxes], ...]

    def __post_init__(self):
        twice = [name for name, count in Counter(name for name, _ in self.table).items() if count > 1]
        if twice:
            raise ConfigError(f"logical axis {twice[0]!r} has two rows in the rules")

    def replace(self, **rows: MeshAxes) -> AxisRules:
        """The table with rows changed or added: `TENSOR.replace(embed="data")`."""
        return AxisRules(tuple({**dict(self.table), **rows}.items()))

    def __getitem__(self, logical: str) -> MeshAxes:
        """The row of a logical axis. Raises ConfigError where there is none."""
        rows = dict(self.table)
        if logical not in rows:
            raise ConfigError(f"logical axis {logical!r} has no row in the rules; rows: {', '.join(rows)}")
        return rows[logical]

    def parts(self, logical: str, mesh: Mesh) -> int:
        """Into how many parts `mesh` cuts a logical axis."""
        return math.prod(mesh.shape[axis] for axis in names(self[logical]))

    def spec(self, logical_axes: tuple[str | None, ...], path: str = "array") -> PartitionSpec:
        """The PartitionSpec of one array. Raises ConfigError where two of its axes would share a mesh axis."""
        rows = dict(self.table)
        missing = [name for name in logical_axes if name is not None and name not in rows]
        if missing:
            raise ConfigError(f"{path}: logical axis {missing[0]!r} has no row in the rules; rows: {', '.join(rows)}")
        parts = [None if name is None else rows[name] for name in logical_axes]
        used = Counter(axis for part in parts for axis in names(part))
        twice = [axis for axis, count in used.items() if count > 1]
        if twice:
            raise ConfigError(f"{path}: mesh axis {twice[0]!r} would split two axes of {tuple(logical_axes)}")
        return PartitionSpec(*parts)


REPLICATED = AxisRules(tuple((name, None) for name in ("vocab", "embed", "heads", "kv_heads", "mlp", "experts")))
TENSOR = REPLICATED.replace(vocab="tensor", heads="tensor", kv_heads="tensor", mlp="tensor")
EXPERT = TENSOR.replace(experts="tensor", mlp=None)


def constrain(x: jax.Array, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """`with_sharding_constraint`, also where the caller has set a mesh, whose axes then stand in for `mesh`."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec) if mesh_here(mesh) is mesh else spec)


def mesh_here(mesh: Mesh) -> Any:
    """The mesh in force in a program: the caller's abstract one (`jax.set_mesh`) where there is one, else `mesh`."""
    here = jax.sharding.get_abstract_mesh()
    return mesh if here.empty else here


def shardings(model: Any, mesh: Mesh, rules: AxisRules, params: Any = None) -> dict[str, Any]:
    """NamedShardings in the structure of the params: for `jax.device_put`, `in_shardings`, or a checkpoint's loader.

    `model`: a `Step`, or its `abstract()`: the tree that names each weight's logical axes. `params`: a tree (arrays or
    `jax.ShapeDtypeStruct`) whose leaves may be quantized or adapted; each is sharded through its `map_axes`. Default:
    plain arrays.

    Raises ConfigError, naming the path, for a mesh axis that the mesh lacks, two axes of one array on the same mesh
    axis, a length that its mesh axes do not divide, or (given a Step) a cut through an attention head; InputError for
    params that the model does not declare.
    """
    abstract = model.abstract() if hasattr(model, "abstract") else model
    declared = dict(quant.leaves(abstract))
    _check_mesh(mesh, rules, getattr(model, "config", None))

    def place(path: str, leaf: Any) -> Any:
        if path not in declared:
            raise InputError(f"{path} is no weight of the model; nearest: {quant.near(path, list(declared))}")
        axes = _logical_axes(path, declared[path])
        if len(axes) != len(leaf.shape):
            raise InputError(f"{path}: shape {tuple(leaf.shape)} does not fit the model's axes {axes}")
        named = quant.map_axes(leaf, axes)
        axes_of, structure = jax.tree.flatten(named, is_leaf=_is_axes)
        arrays = zip(quant.stored(leaf), axes_of, strict=True)
        found = [_sharding(path + child, array, axes, mesh, rules) for (child, array), axes in arrays]
        return jax.tree.unflatten(structure, found)

    plain = quant.map_leaves(lambda _, leaf: nn.unbox(leaf), abstract) if params is None else params
    return quant.map_leaves(place, plain)


def _check_mesh(mesh: Mesh, rules: AxisRules, config: Any) -> None:
    for logical, axes in rules.table:
        parts = 1
        for name in names(axes):
            if name not in mesh.axis_names:
                raise ConfigError(f"the rules name mesh axis {name!r}; the mesh has {', '.join(mesh.axis_names)}")
            parts *= mesh.shape[name]
        # A cut through a head would be correct and slow: every attention would gather it again.
        heads = getattr(config, f"num_{logical}", parts) if logical in ("heads", "kv_heads") else parts
        if heads % parts:
            hint = f"use fewer parts or rules.replace({logical}=None)"
            raise ConfigError(f"num_{logical} is {heads}, which {parts} parts over {axes!r} do not divide: {hint}")


def _sharding(path: str, array: Any, axes: tuple[str | None, ...], mesh: Mesh, rules: AxisRules) -> NamedSharding:
    spec = rules.spec(axes, path)
    for length, part in zip(array.shape, spec, strict=True):
        parts = 1
        for name in names(part):
            parts *= mesh.shape[name]
        if length % parts:
            what = f"{path}: shape {tuple(array.shape)} with axes {axes}"
            raise ConfigError(f"{what}: {length} cannot be split {parts} ways over {part!r}")
    return NamedSharding(mesh, spec)


def _logical_axes(path: str, declared: Any) -> tuple[str | None, ...]:
    if not isinstance(declared, nn.Partitioned):
        raise InputError(f"{path}: the model's abstract tree names no logical axes; pass step.abstract(), not unboxed")
    return tuple(declared.names)


def _is_axes(x: Any) -> bool:
    return type(x) is tuple


def names(part: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of a row, as a tuple."""
    if part is None:
        return ()
    return (part,) if isinstance(part, str) else tuple(part)
