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
from jaxinfer.models.heads import Head

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


def need(
    step: Step, params: Any, *, batch: int, max_length: int, slots: int = 1, chunk: int = 256, prefill_rows: int = 1
) -> Need:
    """What a batch job takes: `slots` scored positions a step (drafts + 1), `prefill_rows` prompts at a time.

    `work` is the larger of a decoding and a prefill step, each operation's input and output counted; XLA's own figures
    (`memory_analysis`) lie below it.
    """
    c = step.config
    width = 6 * c.hidden_size + 3 * max(c.mlp_size, c.experts_per_token * c.expert_size) + 3 * c.num_heads * c.head_dim
    chunk = min(chunk, max_length)
    scores = c.num_heads * (max_length + chunk)  # one layer's attention weights of one query, over cache and block
    logits = 4 * batch * slots * c.vocab_size  # raw, warped, sorted, their law
    decoding = 2 * batch * slots * (width + scores) + logits
    prefill = 2 * prefill_rows * chunk * (width + scores)
    cache, rows = (nbytes(jax.eval_shape(lambda n=n: step.new_cache(n, max_length))) for n in (batch, prefill_rows))
    return Need(nbytes(params), cache, max(4 * decoding, 4 * prefill + rows))


def draft_need(draft: Step | Head, **lengths: int) -> Need:
    """What a draft model takes beside its target; of a head, its weights alone (its cache is one layer's)."""
    if isinstance(draft, Head):
        return Need(nbytes(draft.abstract()), 0, 0)
    return need(draft, abstract_params(draft), **lengths)


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
