"""Decoding under grammars: each step in pieces, between which the host reads drafts and says which tokens may come.

The device proposes; the host reads the drafts, and where a grammar leaves a row only one way on, it writes that way
over them (jump-ahead: tokens that no forward is needed to know); the device scores them all, and while it does, the
host walks each row's matcher over its drafts and fills a mask for every slot; the device verifies under the masks and
commits. So a mask costs no time where the forward takes longer, and what a step emits is what it would emit one token
at a time.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.decode import loop
from jaxinfer.decode.compiler import Program
from jaxinfer.decode.config import Config
from jaxinfer.decode.grammar import Matcher
from jaxinfer.decode.types import Proposal, Step

# Draft counts to which plain decoding grows where tokens are forced, each a program of its own.
JUMPS = (2, 8)


def _settled(state, proposal, scored, blocks, masks, draft_params, *, config: Config):
    """The step's end, and what the host needs of it: the new tokens, how many, and which rows are done."""
    before = state.seq.length
    verdict = loop.verify(state, proposal, scored, config=config, masks=masks)
    state = loop.settle(state, proposal, scored, blocks, verdict, config=config, draft_params=draft_params)
    index = before[:, None] + jnp.arange(proposal.depth + 1, dtype=jnp.int32)[None]
    new = jnp.take_along_axis(state.seq.tokens, index, 1, mode="clip")
    return state, (new, state.seq.length - before, state.seq.done)


def _redrafted(proposal: Proposal, seq: Any, tokens: jax.Array, n: jax.Array) -> Proposal:
    """The proposal with the chain `tokens i32[B, J][:, :n]` in place of a row's drafts where `n i32[B]` is above 0."""
    size = proposal.tokens.shape[1]
    tokens = jnp.pad(tokens, ((0, 0), (0, max(0, size - tokens.shape[1]))))[:, :size]
    index, changed = jnp.arange(size, dtype=jnp.int32)[None], n[:, None] > 0
    q, probe, ahead = proposal.q_logp, proposal.probe, proposal.ahead
    if q is not None:  # the host's tokens are certain
        certain = jnp.where(jnp.arange(q.shape[-1]) == tokens[..., None], 0.0, -jnp.inf)
        q = jnp.where(changed[..., None], certain, q)
    changed_proposal = dataclasses.replace(
        proposal,
        tokens=jnp.where(changed, tokens, proposal.tokens),
        parent=jnp.where(changed, index, proposal.parent),
        valid=jnp.where(changed, index < n[:, None], proposal.valid),
        q_logp=q,
        probe=None if probe is None else probe & ~changed,
        ahead=None if ahead is None else jnp.where(changed[:, 0], -1, ahead),
    )
    return loop.within_limit(changed_proposal, seq)


# The state is given up to both programs that return it: what an undonated argument returns unchanged is copied.
_propose = Program(loop.propose, static_argnames=("config",), donate_argnames=("state",))
_score = Program(loop.score, static_argnames=("step", "config"))
_settle = Program(_settled, static_argnames=("config",), donate_argnames=("state",))
_redraft = Program(_redrafted)


@dataclasses.dataclass
class Spent:
    """What the masks cost the host: how many were filled, and seconds for them; and steps, with their seconds."""

    masks: int = 0
    mask_seconds: float = 0.0
    steps: int = 0
    seconds: float = 0.0


class Constrained:
    """Runs the steps of rows under `matchers`, one a row of the state (None: a row without a grammar)."""

    def __init__(
        self,
        step: Step,
        params: Any,
        matchers: Sequence[Matcher | None],
        *,
        config: Config,
        draft_params: Any = None,
        jump: bool = True,
    ):
        self.step, self.params, self.config, self.draft_params = step, params, config, draft_params
        self.matchers: list[Matcher | None] = list(matchers)
        self.jump = jump
        self.spent = Spent()
        self._words = -(-step.vocab_size // 32)

    def advance(self, state: loop.State, steps: int) -> loop.State:
        """Up to `steps` steps, fewer once every row is done. The state given is used up."""
        done = np.asarray(state.seq.done)
        for _ in range(steps):
            if done.all():
                break
            begun = time.perf_counter()
            state, done = self._step(state, done)
            self.spent.steps += 1
            self.spent.seconds += time.perf_counter() - begun
        return state

    def _step(self, state: loop.State, done: np.ndarray) -> tuple[loop.State, np.ndarray]:
        config = self.config
        forced = self._forced(done, state)
        if config.drafter.width:
            known = self._known(done) if jax.tree.leaves(state.drafter) else None
            proposal, state = _propose(self.params, state, config=config, draft_params=self.draft_params, known=known)
            if any(forced):
                proposal = _redraft(proposal, state.seq, *_padded(forced, max(map(len, forced))))
        else:
            proposal = _jump(forced)
        drafts = jax.device_get((proposal.tokens, proposal.parent, proposal.valid))
        scored, blocks = _score(self.step, self.params, state, proposal, config=config)
        masks = self._masks(done, *drafts)
        with warnings.catch_warnings():
            # A drafter's own Block is used up here and comes back from nowhere.
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            state, seen = _settle(state, proposal, scored, blocks, masks, self.draft_params, config=config)
        new, n, done = jax.device_get(seen)
        for row, matcher in enumerate(self.matchers):
            if matcher is not None and n[row]:
                matcher.advance(new[row, : n[row]].tolist())
        return state, done

    def _forced(self, done: np.ndarray, state: loop.State) -> list[list[int]]:
        # A drafter that keeps a state of its own drafts has to see them scored: it is told what is forced (`_known`).
        drafter = self.config.drafter
        none: list[list[int]] = [[] for _ in self.matchers]
        if not self.jump or (drafter.width and jax.tree.leaves(state.drafter)):
            return none
        most = drafter.depth or JUMPS[-1]
        return [
            [] if matcher is None or done[row] else matcher.forced(most) for row, matcher in enumerate(self.matchers)
        ]

    def _known(self, done: np.ndarray) -> np.ndarray:
        """What each row's grammar allows along its forced tokens and after them, by depth; then anything."""
        depth = self.config.drafter.depth
        known = np.full((len(done), depth + 1, self._words), 0xFFFFFFFF, np.uint32)
        for row, matcher in enumerate(self.matchers):
            if matcher is not None and not done[row]:
                forced = matcher.forced(depth)
                chain = range(len(forced))
                matcher.fill(known[row, : len(forced) + 1], forced, chain, [True] * len(forced))
        return known

    def _masks(self, done: np.ndarray, tokens: np.ndarray, parent: np.ndarray, valid: np.ndarray) -> np.ndarray:
        begun = time.perf_counter()
        masks = np.full((len(done), tokens.shape[1] + 1, self._words), 0xFFFFFFFF, np.uint32)
        for row, matcher in enumerate(self.matchers):
            if matcher is not None and not done[row]:
                self.spent.masks += matcher.fill(masks[row], tokens[row], parent[row], valid[row])
        self.spent.mask_seconds += time.perf_counter() - begun
        return masks


def _padded(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows' tokens i32[B, width] and how many each has i32[B]."""
    tokens = np.zeros((len(rows), width), np.int32)
    for out, row in zip(tokens, rows, strict=True):
        out[: len(row)] = row
    return tokens, np.asarray([len(row) for row in rows], np.int32)


def _jump(forced: Sequence[Sequence[int]]) -> Proposal:
    """The forced tokens alone, in the narrowest of the widths there are; made on the host, which starts nothing."""
    longest = max(map(len, forced))
    width = next(jump for jump in (0, *JUMPS) if longest <= jump)
    tokens, n = _padded(forced, width)
    index = np.arange(width, dtype=np.int32)
    arrays: Any = tokens, np.broadcast_to(index, tokens.shape), index < n[:, None]
    return Proposal(*arrays, depth=width, chain=True)
