"""Particles against the tilted law, enumerated: constant rewards, one particle, many, Gibbs passes, tempering."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode import Config
from jaxinfer.decode.particles import ParticleConfig, particle_filter, particle_gibbs
from jaxinfer.errors import ConfigError
from tests import drafter_checks as checks
from tests import toy

V, L, ROWS = 3, 3, 6000
MODEL = toy.Markov(V, period=4)
PARAMS = MODEL.params(1, scale=1.0)
SAMPLED = Config(max_tokens=L, temperature=1.0, eos=())


@dataclasses.dataclass(frozen=True)
class Count:
    """Reward: how many of the tokens written are `token`, times `scale`. Rises a segment at a time."""

    token: int = 1
    scale: float = 1.2

    def __call__(self, seq):
        index = jnp.arange(seq.tokens.shape[1])[None]
        written = (index >= seq.prompt_length[:, None]) & (index < seq.length[:, None])
        return self.scale * ((seq.tokens == self.token) & written).sum(1)


@functools.cache
def program(config, reward):
    return jax.jit(functools.partial(particle_gibbs, MODEL, config=config, reward=reward))


def run(reward=Count(), *, rows=ROWS, seed=0, **settings):
    config = ParticleConfig(SAMPLED, segment=1, **settings)
    tokens = jnp.full((rows, 1), 2, jnp.int32)
    return program(config, reward)(PARAMS, tokens, jnp.ones(rows, jnp.int32), key=jax.random.key(seed))


def tilted(beta=1.0, reward=Count()):
    """The exact law p(x) exp(beta reward(x)) / Z over answers of L tokens, and log Z."""
    table = [[toy.law_of(x) for x in level] for level in np.asarray(PARAMS["table"])]
    law = toy.sequence_law(lambda prefix: table[len(prefix) % 4][prefix[-1] if prefix else 2], L)
    mass = {x: p * np.exp(beta * reward.scale * x.count(reward.token)) for x, p in law.items()}
    total = sum(mass.values())
    return {x: m / total for x, m in mass.items()}, float(np.log(total))


def chosen(result):
    """The answer drawn by weight of every prompt."""
    return np.take_along_axis(np.asarray(result.tokens), np.asarray(result.chosen)[:, None, None], 1)[:, 0]


def distance(result, **law):
    """(z of the chi-square, total variation) of the chosen answers from the tilted law."""
    return toy.chi_square(chosen(result), tilted(**law)[0])


def test_a_constant_reward_leaves_the_models_law():
    assert distance(run(Count(scale=0.0), particles=4), reward=Count(scale=0.0))[0] < 5


def test_one_particle_is_plain_sampling_whatever_the_reward():
    assert distance(run(particles=1), beta=0.0)[0] < 5


@pytest.mark.slow
def test_more_particles_come_closer_to_the_tilted_law():
    far, near, close = (distance(run(particles=n))[1] for n in (1, 4, 32))
    assert far > 0.2 > near > close and close < 0.05, (far, near, close)


@pytest.mark.slow
def test_the_evidence_is_unbiased():
    """The mean of its exponential over many runs is Z; resampling always, never, or by the effective sample size."""
    for settings in (dict(), dict(ess=0.0), dict(ess=0.7, scheme="multinomial")):
        found = run(particles=4, **settings).log_evidence
        ratio = np.exp(np.asarray(found, np.float64) - tilted()[1])
        assert abs(ratio.mean() - 1) < 5 * ratio.std() / ROWS**0.5, (settings, ratio.mean())


@pytest.mark.slow
def test_the_published_weights_tilt_further_and_are_told_apart():
    """Planted by the paper's code: the whole reward at every segment."""
    good, published = run(particles=32), run(particles=32, published=True)
    assert distance(good)[1] < 0.05 < 0.15 < distance(published)[1]


@pytest.mark.slow
def test_gibbs_passes_reach_the_tilted_law_with_few_particles():
    assert distance(run(particles=4))[0] > 12
    assert distance(run(particles=4, passes=12))[0] < 5


@pytest.mark.slow
def test_tempering_keeps_the_law_of_its_first_chain():
    assert distance(run(particles=4, passes=12, betas=(1.0, 0.3), rows=ROWS // 2))[0] < 5


@pytest.mark.slow
def test_hot_chains_exchange_only_by_the_metropolis_rule(monkeypatch):
    """Planted: neighbours always swap."""
    from jaxinfer.decode import particles

    always = lambda self, reward, index: jnp.arange(self.groups) ^ 1  # noqa: E731
    monkeypatch.setattr(particles._Run, "exchange", always)
    config = ParticleConfig(SAMPLED, segment=1, particles=4, passes=12, betas=(1.0, 0.0))
    tokens = jnp.full((ROWS // 2, 1), 2, jnp.int32)
    wrong = jax.jit(functools.partial(particle_gibbs, MODEL, config=config, reward=Count()))(
        PARAMS, tokens, jnp.ones(ROWS // 2, jnp.int32), key=jax.random.key(0)
    )
    assert distance(wrong)[0] > 12


def test_impossible_answers_die_out():
    """A reward of minus infinity, or one that is not a number, ends with no weight."""
    result = run(Never(), particles=8, rows=500)
    weights, tokens = np.asarray(result.weights), np.asarray(result.tokens)
    bad = (tokens == 0).any(-1)
    assert bad.any() and not bad.all(1).all()
    assert weights[bad & ~bad.all(1, keepdims=True)].sum() == 0  # where something is possible, nothing else counts
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Never:
    def __call__(self, seq):
        index = jnp.arange(seq.tokens.shape[1])[None]
        written = (index >= seq.prompt_length[:, None]) & (index < seq.length[:, None])
        bad = ((seq.tokens == 0) & written).any(1)
        return jnp.where(bad, jnp.where(seq.length % 2 == 0, -jnp.inf, jnp.nan), 0.0)


@pytest.mark.slow
def test_caches_move_with_the_particles():
    """On a model with a cache, and segments that end at a token: every answer's tokens are likely under a forward anew
    exactly as they were drawn, so greedy particles of tiny temperature equal plain greedy decoding."""
    cold = Config(max_tokens=8, temperature=1e-4, eos=(3,))
    config = ParticleConfig(cold, particles=3, segment=3, ends=(2,), passes=2)
    tokens, lengths = checks.repetitive_prompts()
    result = jax.jit(functools.partial(particle_gibbs, checks.MODEL, config=config, reward=Count()))(
        checks.PARAMS, tokens, lengths, key=jax.random.key(0)
    )
    plain = toy.outputs(toy.Run(checks.MODEL, Config(max_tokens=8, eos=(3,)))(checks.PARAMS, tokens, lengths))
    for row, lengths_, want in zip(np.asarray(result.tokens), np.asarray(result.lengths), plain, strict=True):
        for particle, n in zip(row, lengths_, strict=True):
            assert particle[:n].tolist() == want


def test_a_filter_is_one_pass():
    config = ParticleConfig(SAMPLED, particles=2, segment=1, passes=5)
    arguments = (PARAMS, jnp.full((4, 1), 2, jnp.int32), jnp.ones(4, jnp.int32))
    one = jax.jit(functools.partial(particle_filter, MODEL, config=config, reward=Count()))
    again = program(dataclasses.replace(config, passes=1), Count())
    jax.tree.map(
        np.testing.assert_array_equal, one(*arguments, key=jax.random.key(3)), again(*arguments, key=jax.random.key(3))
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(particles=0), "particles: got 0"),
        (dict(ess=1.5), "ess: got 1.5, accepts 0 to 1"),
        (dict(scheme="best"), "scheme: got 'best', accepts 'systematic', 'multinomial'"),
        (dict(betas=()), "betas: got"),
        (dict(config=Config(temperature=0.0)), "config.temperature: got 0.0, accepts more than 0"),
        (dict(config=Config(temperature=1.0, n=2)), "config.n: got 2"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ParticleConfig(**{"config": SAMPLED, **settings})
