"""What the tests of drafters with a trained head share: a small target, random heads, and a target for `law`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.decode import Config, Sampling
from jaxinfer.models import ModelConfig, Step
from jaxinfer.models.heads import TargetShape
from jaxinfer.ops.attention import Segments
from jaxinfer.train.heads import Seen
from tests import drafter_checks as checks
from tests import toy

V, D = checks.V, 16
STEP = Step(
    ModelConfig(
        vocab_size=V, hidden_size=D, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24, max_length=96,
        tie_embeddings=True,
    )
)  # fmt: skip


def spread(params, seed, scale):
    """The params with noise, so that nothing is zero and logits are far apart."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noise)


PARAMS = spread(jax.jit(STEP.init)(jax.random.key(0)), 1, 0.4)
SHAPE = TargetShape.of(STEP.config)


def random_head(head, seed=2):
    """Params of a head as if it had been trained on something."""
    return spread(
        head.init(jax.random.key(seed), jnp.zeros((head.target.hidden_size, head.target.vocab_size))), seed, 0.2
    )


@dataclasses.dataclass(frozen=True)
class Table:
    """`drafter_checks.MARKOV` as heads see it: the hidden state is the law, an embedding is one-hot."""

    def head(self, params, hidden):
        return hidden

    def embed(self, params, ids):
        return jax.nn.one_hot(ids, checks.SYMBOLS)


LAW_SHAPE = TargetShape(checks.SYMBOLS, checks.SYMBOLS)


SIZE = 56  # one shape for every text, so that programs are compiled once


def see(ids):
    """What the target makes of `ids i32[B, T]`, each row one document."""
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    same = jnp.zeros_like(ids)
    output, _ = STEP(PARAMS, ids, positions, mask=Segments(same))
    logits = STEP.head(PARAMS, output.hidden)
    return Seen(output.hidden, (), logits, ids, jnp.roll(ids, -1, 1), same, positions, PARAMS)


def padded(rows):
    """Texts of several lengths as i32[B, SIZE]; what stands after a text does not reach back into it."""
    return jnp.asarray(np.stack([np.pad(row, (0, SIZE - len(row))) for row in rows]), jnp.int32)


@jax.jit
def hidden_of(ids):
    """The target's hidden states of texts `ids i32[B, SIZE]`."""
    return see(ids).hidden


class Stepped:
    """A drafter's State after each step of a greedy run of four ragged rows; `rows(state)` are their tokens."""

    def __init__(self, drafter, draft_params, steps=3):
        self.tokens, self.lengths = checks.repetitive_prompts()
        run = toy.Run(STEP, Config(max_tokens=checks.ANSWER, drafter=drafter, prefill_chunk=5))
        state = run.start(
            PARAMS, self.tokens, self.lengths, sampling=Sampling.make(checks.BATCH, eos=[-1]), draft_params=draft_params
        )
        self.states = [state]
        for _ in range(steps):
            state = run.advance(PARAMS, state, steps=1, draft_params=draft_params)
            self.states.append(state)

    def rows(self, state):
        """The tokens of each row so far."""
        return [np.asarray(r)[:n] for r, n in zip(state.seq.tokens, np.asarray(state.seq.length), strict=True)]
