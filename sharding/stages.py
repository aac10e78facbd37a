"""A decoder cut into stages of whole layers, its params stacked so that each device of a mesh axis holds one stage.

Stage s runs `counts[s]` consecutive layers; stages need not be equal. Slot j of the staged params holds the j-th layer
of every stage along a leading axis, zeros where a stage is shorter; such a slot is skipped, not computed. Embedding,
final norm and head are no stage's: they keep their own rows of the rules, so they may be whole on every stage
(`vocab=None`), split over the tensor axis, or stored in parts over the stages too (`vocab=("stage", "tensor")`).

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxinfer.errors import ConfigError
from jaxinfer.models.decoder import Decoder
from jaxinfer.sharding.rules import AxisRules
from jaxinfer.sharding.rules import shardings as plain_shardings

AXIS = "stage"
_LAYER = re.compile(r"layers_(\d+)")


@dataclasses.dataclass(frozen=True)
class Stages:
    """How many layers each stage runs, first to last: `Stages((3, 2, 2))`. `Stages.even(7, 3)` is the same."""

    counts: tuple[int, ...]

    def __post_init__(self):
        if not self.counts or any(not isinstance(n, int) or n < 1 for n in self.counts):
            raise ConfigError(f"layers of each stage: got {self.counts}, accepts positive integers, one a stage")

    @classmethod
    def even(cls, num_layers: int, stages: int) -> Stages:
        """Stages whose lengths differ by one at most; the first are longer, since the last has the head to run.

        Raises ConfigError for more stages than layers.
        """
        if not 1 <= stages <= num_layers:
            raise ConfigError(f"{num_layers} layers cannot be cut into {stages} stages; 1 to {num_layers} stages fit")
        each, longer = divmod(num_layers, stages)
        return cls(tuple(each + (s < longer) for s in range(stages)))

    @property
    def num(self) -> int:
        """How many stages there are."""
        return len(self.counts)

    @property
    def slots(self) -> int:
        """Layers of the longest stage."""
        return max(self.counts)

    def layer(self, stage: int, slot: int) -> int | None:
        """Which layer of the model is the `slot`-th of a stage; None where the stage is shorter."""
        return sum(self.counts[:stage]) + slot if slot < self.counts[stage] else None

    def check(self, num_layers: int, mesh: Mesh | None = None, axis: str = AXIS) -> None:
        """Raise ConfigError unless the stages make up a model of `num_layers` and lie along `axis` of the mesh."""
        if sum(self.counts) != num_layers:
            raise ConfigError(f"stages of {self.counts} layers are {sum(self.counts)}; the model has {num_layers}")
        if mesh is None:
            return
        if axis not in mesh.axis_names:
            raise ConfigError(f"the stages need mesh axis {axis!r}; the mesh has {', '.join(mesh.axis_names)}")
        if mesh.shape[axis] != self.num:
            fits = f"Stages.even({num_layers}, {mesh.shape[axis]})" if mesh.shape[axis] <= num_layers else "fewer parts"
            raise ConfigError(f"{self.num} stages on {mesh.shape[axis]} parts of mesh axis {axis!r}; use {fits}")
        explicit = [n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is AxisType.Explicit]
        if explicit:
            raise ConfigError(f"a pipeline's mesh needs axes of AxisType.Auto; {', '.join(explicit)}: Explicit")


def split(params: Mapping[str, Any], stages: Stages) -> dict[str, Any]:
    """A decoder's params as staged params: `layers_i` become `stages/slot_j`, each array with a leading stage axis.

    Leaves may be quantized or adapted. Raises ConfigError where the layers of one slot differ in structure or shape
    (a dense and a sparse MLP), naming both.
    """
    layers = {int(m.group(1)): tree for name, tree in params.items() if (m := _LAYER.fullmatch(name))}
    stages.check(len(layers))
    staged = {}
    for slot in range(stages.slots):
        found = [stages.layer(s, slot) for s in range(stages.num)]
        own = [i for i in found if i is not None]
        for other in own[1:]:
            _check_same(own[0], layers[own[0]], other, layers[other])
        empty = jax.tree.map(jnp.zeros_like, layers[own[0]])
        trees = [empty if i is None else layers[i] for i in found]
        staged[f"slot_{slot}"] = jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)
    return {**_rest(params), "stages": staged}


def merge(staged: Mapping[str, Any], stages: Stages) -> dict[str, Any]:
    """The inverse of `split`: params as every other part of jaxinfer takes them, to save or to decode with."""
    params = {name: tree for name, tree in staged.items() if name != "stages"}
    for s in range(stages.num):
        for slot in range(stages.counts[s]):
            tree = jax.tree.map(lambda array, s=s: array[s], staged["stages"][f"slot_{slot}"])
            params[f"layers_{stages.layer(s, slot)}"] = tree
    return params


def shardings(
    step: Any, mesh: Mesh, rules: AxisRules, stages: Stages, params: Any = None, *, axis: str = AXIS
) -> dict[str, Any]:
    """NamedShardings of staged params: the stage axis over mesh axis `axis`, all else as `rules` say.

    `params`: the model's own params (not yet split), where leaves are quantized or adapted. Raises ConfigError where
    the mesh has another number of stages, and what `rules.shardings` raises.
    """
    stages.check(step.config.num_layers, mesh, axis)
    plain = plain_shardings(step, mesh, rules, params)
    if used := [path for path, spec in _specs(plain) if path.startswith("layers_") and axis in _axes(spec)]:
        raise ConfigError(f"{used[0]}: the rules split it over {axis!r}, which the layers' own stages take")
    placed = {}
    for slot in range(stages.slots):
        layer = next(i for s in range(stages.num) if (i := stages.layer(s, slot)) is not None)
        placed[f"slot_{slot}"] = jax.tree.map(
            lambda one: NamedSharding(mesh, PartitionSpec(axis, *one.spec)), plain[f"layers_{layer}"]
        )
    return {**_rest(plain), "stages": placed}


def run_slot(
    stages: Stages,
    stage: jax.Array,
    slot: int,
    run: Callable[..., Any],
    absent: Callable[..., Any],
    kind: Callable[[int], Hashable],
    *operands: Any,
) -> Any:
    """`run(layer, *operands)` of the layer that is in `slot` of this device's `stage i32[]`; `absent` where none is.

    Layers of one `kind` share a branch, so a model whose layers are alike compiles one and has no branch at all.
    """
    branches: dict[Hashable, Callable[..., Any]] = {}
    which = []
    for s in range(stages.num):
        layer = stages.layer(s, slot)
        key = None if layer is None else (kind(layer),)
        branches.setdefault(key, absent if layer is None else _bind(run, layer))
        which.append(list(branches).index(key))
    if len(branches) == 1:
        return next(iter(branches.values()))(*operands)
    return jax.lax.switch(jnp.asarray(which, jnp.int32)[stage], list(branches.values()), *operands)


def enter(step: Any, rest: Mapping[str, Any], ids: jax.Array, positions: jax.Array) -> jax.Array:
    """The first stage's input f[B, T, D]: embeddings of `ids i32[B, T]`, with positions where the family adds them."""
    model = Decoder(step.config)
    found: Any = model.apply({"params": rest}, step.embed(rest, ids), positions, method=Decoder._add_positions)
    return found


def leave(step: Any, rest: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """The last stage's output `x[B, T, D]` after the final norm."""
    size = step.config.hidden_size
    found: Any = Decoder(step.config).apply({"params": rest}, "final_norm", x, size, method=Decoder.norm)
    return found


def _bind(run: Callable[..., Any], layer: int) -> Callable[..., Any]:
    return lambda *operands: run(layer, *operands)


def _rest(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tree for name, tree in params.items() if not _LAYER.fullmatch(name)}


def _check_same(i: int, one: Any, j: int, other: Any) -> None:
    told = f"layers {i} and {j} share a slot of the stages but differ"
    if jax.tree.structure(one) != jax.tree.structure(other):
        raise ConfigError(f"{told} in their weights' names or formats; cut the stages so that like meets like")
    pairs = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True)
    for (path, a), b in pairs:
        if a.shape != b.shape or a.dtype != b.dtype:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ConfigError(f"{told}: {name} is {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}")


def _specs(placed: Any) -> list[tuple[str, PartitionSpec]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(placed)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), one.spec) for path, one in flat]


def _axes(spec: PartitionSpec) -> set[str]:
    names: set[str] = set()
    for part in spec:
        names |= set() if part is None else {part} if isinstance(part, str) else set(part)
    return names
