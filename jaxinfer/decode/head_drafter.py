"""What drafters with a trained head share: whose head it is, and the target's last hidden state beside each row.

Stability: internal.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxinfer.decode.draft_tree import most_nodes
from jaxinfer.decode.drafter import DrafterBase, accept_counts
from jaxinfer.decode.types import Sequence
from jaxinfer.errors import ConfigError


class HeadDrafter(DrafterBase):
    """A drafter with the fields `head` and `target`, the Step whose output matrix and embedding the head uses."""

    head: Any
    target: Any
    kind: ClassVar[str]

    @property
    def taps(self) -> tuple[int, ...]:
        """Inner layers that the head reads."""
        return () if self.head is None else self.head.taps

    @property
    def vocab_size(self) -> int:
        """The vocabulary that the head was trained for."""
        return self.head.target.vocab_size

    def bind(self, params: Any, target_params: Any) -> Any:
        """What the drafter takes as `draft_params`: the head's own, and what of the target it reads in `observe`."""
        return params

    def check_head(self, params: Any) -> None:
        """ConfigError without a head of the right kind, its params, or its target."""
        name = type(self).__name__
        if getattr(self.head, "kind", None) != self.kind or params is None:
            got = "none" if self.head is None or params is None else f"one of kind {self.head.kind}"
            raise ConfigError(
                f"{name} needs a head of kind {self.kind}, got {got}; accepted: head=, target= and draft_params=, or "
                "--draft-model with the head's folder"
            )
        if self.target is None:
            raise ConfigError(f"{name} needs `target`, the Step of the model that the head was trained on")

    def empty_hidden(self, params: Any, seq: Sequence) -> jax.Array:
        """No hidden state yet, [B, D]."""
        dtype = jax.tree.leaves(params)[0].dtype
        return jnp.zeros((seq.length.shape[0], self.head.target.hidden_size), dtype)


class GrowingHead(HeadDrafter):
    """A head that is run token by token: fields `depth`, its longest draft; `branches`, nodes a level, 1 for a chain;
    `nodes`, drafts of a tree that are kept (of a chain: all)."""

    depth: int
    branches: int
    nodes: int

    def __post_init__(self):
        accept_counts(self, "depth", "branches", "nodes")

    @property
    def width(self) -> int:
        """N."""
        return self.depth if self.branches == 1 else min(self.nodes, most_nodes(self.branches, self.depth))


def last_of_chunk(old: jax.Array, chunk: Any, hidden: jax.Array) -> jax.Array:
    """The hidden state [B, D] of each row's last committed token, from `hidden [B, C, D]` of a prompt's chunk."""
    last = jnp.take_along_axis(hidden, jnp.maximum(chunk.n - 1, 0)[:, None, None], 1)[:, 0]
    return jnp.where((chunk.n > 0)[:, None], last.astype(old.dtype), old)


def last_of_step(old: jax.Array, verdict: Any, n: jax.Array, hidden: jax.Array) -> jax.Array:
    """The hidden state [B, D] after which the row's new root came, from `hidden [B, R, D]` of a scored step."""
    at = jnp.take_along_axis(verdict.path, jnp.maximum(n - 1, 0)[:, None], 1)
    last = jnp.take_along_axis(hidden, jnp.maximum(at, 0)[..., None], 1)[:, 0]
    return jnp.where((n > 0)[:, None], last.astype(old.dtype), old)
