"""Typical acceptance: keeps a draft that is likely enough for how sure the target is, and takes the longest such path.

Cai et al. 2024 (Medusa, arXiv:2401.10774), after Hewitt et al. 2022's truncation (arXiv:2210.15191). A token stays
where p > min(epsilon, delta * exp(-H(p))); defaults 0.09 and 0.3. The token after the path is drawn from the target
cut at the same threshold. Guarantee: approximate; at temperature 0 only the most likely token stays, and the output is
plain greedy's. Among paths of one length the likeliest is taken.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxinfer.decode import keys as key_streams
from jaxinfer.decode.draw import draw, first_max
from jaxinfer.decode.keys import Stream
from jaxinfer.decode.tree import slots_of
from jaxinfer.decode.types import Proposal, Verdict
from jaxinfer.decode.walk import along, path_to, usable
from jaxinfer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Typical:
    """`epsilon`: the highest threshold there is; `delta`: its share of exp(-entropy). Trees and chains."""

    epsilon: float = 0.09
    delta: float = 0.3
    reads: str = dataclasses.field(default="logprobs", init=False)

    def __post_init__(self):
        for name in ("epsilon", "delta"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, accepts more than 0, up to 1")

    def verify(self, law: jax.Array, proposal: Proposal, key: jax.Array) -> Verdict:
        """`law f32[B, R, V]`: the warped log-law of each slot's next token; `key[B]`: the step's keys."""
        p = jnp.exp(law)
        entropy = -jnp.where(p > 0, p * law, 0.0).sum(-1)
        threshold = jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy))
        end, n, path = self._longest(law, threshold, proposal)
        row = jnp.arange(law.shape[0])
        weights, least = p[row, end], threshold[row, end]
        weights = jnp.where(weights > least[:, None], weights, 0.0)
        token = draw(weights, key_streams.slot(key_streams.stream(key, Stream.BONUS), n))
        return Verdict(path, n, token, along(path, jnp.isfinite(p).all(-1)).all(1))

    def _longest(self, law, threshold, proposal: Proposal) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The last slot of the longest path of kept drafts, how many are on it, and the path."""
        zeros = jnp.zeros(law.shape[:1], jnp.int32)
        if proposal.tokens.shape[1] == 0:
            return zeros, zeros, zeros[:, None]
        parent = proposal.parent
        of_parent = jnp.take_along_axis(law, parent[..., None], 1)
        own = jnp.take_along_axis(of_parent, proposal.tokens[..., None], 2)[..., 0]
        fits = usable(proposal) & (jnp.exp(own) > jnp.take_along_axis(threshold, parent, 1))
        root = zeros[:, None]
        kept, score = jnp.concatenate([root == 0, fits], 1), jnp.zeros(threshold.shape)
        for _ in range(proposal.depth):  # one level further down each time
            kept = jnp.concatenate([root == 0, fits & jnp.take_along_axis(kept, parent, 1)], 1)
            score = jnp.concatenate([root * 0.0, own + jnp.take_along_axis(score, parent, 1)], 1)
        depth = jnp.where(kept, slots_of(proposal).depth, -1)
        n = depth.max(1)
        end = first_max(jnp.where(depth == n[:, None], jnp.where(kept, score, -jnp.inf), -jnp.inf))[1]
        return end, n, path_to(end, n, proposal)
