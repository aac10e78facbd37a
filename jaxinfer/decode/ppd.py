"""PPD, parallel prompt decoding: prompt tokens below the nodes of a tree guess, in the same forward, what follows them.

Chen et al. 2024 (arXiv:2405.18628). A step scores a tree of guesses and, below its nodes, prompt slots (probes, fed
trained embeddings). Where the accepted path ends, the logits of the prompt slots below are the guesses of the next
step: slot i after node v guesses token i + 1 after v; the first after v is the target's own. Paper: 3 prompt tokens,
guesses from the ten likeliest tokens of each, greedy or typical acceptance.

Guarantee: greedy output equal to plain greedy; sampled output of the target's law (with the tree verifier, which needs
no law of the drafts). The paper samples with typical acceptance, which is approximate: `Config(verifier=Typical())`.
State: how many prompt slots' guesses a row has, and their likeliest tokens.

Which guesses and prompt slots a step scores is `ppd_tree`'s dynamic sparse tree, one for each count of guesses at hand,
chosen once by the head's measured acceptance and static from then on; a row's state picks its tree as data, so that one
compilation serves them all. Rows before their first step have no guess and score prompt slots alone.

Departures: a prompt slot takes a position and sees its node's path by the rule for drafts (it is a child of its node),
so no mask of its own exists. Published code swaps the two numbers of typical acceptance between functions; here they
are `Typical`'s.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence as Several
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxinfer.decode.autoregressive import Autoregressive
from jaxinfer.decode.chooser import Chooser
from jaxinfer.decode.head_drafter import HeadDrafter
from jaxinfer.decode.ppd_tree import SparseTree, best_slots, choose_trees
from jaxinfer.decode.types import Proposal, Sequence, Step
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models.heads.ppd import PPDHead

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@struct.dataclass
class PPDState:
    """`known i32[B]`: levels of guesses at hand; `guesses i32[B, prompts, C]`: each level's likeliest tokens."""

    known: jax.Array
    guesses: jax.Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """The trees as arrays, a row for each state; N slots after the root, guesses first. `parent`; `guess`: which entry
    of the flat guesses a slot holds (-1: none); `prompt`: which of the flat prompt embeddings (-1: none), i32[K, N].
    `first`, `probes i32[K, N + 1]`: for each node, the slot of its first probe and how many prompt tokens it has."""

    parent: np.ndarray
    guess: np.ndarray
    prompt: np.ndarray
    first: np.ndarray
    probes: np.ndarray


@functools.cache
def layout(trees: tuple[SparseTree, ...], copies: int, candidates: int) -> Layout:
    """The slots of `trees`, padded to the largest; the prompt slots of a node are chains, one for each copy."""
    size = max(1, *(tree.slots(copies) for tree in trees))
    parent = np.zeros((len(trees), size), np.int32)
    guess, prompt = np.full_like(parent, -1), np.full_like(parent, -1)
    first = np.zeros((len(trees), size + 1), np.int32)
    probes = np.zeros_like(first)
    for k, tree in enumerate(trees):
        n = len(tree.parent)
        parent[k, :n] = tree.parent
        guess[k, :n] = [(level - 1) * candidates + r for level, r in zip(tree.level[1:], tree.rank, strict=True)]
        slot = n + 1
        for node, count in enumerate(tree.probes):
            first[k, node], probes[k, node] = slot, count
            for number in range(count * copies):
                parent[k, slot - 1] = node if number < copies else slot - copies
                prompt[k, slot - 1] = number
                slot += 1
    return Layout(parent, guess, prompt, first, probes)


@dataclasses.dataclass(frozen=True)
class PPD(HeadDrafter):
    """`head`: the prompt tokens, whose embeddings come as `draft_params`; `target`: as for every head, not read here.
    `slots`: how many a step scores beside the root, at most. `trees`: one for each state, of a size that is then theirs
    (empty: the best of `slots` slots)."""

    head: PPDHead
    target: Any = None
    slots: int = 12
    trees: tuple[SparseTree, ...] = ()
    kind: ClassVar[str] = "ppd"

    def __post_init__(self):
        if not isinstance(self.head, PPDHead):
            got = "none" if self.head is None else f"one of kind {getattr(self.head, 'kind', self.head)}"
            raise ConfigError(
                f"PPD needs a head of kind ppd, got {got}; accepted: head= and draft_params=, or --draft-model with "
                "the head's folder"
            )
        if not self.trees:
            if len(self.head.acceptance) != self.head.prompts:
                raise ConfigError(
                    f"head: got {len(self.head.acceptance)} rows of acceptance, needs {self.head.prompts}: measure it"
                )
            object.__setattr__(self, "trees", choose_trees(self.head.acceptance, self.slots, self.head.copies))
        if len(self.trees) != self.head.prompts + 1:
            raise ConfigError(f"trees: got {len(self.trees)}, accepts one for each of 0 to {self.head.prompts} guesses")
        for known, tree in enumerate(self.trees):
            if max(tree.level) > known or max(tree.probes) > self.head.prompts:
                raise ConfigError(f"trees[{known}]: got {tree}, accepts {known} levels, {self.head.prompts} probes")
        if self.candidates > self.vocab_size:
            raise ConfigError(f"trees: got ranks up to {self.candidates - 1}, accepts up to {self.vocab_size - 1}")

    @classmethod
    def measured(
        cls, head: PPDHead, step: Step, params: Any, *, batch: int, capacity: int, sizes: Several[int] = SIZES
    ) -> PPD | Autoregressive:
        """The drafter with the most tokens a second on this machine (host): forwards of each size are timed over
        `batch` rows of `capacity` tokens. Plain decoding where no size gains."""
        widest = cls(head, slots=max(sizes))
        sizes = tuple(size for size in sizes if size <= widest.width)
        curve = Chooser.measured(widest, step, params, batch=batch, capacity=capacity, sizes=sizes).target
        slots, _ = best_slots(head.acceptance, curve, sizes, head.copies)
        return cls(head, slots=slots) if slots else Autoregressive()

    @property
    def layout(self) -> Layout:
        """The trees' slots."""
        return layout(self.trees, self.head.copies, self.candidates)

    @property
    def candidates(self) -> int:
        """C: tokens kept of each prompt slot, as many as the trees use."""
        return 1 + max(max(tree.rank, default=0) for tree in self.trees)

    @property
    def width(self) -> int:
        """N."""
        return self.layout.parent.shape[1]

    @property
    def depth(self) -> int:
        """D."""
        return max(max(tree.level) for tree in self.trees)

    def init(self, params, target_params, seq: Sequence, cache) -> PPDState:
        """No guesses."""
        size = self.head.target.hidden_size
        wanted, found = (
            (self.head.prompts, self.head.copies, size),
            getattr((params or {}).get("prompts"), "shape", None),
        )
        if found != wanted:
            raise InputError(f"draft_params/prompts: got shape {found}, the head needs {wanted}")
        batch = seq.length.shape[0]
        guesses = jnp.zeros((batch, self.head.prompts, self.candidates), jnp.int32)
        return PPDState(jnp.zeros(batch, jnp.int32), guesses)

    def propose(self, params, state: PPDState, seq, cache, key, *, target_params, warp):
        """The tree of each row's state, with the guesses at hand and the prompt slots."""
        at = self.layout
        parent, guess, prompt = (jnp.asarray(x)[state.known] for x in (at.parent, at.guess, at.prompt))
        guesses = state.guesses.reshape(guess.shape[0], -1)
        tokens = jnp.take_along_axis(guesses, jnp.maximum(guess, 0), 1)
        own = params["prompts"].reshape(-1, params["prompts"].shape[-1])[jnp.maximum(prompt, 0)]
        proposal = Proposal.of_tree(
            jnp.where(guess >= 0, tokens, 0), parent, (guess >= 0) | (prompt >= 0), depth=self.depth,
            probe=prompt >= 0, embeddings=own, beyond=self.head.prompts,
        )  # fmt: skip
        return proposal, state

    def observe(self, params, state: PPDState, seq, proposal, scored, verdict, n, cache) -> PPDState:
        """Take over the guesses of the prompt slots below the last accepted node."""
        at, copies = self.layout, self.head.copies
        end = jnp.take_along_axis(verdict.path, verdict.n_accepted[:, None], 1)[:, 0]
        first, probes = jnp.asarray(at.first)[state.known, end], jnp.asarray(at.probes)[state.known, end]
        index = jnp.arange(self.head.prompts * copies, dtype=jnp.int32)
        slot = jnp.minimum(first[:, None] + index, proposal.tokens.shape[1])
        logits = jnp.take_along_axis(scored.logits, slot[..., None], 1)
        logits = logits.reshape(-1, self.head.prompts, copies, logits.shape[-1]).mean(2)
        guesses = jax.lax.top_k(logits, self.candidates)[1]
        live = jnp.take_along_axis(proposal.valid, jnp.maximum(slot - 1, 0), 1) & (index < copies * probes[:, None])
        known = jnp.cumprod(live[:, copies - 1 :: copies].astype(jnp.int32), 1).sum(1)
        whole = n == verdict.n_accepted + 1  # a path cut short ends elsewhere than its guesses assume
        return PPDState(jnp.where(whole, known, 0), guesses)
