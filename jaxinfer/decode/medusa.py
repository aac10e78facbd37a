"""Medusa: heads on the target's last hidden state guess several tokens at once; a tree of their likeliest is scored.

Cai et al. 2024 (arXiv:2401.10774). Guarantee: greedy output equal to plain greedy; sampled output of the target's law
(with the tree verifier; the paper's typical acceptance is `verifier=decode.Typical`, approximate). State: one hidden
state a row.

The tree: of all paths over the heads' guesses the `nodes` with the largest product of probabilities. The paper's tree
is fixed, chosen by the heads' accuracies on a calibration set (64 nodes); here each step's own probabilities choose,
which needs no calibration and costs no forward.

Departures: `nodes` 16 by default, since a scored slot is not free on small machines; the first step after a prompt of
one token drafts nothing, as no hidden state is known. The next token itself is the root, which the target has already
chosen: head k guesses the token k + 1 after it.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from jaxinfer.decode.draft_tree import Growing, most_nodes
from jaxinfer.decode.drafter import accept_counts
from jaxinfer.decode.head_drafter import HeadDrafter, last_of_chunk, last_of_step
from jaxinfer.models.heads.medusa import MedusaHead


@dataclasses.dataclass(frozen=True)
class Medusa(HeadDrafter):
    """`head`, `target`: see `HeadDrafter`; the head's arrays come as `draft_params`. `nodes`: drafts in the tree;
    `branches`: guesses of one head that are looked at."""

    head: MedusaHead
    target: Any
    nodes: int = 16
    branches: int = 6
    kind: ClassVar[str] = "medusa"

    def __post_init__(self):
        accept_counts(self, "nodes", "branches")

    @property
    def width(self) -> int:
        """N."""
        return min(self.nodes, most_nodes(self.branches, self.depth))

    @property
    def depth(self) -> int:
        """D."""
        return self.head.heads

    def init(self, params, target_params, seq, cache) -> jax.Array:
        """The hidden state of each row's last token but one, [B, D]."""
        self.check_head(params)
        return self.empty_hidden(params, seq)

    def prefill(self, params, state: jax.Array, chunk, output) -> jax.Array:
        """The last hidden state so far."""
        return last_of_chunk(state, chunk, output.hidden)

    def propose(self, params, state: jax.Array, seq, cache, key, *, target_params, warp):
        """The likeliest paths over the heads' guesses."""
        first, *more = map(jax.nn.log_softmax, self.head.logits(params, state, self.target, target_params))
        grown, frontier = Growing.of_root(first, min(self.branches, first.shape[-1]))
        for logp in more:
            grown, frontier = grown.level(frontier, logp[:, None])
        return grown.best(self.width, self.depth, seq.length > 1), state

    def observe(self, params, state: jax.Array, seq, proposal, scored, verdict, n, cache) -> jax.Array:
        """The hidden state of the last token that was kept."""
        return last_of_step(state, verdict, n, scored.output.hidden)
