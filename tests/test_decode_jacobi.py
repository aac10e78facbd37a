"""Speculative Jacobi decoding: fresh draws verified under their own law; both published mistakes are seen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode import Config, Jacobi, Sampling
from jaxinfer.errors import ConfigError
from tests import drafter_checks as checks
from tests import toy


@dataclasses.dataclass(frozen=True)
class Stale(Jacobi):
    """Planted: `token` keeps a place's old token under its new law, `law` redraws but keeps the old law."""

    keeps: str = "token"

    def init(self, params, target_params, seq, cache):
        guesses = super().init(params, target_params, seq, cache)
        return {"guesses": guesses, "token": jnp.zeros(guesses.known.shape, jnp.int32), "law": guesses.logits}

    def propose(self, params, state, seq, cache, key, *, target_params, warp):
        guesses = state["guesses"]
        proposal, _ = super().propose(params, guesses, seq, cache, key, target_params=target_params, warp=warp)
        had = guesses.known
        if self.keeps == "token":
            return dataclasses.replace(proposal, tokens=jnp.where(had, state["token"], proposal.tokens)), state
        law = jnp.where(had[..., None], state["law"], proposal.q_logp)
        return dataclasses.replace(proposal, q_logp=law), state

    def observe(self, params, state, seq, proposal, scored, verdict, n, cache):
        guesses = super().observe(params, state["guesses"], seq, proposal, scored, verdict, n, cache)
        place = n[:, None] + jnp.arange(self.window)
        token = jnp.take_along_axis(proposal.tokens, place, 1, mode="clip")
        law = jnp.take_along_axis(proposal.q_logp, place[..., None], 1, mode="clip")
        guesses = dataclasses.replace(guesses, known=guesses.known & (place < self.window))
        return {"guesses": guesses, "token": token, "law": law}


def fill(drafter, *rows, prompt):
    seq = toy.sequence(*rows, prompt=prompt, vocab_size=10)
    return np.asarray(drafter._fill(seq, None)).tolist()


def test_places_not_known_are_filled_with_the_last_token_or_the_one_above():
    assert fill(Jacobi(3, "repeat"), [1, 2], [7], prompt=1) == [[2, 2, 2], [7, 7, 7]]
    grid = Jacobi(4, "neighbour", grid=3)
    # Two prompt tokens, then lines of three: above 6 stands 3; a place below one not yet there takes the last token.
    assert fill(grid, [8, 9, 3, 4, 5, 6], prompt=2) == [[4, 5, 6, 6]]
    assert fill(grid, [8, 9, 3], prompt=2) == [[3, 3, 3, 3]]


def test_random_places_are_the_rows_own():
    seq = toy.sequence([1], [1], vocab_size=50)
    keys = jax.random.split(jax.random.key(0), (2, 4))
    a = np.asarray(Jacobi(4)._fill(seq, keys))
    assert (a >= 0).all() and (a < 50).all() and len(np.unique(a)) > 4
    np.testing.assert_array_equal(a[::-1], Jacobi(4)._fill(seq, keys[::-1]))


def test_greedy_output_is_plain_output():
    checks.Greedy(Jacobi(window=5, initial="repeat")).check()


@pytest.mark.slow
def test_sampled_output_follows_the_targets_law():
    checks.check_law(Jacobi(2))


@pytest.mark.slow
@pytest.mark.parametrize("keeps", ["token", "law"])
def test_the_published_mistakes_are_seen(keeps):
    z, _ = checks.law(Stale(2, keeps=keeps))
    assert z > 12


@pytest.mark.slow
def test_penalties_and_forced_tokens_apply_inside_blocks():
    tokens, lengths = checks.repetitive_prompts()
    rules = dict(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, min_tokens=3, eos=[4])
    sampling = Sampling.make(checks.BATCH, max_tokens=12, forced=[2, 5], bias_ids=[1], bias_values=[-2.0], **rules)
    plain, jacobi = (
        toy.outputs(toy.Run(checks.MODEL, config)(checks.PARAMS, tokens, lengths, sampling=sampling))
        for config in (Config(max_tokens=12), Config(max_tokens=12, drafter=Jacobi(4, "repeat")))
    )
    assert jacobi == plain and all(row[:2] == [2, 5] for row in plain)


@pytest.mark.slow
def test_a_grid_model_gains_from_its_neighbours():
    """Lines of six nearly alike, whatever stood before: the token above is the best first guess."""
    grid, vocab = 6, 12
    model = toy.Markov(vocab, period=grid)
    line = jax.nn.one_hot(jnp.array([3, 7, 1, 9, 4, 11]), vocab)[:, None]
    params = {"table": 6.0 * line + 0.5 * jax.random.normal(jax.random.key(0), (grid, vocab, vocab))}
    tokens, lengths = jnp.zeros((4, grid), jnp.int32), jnp.full(4, grid)

    drafter = Jacobi(4, "neighbour", grid=grid)
    run = toy.Run(model, Config(max_tokens=24, temperature=1.0, drafter=drafter))
    result = run(params, tokens, lengths, sampling=Sampling.make(4, temperature=1.0, max_tokens=24))
    assert float(result.stats.acceptance_by_depth[0]) > 0.5, "a random token would be right in one of twelve"


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="window: got 0"):
        Jacobi(0)
    with pytest.raises(ConfigError, match="initial: got 'zeros', accepts random, repeat, neighbour"):
        Jacobi(4, "zeros")
    with pytest.raises(ConfigError, match="grid: got 0"):
        Jacobi(4, "neighbour")
    with pytest.raises(ConfigError, match="vocab_size"):
        Jacobi().init(None, None, toy.sequence([1]), None)
