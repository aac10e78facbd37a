"""Verifiers: which drafts stay, and the token after them.

Greedy keeps the drafts that the target would have chosen itself: its output equals plain greedy decoding, token for
token. Chain is speculative rejection sampling: the output follows the target's law exactly, whatever the drafter.
Leviathan et al. 2022 (arXiv:2211.17192), Chen et al. 2023 (arXiv:2302.01318). A draft of law q is kept where
`u * q < p`, strictly and without a division, so that neither q = 0 nor u = p = 0 lets an impossible token through.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxinfer.decode import keys as key_streams
from jaxinfer.decode.draw import draw, first_max
from jaxinfer.decode.keys import Stream
from jaxinfer.decode.types import Proposal, Verdict
from jaxinfer.decode.walk import walk
from jaxinfer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Walks from the root while a draft equals the argmax; chains and trees. Guarantee: equal to plain greedy."""

    reads: str = "scores"

    def verify(self, law: jax.Array, proposal: Proposal, key: jax.Array) -> Verdict:
        """`law f32[B, R, V]`: scores. No randomness is read from `key[B]`."""
        peak, best = first_max(law)
        if proposal.tokens.shape[1] == 0:
            zeros = jnp.zeros_like(best[:, 0])
            return Verdict(zeros[:, None], zeros, best[:, 0], jnp.isfinite(peak[:, 0]))
        if proposal.chain:
            n = _leading(proposal.valid & (proposal.tokens == best[:, :-1]))
            path, end = _chain_path(n, proposal.depth), n
        else:
            path, n, end = walk(best, proposal)
        at = end[:, None]
        finite = jnp.isfinite(jnp.take_along_axis(peak, at, 1)[:, 0])
        return Verdict(path, n, jnp.take_along_axis(best, at, 1)[:, 0], finite)


@dataclasses.dataclass(frozen=True)
class Chain:
    """Speculative rejection sampling along a chain. Guarantee: the target's law, exactly.

    With `q_logp` None a draft counts as certain (one-hot q), which is exact for any draft that was chosen without
    this step's ACCEPT, RESIDUAL and BONUS keys. Where all drafts stay and the proposal guesses `ahead`, the guess is
    tested in the place of a bonus, as one draft more.
    """

    reads: str = "logprobs"

    def verify(self, law: jax.Array, proposal: Proposal, key: jax.Array) -> Verdict:
        """`law f32[B, R, V]`: the warped log-law of each slot's next token; `key[B]`: the step's keys."""
        n_drafts = proposal.tokens.shape[1]
        if n_drafts and not proposal.chain:
            raise ConfigError("the chain verifier was given a tree; it accepts chains")
        n = jnp.zeros(law.shape[0], jnp.int32)
        if n_drafts:
            chosen = proposal.tokens[..., None]
            p = jnp.exp(jnp.take_along_axis(law[:, :-1], chosen, 2)[..., 0])
            q = 1.0 if proposal.q_logp is None else jnp.exp(jnp.take_along_axis(proposal.q_logp, chosen, 2)[..., 0])
            u = key_streams.uniforms(key_streams.slots(key_streams.stream(key, Stream.ACCEPT), n_drafts))
            n = _leading(proposal.valid & (u * q < p))
        p_next = jnp.exp(jnp.take_along_axis(law, n[:, None, None], 1)[:, 0])
        finite = jnp.isfinite(p_next).all(-1)
        weights, which, kept, ahead = p_next, jnp.int32(Stream.BONUS), None, proposal.ahead
        if n_drafts or ahead is not None:
            tested, q = jnp.zeros(n.shape, bool), jnp.zeros_like(p_next)
            if n_drafts:
                tested, q = n < proposal.valid.sum(1), _q_at(proposal, n, law.shape[-1])
            if ahead is not None:
                tested, kept, q = self._ahead(proposal, ahead, key, p_next, tested, q)
            residual = jnp.maximum(p_next - q, 0.0)
            weights = jnp.where((tested & (residual.sum(-1) > 0))[:, None], residual, p_next)
            which = jnp.where(tested, jnp.int32(Stream.RESIDUAL), which)
        next_token = draw(weights, key_streams.slot(key_streams.stream(key, which), n))
        if ahead is not None and kept is not None:
            next_token = jnp.where(kept, ahead, next_token)
        return Verdict(_chain_path(n, n_drafts), n, next_token, finite)

    def _ahead(
        self, proposal: Proposal, guess: jax.Array, key, p, rejected, q
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Which rows had a draft tested after the last one kept, where the guess ahead stays, and the tested law."""
        ahead, n_drafts = jnp.maximum(guess, 0)[:, None], proposal.tokens.shape[1]
        if proposal.ahead_logp is None:
            q_ahead = (jnp.arange(p.shape[-1])[None] == ahead).astype(jnp.float32)
        else:
            q_ahead = jnp.exp(proposal.ahead_logp)
        reached = ~rejected & (guess >= 0)
        u = self._uniform_ahead(key, n_drafts)
        ratio = u * jnp.take_along_axis(q_ahead, ahead, 1)[:, 0]
        kept = reached & (ratio < jnp.take_along_axis(p, ahead, 1)[:, 0])
        return rejected | reached, kept, jnp.where(reached[:, None], q_ahead, q)

    def _uniform_ahead(self, key: jax.Array, n_drafts: int) -> jax.Array:
        return key_streams.uniforms(key_streams.slot(key_streams.stream(key, Stream.ACCEPT), n_drafts))


def _q_at(proposal: Proposal, n: jax.Array, vocab: int) -> jax.Array:
    """The law f32[B, V] that draft `n i32[B]` came from (clamped to the last)."""
    at = jnp.minimum(n, proposal.tokens.shape[1] - 1)[:, None]
    if proposal.q_logp is None:
        return (jnp.arange(vocab)[None] == jnp.take_along_axis(proposal.tokens, at, 1)).astype(jnp.float32)
    return jnp.exp(jnp.take_along_axis(proposal.q_logp, at[..., None], 1)[:, 0])


def _leading(hits: jax.Array) -> jax.Array:
    """How many leading entries of `bool[B, N]` hold: i32[B]."""
    return jnp.cumprod(hits.astype(jnp.int32), 1).sum(1)


def _chain_path(n: jax.Array, depth: int) -> jax.Array:
    index = jnp.arange(depth + 1, dtype=jnp.int32)[None]
    return jnp.where(index <= n[:, None], index, -1)
