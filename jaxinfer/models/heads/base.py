"""What every draft head is: a frozen value that knows its shapes; its arrays are a nested dict beside the target's.

A new head is a file here with a subclass of `Head`, its row in `HEADS`, an objective in `jaxinfer.train.heads` and a
drafter in `jaxinfer.decode` that has a field `head`.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models.config import ModelConfig

# Kind to the class, imported when it is asked for. The drafter of a kind has the kind's name in --drafter.
HEADS: Mapping[str, str] = {
    "medusa": "jaxinfer.models.heads.medusa:MedusaHead",
    "ppd": "jaxinfer.models.heads.ppd:PPDHead",
    "eagle": "jaxinfer.models.heads.eagle:EagleHead",
    "chimera": "jaxinfer.models.heads.chimera:ChimeraHead",
}


@dataclasses.dataclass(frozen=True)
class TargetShape:
    """What a head must fit: the target's `hidden_size` and `vocab_size`."""

    hidden_size: int
    vocab_size: int

    @classmethod
    def of(cls, config: Any) -> TargetShape:
        """The shape of a model with this configuration (`jaxinfer.models.ModelConfig`)."""
        return cls(config.hidden_size, config.vocab_size)


@dataclasses.dataclass(frozen=True)
class Head:
    """A head for targets of shape `target`. A subclass adds its settings, all scalars or tuples of them."""

    target: TargetShape
    kind: ClassVar[str] = ""

    @property
    def taps(self) -> tuple[int, ...]:
        """Inner layers of the target whose residual stream the head reads: none."""
        return ()

    def init(self, key: jax.Array, output: jax.Array | None = None) -> Any:
        """Params before training, a nested dict of float32. `output f[D, V]`: the target's output matrix, for a head
        that begins from it (None: zeros)."""
        raise NotImplementedError(type(self).__name__)

    def abstract(self) -> Any:
        """Shapes of the params: the tree of `init` with `jax.ShapeDtypeStruct` leaves."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def output_or_zeros(self, output: jax.Array | None) -> jax.Array:
        """`output` as float32 [D, V], checked; zeros where there is none."""
        shape = (self.target.hidden_size, self.target.vocab_size)
        if output is None:
            return jnp.zeros(shape, jnp.float32)
        if output.shape != shape:
            raise InputError(f"output: got shape {tuple(output.shape)}, accepts {shape}")
        return output.astype(jnp.float32)

    def settings(self) -> dict[str, Any]:
        """The fields of the kind itself, as JSON holds them."""
        own = [field.name for field in dataclasses.fields(self) if field.name != "target"]
        values = {name: getattr(self, name) for name in own}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def head_class(kind: str) -> type[Head]:
    """The class of a kind; ConfigError lists the kinds there are."""
    if kind not in HEADS:
        raise ConfigError(f"kind of head: got {kind!r}; accepted: {', '.join(HEADS)}")
    module, _, name = HEADS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """ConfigError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}: got {value!r}, accepts an integer of {least} or more")


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A random matrix of variance 1 / fan-in, f32."""
    return jax.random.normal(key, shape) * shape[-2] ** -0.5


def rescaled(params: Any) -> Any:
    """Fresh params of a layer with matrices of variance 1 / fan-in, zero where they write to the residual stream."""

    def rescale(path, leaf):
        if path[-1].key in ("o", "down"):
            return jnp.zeros_like(leaf)
        return leaf if leaf.ndim < 2 else leaf * (leaf.shape[-2] ** -0.5 / jnp.std(leaf))

    return jax.tree_util.tree_map_with_path(rescale, params)


def layer_config(target: TargetShape, num_heads: int, num_kv_heads: int, mlp_size: int) -> ModelConfig:
    """One decoder layer as wide as the target, with rotary positions; ConfigError where the heads do not divide it."""
    check_count("num_heads", num_heads)
    check_count("num_kv_heads", num_kv_heads)
    if target.hidden_size % num_heads or num_heads % num_kv_heads or (target.hidden_size // num_heads) % 2:
        raise ConfigError(
            f"num_heads: got {num_heads} with {num_kv_heads} key heads; accepts a divisor of the hidden size "
            f"{target.hidden_size} that leaves an even size a head, and key heads that divide it"
        )
    return ModelConfig(
        vocab_size=target.vocab_size, hidden_size=target.hidden_size, num_layers=1, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=target.hidden_size // num_heads, mlp_size=mlp_size, max_length=2**20,
    )  # fmt: skip
