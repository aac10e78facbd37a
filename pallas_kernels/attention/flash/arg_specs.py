"""Shapes that attention runs at in models: shared by the lowering tests, the compile tests and the benchmark.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Spec:
    """Arguments of one call: `B, H, G, T, S, d`, the dtype, and the options that are not arrays.

    `ragged`, `alibi`: pass lengths and slopes as well.
    """

    name: str
    sizes: tuple[int, int, int, int, int, int]
    dtype: str = "bfloat16"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ragged: bool = False
    alibi: bool = False

    def qkv(self) -> list[jax.ShapeDtypeStruct]:
        b, h, g, t, s, d = self.sizes
        return [
            jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype)) for shape in ((b, h, t, d), (b, g, s, d), (b, g, s, d))
        ]

    def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The options that are arrays."""
        lengths = jax.ShapeDtypeStruct((self.sizes[0],), jnp.int32)
        slopes = jax.ShapeDtypeStruct((self.sizes[1],), jnp.float32)
        return (dict(q_lengths=lengths, kv_lengths=lengths) if self.ragged else {}) | (
            dict(slopes=slopes) if self.alibi else {}
        )


SPECS = (
    Spec("llama3 8B prefill", (1, 32, 8, 4096, 4096, 128), options={"causal": True}),
    Spec("llama 1B training", (4, 32, 8, 2048, 2048, 64), options={"causal": True}),
    Spec("gemma 2 local", (1, 8, 4, 8192, 8192, 256), options={"causal": True, "window": 4096, "softcap": 50.0}),
    Spec("ragged batch with alibi", (8, 16, 16, 1024, 1024, 128), options={"causal": True}, ragged=True, alibi=True),
    Spec("a chunk against its past", (1, 16, 8, 512, 8192, 128), options={"causal": True}, ragged=True),
)
