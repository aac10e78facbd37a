"""What a model needs in memory at a batch size and a length, from shapes alone: nothing is loaded or allocated.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from jaxinfer import quant
from jaxinfer.cli.output import size
from jaxinfer.errors import InputError
from jaxinfer.models import Step

# The largest batch that `auto` picks: beyond it a step takes as much longer as it does more (CPU: cores are full).
MOST_CPU, MOST_DEVICE = 32, 256
# What is left for the allocator, compiled programs and everything else on the machine.
SHARE = 0.85


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes: `weights`, the `cache` of all rows, and `work`: activations and logits of one step."""

    weights: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.work

    def __str__(self) -> str:
        parts = f"weights {size(self.weights)} + cache {size(self.cache)} + work {size(self.work)}"
        return f"{parts} = {size(self.total)}"

    def __add__(self, other: Need) -> Need:
        return Need(self.weights + other.weights, self.cache + other.cache, self.work + other.work)


def abstract_params(step: Step, rules: Sequence[tuple[str, Any]] = ()) -> dict[str, Any]:
    """The params' shapes in the Step's dtype, with the weights that `rules` name in their formats."""
    plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, step.dtype), nn.unbox(step.abstract()))
    return jax.eval_shape(lambda params: quant.apply(params, rules), plain) if rules else plain


def count(params: Any) -> int:
    """Parameters of a tree of weights or their shapes."""
    return sum(math.prod(leaf.shape) for _, leaf in quant.leaves(params))


def nbytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def need(step: Step, params: Any, *, batch: int, max_length: int, slots: int = 1, chunk: int = 256) -> Need:
    """What decoding takes: `slots` scored positions a step (drafts + 1) and prompts prefilled by `chunk` tokens."""
    c = step.config
    width = 6 * c.hidden_size + 3 * max(c.mlp_size, c.experts_per_token * c.expert_size) + 3 * c.num_heads * c.head_dim
    scores = c.num_heads * max_length  # one layer's attention weights of one query
    tokens = batch * max(slots, min(chunk, max_length))
    logits = 4 * batch * slots * c.vocab_size  # raw, warped, sorted, their law
    cache = nbytes(jax.eval_shape(lambda: step.new_cache(batch, max_length)))
    return Need(nbytes(params), cache, 4 * (tokens * (width + scores) + logits))


def most_slots() -> int:
    """The largest batch that `auto` picks here."""
    return MOST_CPU if jax.default_backend() == "cpu" else MOST_DEVICE


def largest(most: int, need_of: Callable[[int], Need], available: int, where: str) -> int:
    """The largest power of two up to `most` whose need fits; InputError where not even one row does."""
    slots = 1 << (most.bit_length() - 1)
    while slots > 1 and need_of(slots).total > SHARE * available:
        slots //= 2
    if need_of(slots).total > SHARE * available:
        raise InputError(
            f"--batch-size auto: one row takes {need_of(slots)}, and {size(SHARE * available)} can be used on {where}; "
            "accepted: --weights int8, a smaller --max-length, another --cache, or a --batch-size of your own"
        )
    return slots
