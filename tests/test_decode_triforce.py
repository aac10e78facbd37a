"""TriForce: exact at all three levels, equal to its own outer level where the budget holds the prompt, the repository's
biased correction caught."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as kv
from jaxinfer.cache.retrieval import Retrieval
from jaxinfer.decode import Chain, Config, Features, Sampling, TriForce, keys
from jaxinfer.decode.draw import draw
from jaxinfer.decode.keys import Stream
from jaxinfer.errors import ConfigError
from jaxinfer.models import ModelConfig, Step
from tests import drafter_checks as checks
from tests import toy

TARGET = Step(
    ModelConfig(
        vocab_size=checks.V, hidden_size=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=24,
        max_length=64, tie_embeddings=True,
    )
)  # fmt: skip
PARAMS = jax.tree.map(lambda x: 8 * x, TARGET.init(jax.random.key(0)))
SMALL = checks.MODEL.params(5, scale=0.5)
DRAFT = checks.MARKOV.params(1, scale=1.2)
NEAR = {"table": 0.6 * checks.TABLE["table"] + 0.4 * checks.MARKOV.params(2, scale=1.2)["table"]}


@dataclasses.dataclass(frozen=True)
class OnTables(TriForce):
    """A Markov target has no keys to retrieve: its middle model is another table near it."""

    def retrieve(self, target_params, seq, cache):
        return kv.Cache((toy.Count(cache.t),), cache.specs)

    def middle_params(self, params, target_params):
        return NEAR


@dataclasses.dataclass(frozen=True)
class AsReleased(Chain):
    """Planted: the repository's inner correction, drawn from the law itself and not from the residual."""

    def verify(self, law, proposal, key):
        verdict = super().verify(law, proposal, key)
        rows = jnp.arange(law.shape[0])
        again = draw(jnp.exp(law[rows, verdict.n_accepted]), keys.slot(keys.stream(key, Stream.RESIDUAL), 0))
        return dataclasses.replace(verdict, next_token=jnp.where(verdict.n_accepted < 1, again, verdict.next_token))


@dataclasses.dataclass(frozen=True)
class Released(OnTables):
    def inner_verifier(self, *, sampled):
        return AsReleased()


def test_greedy_output_is_plain_output():
    drafter = TriForce(checks.MODEL, TARGET, gamma=3, budget=8, chunk=4, recent=6)
    checks.Greedy(drafter, SMALL, model=TARGET, params=PARAMS).check()


@pytest.mark.slow
def test_sampled_output_follows_the_targets_law():
    checks.check_law(OnTables(checks.MARKOV, checks.MARKOV, gamma=2), DRAFT)


@pytest.mark.slow
def test_the_published_correction_is_caught():
    assert checks.law(Released(checks.MARKOV, checks.MARKOV, gamma=2), DRAFT)[0] > 12


@pytest.mark.slow
@pytest.mark.parametrize("twin", [False, True])
def test_a_budget_of_the_whole_row_makes_the_outer_test_vain(twin):
    """The retrieval cache is then the whole one: every token of the inner loop stands. And each round of it is fed what
    the last one lacked: with the target as the small model too, the inner loop keeps everything."""
    tokens, lengths = checks.repetitive_prompts()
    small, params = (TARGET, PARAMS) if twin else (checks.MODEL, SMALL)
    drafter = TriForce(small, TARGET, gamma=3, budget=64, chunk=4, recent=64)
    run = toy.Run(TARGET, Config(max_tokens=20, drafter=drafter, features=Features(sample=True)))
    sampling = Sampling.make(4, eos=[-1], max_tokens=20, temperature=jnp.array([0.0, 1.0, 1.5, 1.0]))
    stats = run(PARAMS, tokens, lengths, sampling=sampling, draft_params=params).stats
    np.testing.assert_array_equal(stats.accepted_by_depth, stats.proposed_by_depth)
    assert int(stats.proposed.min()) > 0
    if twin:
        assert stats.forwards.tolist() == [20 // 5] * 4  # gamma + 1 from the inner loop, and a bonus


@pytest.mark.slow
def test_the_retrieval_cache_follows_the_row():
    """After each step the two inner caches hold what fresh ones would, up to the tokens they may lack."""
    drafter = TriForce(checks.MODEL, TARGET, gamma=3, budget=64, chunk=4, recent=64)
    run = toy.Run(TARGET, Config(max_tokens=12, drafter=drafter, features=Features()))
    tokens, lengths = checks.repetitive_prompts()
    state = run.start(PARAMS, tokens, lengths, sampling=Sampling.make(4, eos=[-1]), draft_params=SMALL)
    assert isinstance(state.drafter.middle.specs[0], Retrieval)

    @jax.jit
    def logits(state):
        seq, (small, middle) = state.seq, (state.drafter.small, state.drafter.middle)
        found = []
        for model, params, cache in ((checks.MODEL, SMALL, small), (TARGET, PARAMS, middle)):
            at = seq.length[:, None] - 3 + jnp.arange(3)
            rest = jnp.take_along_axis(seq.tokens, jnp.maximum(at, 0), 1)
            cached, _ = model(params, rest, jnp.where((at >= cache.t[:, None]) & (at >= 0), at, -1), cache, None)
            index = jnp.arange(seq.tokens.shape[1])[None]
            fresh, _ = model(params, seq.tokens, jnp.where(index < seq.length[:, None], index, -1))
            last = jnp.take_along_axis(fresh.hidden, seq.length[:, None, None] - 1, 1)
            found.append((cached.hidden[:, -1], last[:, 0], seq.length - cache.t))
        return found

    while not bool(state.seq.done.all()):
        for (cached, fresh, behind), most in zip(logits(state), (3, 2), strict=True):
            np.testing.assert_allclose(cached, fresh, atol=1e-4)
            assert int(behind.max()) <= most
        state = run.advance(PARAMS, state, steps=1, draft_params=SMALL)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="gamma: got 0"):
        TriForce(checks.MODEL, TARGET, gamma=0)
    with pytest.raises(ConfigError, match="budget: got 4 with chunks of 8"):
        TriForce(checks.MODEL, TARGET, budget=4)
    run = toy.Run(checks.MODEL, Config(max_tokens=4, drafter=TriForce(checks.MODEL, checks.MODEL)))
    with pytest.raises(ConfigError, match="notes"):
        run.start(checks.PARAMS, *checks.repetitive_prompts(), draft_params=SMALL)
