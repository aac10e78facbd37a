"""Input-guided aggressive decoding: where the output follows a source text, drafts the source from there on.

Sun et al. 2021 (arXiv:2106.04970), Ge et al. 2022 (arXiv:2205.10350). For answers that edit a text. It drafts until
the target disagrees; then plain steps until the last output token occurs exactly once in the source (of several
places: until the last two, then three, do), and drafts on after that place. Guarantee: greedy output equal to plain
greedy; sampled output of the target's law (drafts count as certain). State: the source and a pointer into it.

The source comes as `draft_params` (`Source`, a row each; end it with an end token to have that drafted too) and is
drafted from its first token on. Without one, or where it is empty, it is the row's own prompt: then drafting begins at
the first match.

Departures: a step drafts up to `drafts` tokens, where the paper feeds the whole rest of the source to one pass; only
the row's own output is matched, never its prompt. The paper's speed-ups are over beam search with 5 beams: over greedy
decoding they are smaller.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxinfer.decode import types
from jaxinfer.decode.drafter import ChainDrafter, accept_counts
from jaxinfer.decode.types import Proposal
from jaxinfer.errors import ConfigError


@struct.dataclass
class Source:
    """What each row edits: `tokens i32[B, S]`, right-padded, `length i32[B]` (0: the row's prompt)."""

    tokens: jax.Array
    length: jax.Array

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]], size: int) -> Source:
        """Token ids of each row, none longer than `size`, which is S (host)."""
        rows = list(rows)
        tokens = np.zeros((len(rows), size), np.int32)
        for at, row in zip(tokens, rows, strict=True):
            at[: len(row)] = row
        return cls(jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32))


@struct.dataclass
class Following:
    """`next i32[B]`: the source's index that the output's next token is drafted from; -1 while none is known."""

    source: Source
    next: jax.Array


@dataclasses.dataclass(frozen=True)
class Aggressive(ChainDrafter):
    """`drafts`: the most tokens that a step drafts; `suffix`: the most output tokens that a match compares."""

    drafts: int = 16
    suffix: int = 3

    def __post_init__(self):
        accept_counts(self, "drafts", "suffix")

    @property
    def width(self) -> int:
        """N."""
        return self.drafts

    @property
    def takes_source(self) -> bool:
        """A `Source` may come as `draft_params`."""
        return True

    def init(self, params, target_params, seq: types.Sequence, cache) -> Following:
        """A given source is followed from its start; the prompt from the first match."""
        prompt = Source(seq.tokens, seq.prompt_length)
        if params is None:
            return Following(prompt, jnp.full_like(seq.length, -1))
        if not isinstance(params, Source):
            raise ConfigError(f"draft_params: got {type(params).__name__}, accepts None or an aggressive.Source")
        batch = seq.length.shape[0]
        if params.tokens.shape[0] != batch or params.length.shape != (batch,):
            raise ConfigError(f"draft_params: got a Source of {params.tokens.shape[0]} rows, accepts {batch}")
        given = params.length > 0
        size = max(params.tokens.shape[1], seq.tokens.shape[1])
        own, other = (jnp.pad(x, ((0, 0), (0, size - x.shape[1]))) for x in (params.tokens, prompt.tokens))
        source = Source(jnp.where(given[:, None], own, other), jnp.where(given, params.length, prompt.length))
        return Following(source, jnp.where(given, 0, -1))

    def idle(self, params, state: Following, seq):
        """Rows whose place in the source is not known."""
        return state.next < 0

    def propose(self, params, state: Following, seq, cache, key, *, target_params, warp):
        """The source from the pointer on; nothing where the output has left it."""
        at = state.next[:, None] + jnp.arange(self.drafts, dtype=jnp.int32)
        tokens = jnp.take_along_axis(state.source.tokens, at, 1, mode="clip")
        valid = (state.next >= 0)[:, None] & (at < state.source.length[:, None])
        return Proposal.of_chain(tokens, valid), state

    def observe(self, params, state: Following, seq, proposal, scored, verdict, n, cache) -> Following:
        """Move on past what was emitted where that is still the source; else look for where the output is in it."""
        source = state.source
        last = state.next + n - 1  # the source's index under the last emitted token, where all of them came from it
        same = jnp.take_along_axis(source.tokens, last[:, None], 1, mode="clip")[:, 0] == seq.root
        whole = (state.next >= 0) & (n == verdict.n_accepted + 1) & (last < source.length) & same
        found = jnp.where(whole, last + 1, unique_match(source, seq, self.suffix))
        return dataclasses.replace(state, next=jnp.where(n > 0, found, state.next))


def unique_match(source: Source, seq: types.Sequence, longest: int) -> jax.Array:
    """The source's index i32[B] after the one place where the output's last tokens occur in it, or -1.

    One token is compared; where it has several places two are, and so on, up to `longest` or the whole output.
    """
    size = source.tokens.shape[1]
    index = jnp.arange(size, dtype=jnp.int32)[None]
    output = seq.length - seq.prompt_length
    hit = index < source.length[:, None]  # the places where the compared tokens end
    after = jnp.full_like(seq.length, -1)
    for count in range(1, longest + 1):
        wanted = seq.token_at(jnp.maximum(seq.length - count, 0))[:, None]
        behind = jnp.pad(source.tokens, ((0, 0), (count - 1, 0)), constant_values=-1)[:, :size]
        hit &= (behind == wanted) & (output >= count)[:, None]
        unique = (hit.sum(1) == 1) & (after < 0)
        after = jnp.where(unique, jnp.where(hit, index, 0).max(1) + 1, after)
    return after
