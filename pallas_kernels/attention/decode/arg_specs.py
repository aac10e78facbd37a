"""Calls of decode as models in use make them: shapes for the tests that lower and compile, and for benchmarks.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.decode.codes import quantize


@dataclasses.dataclass(frozen=True)
class Spec:
    """Sizes of a call; `bits` of a quantized cache, whose keys have a scale a channel and 64 tokens, values a token."""

    batch: int
    heads: int
    groups: int
    queries: int
    capacity: int
    dim: int
    dtype: str = "bfloat16"
    bits: int | None = None
    transposed: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def arguments(self) -> tuple[Any, ...]:
        """`q, k, v, lengths` as ShapeDtypeStructs."""
        tokens, dim = (self.capacity, self.dim)
        keys = (self.batch, self.groups, *((dim, tokens) if self.transposed else (tokens, dim)))
        shapes = [jax.ShapeDtypeStruct(s, jnp.dtype(self.dtype)) for s in (keys, (*keys[:2], tokens, dim))]
        if self.bits is not None:
            kinds = {"tokens": 64, "channels": 1, "transposed": self.transposed}, {"tokens": 1}
            shapes = [
                jax.eval_shape(functools.partial(quantize, bits=self.bits, **kind), shape)
                for shape, kind in zip(shapes, kinds, strict=True)
            ]
        q = jax.ShapeDtypeStruct((self.batch, self.heads, self.queries, dim), jnp.dtype(self.dtype))
        return q, *shapes, jax.ShapeDtypeStruct((self.batch,), jnp.int32)


SPECS = {
    "8b 32k": Spec(8, 32, 8, 1, 32768, 128),
    "8b 32k int8": Spec(8, 32, 8, 1, 32768, 128, bits=8),
    "8b 32k int4": Spec(8, 32, 8, 1, 32768, 128, bits=4),
    "8b 32k int8 transposed": Spec(8, 32, 8, 1, 32768, 128, bits=8, transposed=True),
    "8b 32k transposed": Spec(8, 32, 8, 1, 32768, 128, transposed=True),
    "drafts 8k": Spec(32, 32, 8, 8, 8192, 128),
    "multi-head 512k": Spec(1, 32, 32, 1, 524288, 128),
    "window and soft-cap": Spec(8, 16, 8, 4, 8192, 64, options=(("window", 1024), ("softcap", 50.0))),
    "8b 32k invariant": Spec(8, 32, 8, 1, 32768, 128, options=(("invariant", True),)),
    "float32": Spec(8, 32, 8, 1, 8192, 128, dtype="float32"),
}
