"""GAD's non-autoregressive drafter as a small model with a cache: a block of PADs after the text, filled in one pass.

Xia et al. 2022 (arXiv:2203.16487), Ge et al. 2022 (arXiv:2205.10350). The drafter reads what it has not read of a row,
at most a block and the token after it, and `block - 1` PADs behind: the last token predicts the first draft, PAD j
draft j + 1, each without knowing the drafts before it. The verifier is `TopBeta`. Guarantee: approximate; with `beta` 1
or `tau` 0 the output is plain greedy's. State: the drafter's cache of every token that it was fed, and of no PAD.

Any small model of the target's vocabulary that was trained to fill PADs will do: `jaxinfer.train.lud` with `theta` 0,
where every token is one of its unit's (`jaxinfer train lud --target tinycode-draft --theta 0 --k 5`). Paper: blocks of
25, published code 5, a drafter of the target's depth trained on the target's outputs. Departures: a decoder instead of
an encoder and a non-causal decoder, so that the text is read once (published batch code has no cache); PADs see those
before them.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxinfer import cache as kv
from jaxinfer.decode.draw import first_max
from jaxinfer.decode.gad import BlockDrafter
from jaxinfer.decode.prefill import commit_chunk, notes_of
from jaxinfer.decode.types import Proposal, Sequence, Step
from jaxinfer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class BlockDraft(BlockDrafter):
    """`step` with its weights as `draft_params` fills `block` places at once; `beta` and `tau` are the verifier's,
    `pad` the token id that stands for one to be filled, as in training."""

    step: Step
    block: int = 5
    beta: int = 3
    tau: float = 1.0
    pad: int = 1

    def __post_init__(self):
        super().__post_init__()
        if type(self.pad) is not int or self.pad < 0:
            raise ConfigError(f"pad: got {self.pad!r}, accepts a token id")

    @property
    def vocab_size(self) -> int:
        """The drafter's vocabulary, which must be the target's."""
        return self.step.vocab_size

    def init(self, params: Any, target_params: Any, seq: Sequence, cache: kv.Cache) -> kv.Cache:
        """An empty cache of the row's capacity."""
        if params is None:
            raise ConfigError(f"{type(self).__name__} needs its weights: pass draft_params")
        if self.pad >= self.step.vocab_size:
            raise ConfigError(f"pad: got {self.pad}, accepts a token id below {self.step.vocab_size}")
        return self.step.new_cache(*seq.tokens.shape)

    def prefill(self, params: Any, state: kv.Cache, chunk: Any, output: Any) -> kv.Cache:
        """Commits the chunk."""
        return commit_chunk(self.step, params, state, chunk.tokens, chunk.positions)[0]

    def propose(
        self, params, state: kv.Cache, seq: Sequence, cache, key, *, target_params, warp
    ) -> tuple[Proposal, kv.Cache]:
        """The likeliest token at each place of the block, in one forward; what was read of the row is committed."""
        new = self.block + 1  # what a step of the target emits at most
        at = state.t[:, None] + jnp.arange(new, dtype=jnp.int32)
        live = (at < seq.length[:, None]) & ~seq.done[:, None]
        text = jnp.take_along_axis(seq.tokens, at, 1, mode="clip")
        ahead = seq.length[:, None] + jnp.arange(self.block - 1, dtype=jnp.int32)
        tokens = jnp.concatenate([text, jnp.full_like(ahead, self.pad)], 1)
        positions = jnp.concatenate([jnp.where(live, at, -1), jnp.where(seq.done[:, None], -1, ahead)], 1)
        output, blocks = self.step(params, tokens, positions, state, kv.new_blocks(state, tokens.shape[1]))
        n = live.sum(1, dtype=jnp.int32)
        root = jnp.maximum(n - 1, 0)[:, None]
        slots = jnp.concatenate([root, new + jnp.broadcast_to(jnp.arange(self.block - 1), ahead.shape)], 1)
        hidden = jnp.take_along_axis(output.hidden, slots[..., None], 1)
        drafts = first_max(self.step.head(params, hidden))[1]
        # That the count depends on the output keeps every read of the cache before its write.
        finite = jnp.isfinite(hidden[:, 0].astype(jnp.float32).sum(-1))
        path = jnp.broadcast_to(jnp.arange(new, dtype=jnp.int32), at.shape)
        state = kv.commit(state, blocks, path, jnp.where(finite, n, 0), notes_of(output))
        return Proposal.of_chain(drafts, jnp.ones(drafts.shape, bool)), state
