"""Ternary weights: codes -1, 0 and 1, two bits stored, a scale per output channel or group.

The scale is the mean magnitude of a channel or group ("mean"), the one of least squares for the codes that the mean
gives ("fitted"), or the mean magnitude of the whole matrix ("matrix": BitNet b1.58's and TriLM's rule, which
`train/trilm.py` trains under). Guarantee: approximate; exact for weights that have three values a matrix already.
State: none.
Sources: Ma et al. 2024, The era of 1-bit LLMs, 2402.17764; Kaushal et al. 2024, Spectra, 2407.12327.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError
from jaxinfer.pallas_kernels.matmul.elements import ELEMENTS, nearest
from jaxinfer.pallas_kernels.matmul.weight import LowBit, make
from jaxinfer.quant.integers import nonzero
from jaxinfer.quant.quantized import FLOATS, RowSpec, check_group, groups_of

RULES = ("mean", "fitted", "matrix")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ternary(RowSpec):
    """`group`: inputs that share a scale, None for a whole channel; `rule`: "mean", "fitted" or "matrix" (no group)."""

    group: int | None = None
    rule: str = "mean"
    scales: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        check_group("Ternary", self.group)
        if self.rule not in RULES:
            raise ConfigError(f"Ternary: rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        if self.rule == "matrix" and self.group is not None:
            raise ConfigError(f'Ternary: group must be None where the rule is "matrix", got {self.group}')
        if self.scales not in FLOATS:
            raise ConfigError(f"Ternary: scales must be one of {', '.join(FLOATS)}, got {self.scales!r}")

    def encode(self, rows: jax.Array) -> LowBit:
        """`rows f32[..., N, K]` as -1, 0 and 1 times scales."""
        groups = groups_of("Ternary", rows.shape[-1], self.group, "int2")
        x = rows.reshape(*rows.shape[:-1], groups, -1)
        if self.rule == "matrix":
            scales = jnp.broadcast_to(matrix_scale(rows, self.scales)[..., None, None], x.shape[:-1])
        else:
            scales = nonzero(jnp.abs(x).mean(-1), self.scales)
        codes = ternary_codes(x, scales[..., None])
        if self.rule == "fitted":
            scales = nonzero((x * codes).sum(-1) / jnp.maximum(jnp.abs(codes).sum(-1), 1), self.scales)
        fields = nearest(codes, ELEMENTS["int2"]).reshape(rows.shape)
        return make(fields, scales.astype(self.scales), "int2")


def matrix_scale(matrix: jax.Array, dtype: str = "float32") -> jax.Array:
    """The mean magnitude f32[...] of each matrix [..., :, :], as `dtype` holds it; 1 for a matrix of zeros."""
    return nonzero(jnp.abs(matrix).mean((-2, -1)), dtype)


def ternary_codes(x: jax.Array, scales: jax.Array) -> jax.Array:
    """`x / scales` rounded to -1, 0 and 1."""
    return jnp.clip(jnp.round(x / scales), -1, 1)
