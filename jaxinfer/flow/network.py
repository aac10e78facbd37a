"""A diffusion transformer as the `apply` of the flow slots: a frozen, hashable callable that is static under `jax.jit`.

Stability: internal.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import InputError
from jaxinfer.flow.types import Condition, Out
from jaxinfer.models.dit import Dit, DitConfig


@dataclasses.dataclass(frozen=True)
class Network:
    """`apply(params, x, t, s, cond, *, seg, features) -> Out`; seg and features are for blockwise models, not this one.

    taps: layers whose tokens [B,N,D] are wanted as `aux["taps"]`, a tuple.
    """

    config: DitConfig
    taps: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """[h, w, c] of a row of x."""
        return self.config.height, self.config.width, self.config.channels

    def init(self, key: jax.Array) -> Any:
        """Random params; the velocity is zero at first."""
        return jax.jit(lambda key: nn.unbox(Dit(self.config).init(key, *self.example(1))["params"]))(key)

    def example(self, batch: int) -> tuple[Any, ...]:
        """Zeros of the module's arguments."""
        c, zeros = self.config, jnp.zeros((batch,))
        labels = jnp.zeros((batch,), jnp.int32) if c.classes else None
        tokens = jnp.zeros((batch, 1, c.token_size)) if c.token_size else None
        keep = None if tokens is None else jnp.ones((batch,), bool)
        image = jnp.zeros((batch, c.height, c.width, c.image_channels)) if c.image_channels else None
        return jnp.zeros((batch, *self.shape)), zeros, zeros, labels, tokens, keep, image

    def __call__(self, params, x, t, s, cond: Condition | None, *, seg=None, features=None) -> Out:
        cond = Condition() if cond is None else cond
        given = (cond.labels, cond.tokens, cond.keep, cond.image)
        v, taps = Dit(self.config).apply({"params": params}, x, t, s, *given, taps=self.taps)
        return Out(v, {"taps": taps} if self.taps else {})

    def check(self, cond: Condition | None, rows: int) -> None:
        """Raises `InputError` for an unknown class, or a condition of another number of rows. Labels are looked at."""
        cond = Condition() if cond is None else cond
        for field in dataclasses.fields(cond):
            value = getattr(cond, field.name)
            if value is not None and value.shape[0] != rows:
                raise InputError(f"{field.name} has {value.shape[0]} rows, x has {rows}")
        if cond.labels is None or not self.config.classes:
            return
        labels = np.asarray(cond.labels)
        bad = labels[(labels < -1) | (labels >= self.config.classes)]
        if bad.size:
            known = f"0 to {self.config.classes - 1}, or -1 for none"
            raise InputError(f"class {int(bad[0])} is unknown: the model's are {known}")
