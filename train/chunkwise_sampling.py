"""SpaCO's choice of chunks: which of them send gradients back in an update, and what each is multiplied by.

Li et al. (2025), "Training Long-Context LLMs Efficiently via Chunk-wise Optimization", arXiv 2505.16710 (ACL Findings
2025). Chunks are visited from the last to the first. A chosen chunk's loss, and the gradient that later chunks sent to
its keys and values, are multiplied by factors that make up for the chunks left out; a chunk left out sends nothing.

Guarantee: `bernoulli` and `adaptive` estimate the gradient without bias. Chunk i is chosen with a probability p_i that
depends on the chunks after it alone and both its factors are 1 / p_i, so given those chunks each factor has mean 1, and
what is sent to earlier chunks is linear in it. `fixed`, the paper's, is a different estimator: a chain of gradients
through p chunks survives drawing t of k without replacement with probability prod (t - j) / (k - j), less than the
(t / k)^p that its factors make up for. Over all draws of a toy its mean is off by 6 % to 51 % of the gradient's norm,
by which form of the paper's it is (`FIXED_BIAS`); how far depends on the model and grows with the depth of chains.

Departures: the paper's codes disagree on what is multiplied; `compensate` names their forms ("both": the code with
--unbiased_estimate; "loss": its default; "relay": the printed Algorithm 2). The paper clips factors at 2, which trades
bias for variance: `max_compensation`, off by default.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.errors import ConfigError

KINDS = ("bernoulli", "adaptive", "fixed")
COMPENSATE = ("both", "loss", "relay")
# The bias of `fixed`, 2 of 4 chunks: the norm of (mean gradient - gradient) over the gradient's, all draws enumerated,
# of the two-layer toy of tests/test_train_chunkwise.py. The unbiased kinds have less than 1e-12.
FIXED_BIAS = {"both": 0.056, "loss": 0.105, "relay": 0.510}


@struct.dataclass
class Draw:
    """The factors of the k chunks of one update, f32[k] each; chunks whose `chosen bool[k]` is false are left out."""

    chosen: jax.Array
    loss: jax.Array
    relay: jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """About `budget` of the chunks in each update.

    kind: "bernoulli" chooses each chunk alone with probability budget / chunks; "adaptive" with what is left of the
    budget over the chunks left, at least `min_probability`, so that the number of chosen chunks hardly varies (at the
    price of more variance from rare chunks); "fixed" chooses exactly `budget` (biased).
    max_compensation: the largest factor, or None. Raises ConfigError naming the field.
    """

    budget: int = 8
    kind: str = "bernoulli"
    min_probability: float = 0.1
    compensate: str = "both"
    max_compensation: float | None = None

    def __post_init__(self):
        if type(self.budget) is not int or self.budget < 1:
            raise ConfigError(f"budget: got {self.budget!r}, accepts a number of chunks, 1 or more")
        if self.kind not in KINDS:
            raise ConfigError(f"sampling: got {self.kind!r}, accepts {', '.join(KINDS)}")
        if not 0 < self.min_probability <= 1:
            raise ConfigError(f"min_probability: got {self.min_probability!r}, accepts above 0 to 1 (0 is biased)")
        if self.compensate not in COMPENSATE:
            raise ConfigError(f"compensate: got {self.compensate!r}, accepts {', '.join(COMPENSATE)}")
        if self.compensate != "both" and self.kind != "fixed":
            raise ConfigError(f"compensate: got {self.compensate!r} for {self.kind}, accepts 'both', without bias")
        if self.max_compensation is not None and not self.max_compensation >= 1:
            raise ConfigError(f"max_compensation: got {self.max_compensation!r}, accepts 1 or more, or None")

    def biased(self, chunks: int) -> bool:
        """Whether the mean of the gradients over draws is not the gradient, of sequences of that many chunks."""
        if self.budget >= chunks:
            return False
        least = self.budget / chunks
        if self.kind == "adaptive":
            least = min(least, self.min_probability)
        return self.kind == "fixed" or (self.max_compensation is not None and self.max_compensation < 1 / least)

    def draw(self, key: jax.Array, chunks: int) -> Draw:
        """Which chunks, and their factors. With a budget of all chunks, all of them and factors of 1."""
        if self.budget >= chunks:
            return every(chunks)
        if self.kind == "adaptive":
            chosen, probability = self._adaptive(key, chunks)
        else:
            probability = jnp.full(chunks, self.budget / chunks)
            if self.kind == "fixed":
                chosen = jax.random.permutation(key, chunks) < self.budget
            else:
                chosen = jax.random.uniform(key, (chunks,)) < probability
        factor = 1 / probability
        if self.max_compensation is not None:
            factor = jnp.minimum(factor, self.max_compensation)
        ones = jnp.ones_like(factor)
        loss, relay = (factor if self.compensate in ("both", which) else ones for which in ("loss", "relay"))
        return Draw(chosen, jnp.where(chosen, loss, 0.0), jnp.where(chosen, relay, 0.0))

    def _adaptive(self, key: jax.Array, chunks: int) -> tuple[jax.Array, jax.Array]:
        """From the last chunk to the first: what is left of the budget over the chunks that are left."""

        def visit(used, xs):
            index, sample = xs
            probability = jnp.clip((self.budget - used) / (index + 1.0), self.min_probability, 1.0)
            chosen = sample < probability
            return used + chosen, (chosen, probability)

        order = (jnp.arange(chunks), jax.random.uniform(key, (chunks,)))
        return jax.lax.scan(visit, jnp.zeros((), jnp.int32), order, reverse=True)[1]


def every(chunks: int) -> Draw:
    """All chunks, nothing to make up for: SeCO."""
    ones = jnp.ones(chunks)
    return Draw(ones > 0, ones, ones)
