"""Ternary weights: codes -1, 0 and 1, two bits stored, a scale per output channel or group.

The scale is the mean magnitude ("mean": BitNet b1.58's and TriLM's rule, theirs a matrix at a time), or the one of
least squares for the codes that the mean gives ("fitted"). Guarantee: approximate; meant for models trained this way.
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

RULES = ("mean", "fitted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ternary(RowSpec):
    """`group`: inputs that share a scale, None for a whole channel; `rule`: "mean" or "fitted"."""

    group: int | None = None
    rule: str = "mean"
    scales: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        check_group("Ternary", self.group)
        if self.rule not in RULES:
            raise ConfigError(f"Ternary: rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        if self.scales not in FLOATS:
            raise ConfigError(f"Ternary: scales must be one of {', '.join(FLOATS)}, got {self.scales!r}")

    def encode(self, rows: jax.Array) -> LowBit:
        """`rows f32[..., N, K]` as -1, 0 and 1 times scales."""
        groups = groups_of("Ternary", rows.shape[-1], self.group, "int2")
        x = rows.reshape(*rows.shape[:-1], groups, -1)
        scales = nonzero(jnp.abs(x).mean(-1), self.scales)
        codes = jnp.clip(jnp.round(x / scales[..., None]), -1, 1)
        if self.rule == "fitted":
            scales = nonzero((x * codes).sum(-1) / jnp.maximum(jnp.abs(codes).sum(-1), 1), self.scales)
        fields = nearest(codes, ELEMENTS["int2"]).reshape(rows.shape)
        return make(fields, scales.astype(self.scales), "int2")
