"""Tree verification under sampling: draw each slot's next token from the target's law and walk while a draft has it.

A token drawn from the target at the root is what plain sampling would emit. Where a child carries that token, the
child's slot was scored with just this past, so its own draw is what plain sampling would emit next, and so on. The
output is the target's law exactly, for any drafts chosen without this step's BONUS keys, and a step accepts with the
probability that the children have together, as the one-coin rule of deterministic trees does. Miao et al. 2023
(SpecInfer, arXiv:2305.09781) have the family; their rule for drafts sampled without replacement needs each draft's law
and accepts no more than this where children are the draft's most likely tokens.

One draw a slot is what makes it exact: published codes that draw once for every path and keep the path that matched
longest choose among several draws by their outcome, and are biased. Two children with one token are harmless here: the
first is taken.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxinfer.decode import keys as key_streams
from jaxinfer.decode.draw import draw
from jaxinfer.decode.keys import Stream
from jaxinfer.decode.types import Proposal, Verdict
from jaxinfer.decode.walk import along, walk


@dataclasses.dataclass(frozen=True)
class Tree:
    """The target's own sample at every slot decides. Guarantee: the target's law, exactly; trees and chains."""

    reads: str = "logprobs"

    def verify(self, law: jax.Array, proposal: Proposal, key: jax.Array) -> Verdict:
        """`law f32[B, R, V]`: the warped log-law of each slot's next token; `key[B]`: the step's keys."""
        batch, slots, vocab = law.shape
        keys = key_streams.slots(key_streams.stream(key, Stream.BONUS), slots)
        weights = jnp.exp(law)
        chosen = draw(weights.reshape(-1, vocab), keys.reshape(-1)).reshape(batch, slots)
        path, n, end = walk(chosen, proposal)
        next_token = jnp.take_along_axis(chosen, end[:, None], 1)[:, 0]
        return Verdict(path, n, next_token, along(path, jnp.isfinite(weights).all(-1)).all(1))
