"""Medusa's heads: head k guesses the token k + 1 after the next one, each from the target's last hidden state alone.

Cai et al. 2024 (arXiv:2401.10774): one residual block `h + silu(h W + b)` a head, W zero at first, so that every head
begins as the target's own output. Paper: 5 heads of one block (published code: 3 to 5), each with its own output matrix
that begins as the target's (`own_output`); 0.8**k weighs head k's loss.

Departure: by default every head writes through the target's output matrix, which leaves D * D numbers a head where the
paper's take D * D + D * V: 0.07 M against 1.1 M for 4,096 tokens and D = 256.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxinfer.models.heads.base import Head, check_count


@dataclasses.dataclass(frozen=True)
class MedusaHead(Head):
    """`heads`: tokens guessed after the next one; `blocks`: residual blocks a head; `own_output`: see above."""

    heads: int = 4
    blocks: int = 1
    own_output: bool = False
    kind: ClassVar[str] = "medusa"

    def __post_init__(self):
        check_count("heads", self.heads)
        check_count("blocks", self.blocks)

    def init(self, key: jax.Array, output: jax.Array | None = None) -> Any:
        """`head_k/block_i/w f32[D, D]` and `b f32[D]`, zero; `head_k/head f32[D, V]`, the target's `output`."""
        size = self.target.hidden_size
        params: dict[str, Any] = {}
        for k in range(self.heads):
            own: dict[str, Any] = {
                f"block_{i}": {"w": jnp.zeros((size, size)), "b": jnp.zeros(size)} for i in range(self.blocks)
            }
            if self.own_output:
                own["head"] = self.output_or_zeros(output)
            params[f"head_{k}"] = own
        return params

    def state(self, params: Any, k: int, hidden: jax.Array) -> jax.Array:
        """Head k's hidden state f[..., D] from the target's `hidden f[..., D]`."""
        x = hidden
        for i in range(self.blocks):
            block = params[f"head_{k}"][f"block_{i}"]
            y = x @ block["w"].astype(x.dtype)
            x = x + jax.nn.silu(y + block["b"].astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,)))
        return x

    def logits(self, params: Any, hidden: jax.Array, step: Any, target_params: Any) -> list[jax.Array]:
        """What each head expects, f32[..., V], from `hidden f[..., D]`; `step` has the target's `head`."""
        found = []
        for k in range(self.heads):
            state, own = self.state(params, k, hidden), params[f"head_{k}"]
            if self.own_output:
                found.append((state @ own["head"].astype(state.dtype)).astype(jnp.float32))
            else:
                found.append(step.head(target_params, state))
        return found
